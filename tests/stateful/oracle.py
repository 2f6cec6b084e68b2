"""What a winnowed cache should hold and answer, in float64 and in plain words; nothing of swan is used here.

Every token stays here for ever, dense, at its *column*: its place in the whole sequence. The documented semantics say
what became of it:

- The newest `buffer` tokens are dense. A token that a newer one pushes out has *left*; it is packed at that moment.
- The first `sinks` tokens of each row, counted from the row's first real token, are dense for ever.
- A query sees the columns from its row's padding to its own, as they are when its token has come. In a chunk it sees
  them as they were when the first token of the chunk had come, and the tokens of the chunk dense.
- Evicted columns, and without a history all that have left, are not seen; while they are in the buffer they are.
- `crop` forgets the last columns. What has left stays packed, and the buffer holds fewer tokens until new ones come.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Answer", "Oracle"]


@dataclass
class Answer:
    """An exact output, and the parts of it that a bound of errors needs.

    Attributes:
        out: ``[rows, heads, queries, dv]``.
        dense: the sum of weights times magnitudes of the dense values, like `out`.
        packed: the same of the packed ones.
        largest: the largest weight times length of a packed value ``[rows, heads, queries, 1]``.
        score: the largest product of lengths of a query and a key that it sees, times the scale, likewise.
        columns: how many columns there are.
    """

    out: Tensor
    dense: Tensor
    packed: Tensor
    largest: Tensor
    score: Tensor
    columns: int


class Oracle:
    """The tokens of one layer, those in `left` columns packed.

    Attributes:
        keys: dense keys ``[rows, kv_heads, columns, d]``; `values` likewise.
        packed_keys: what a packed token is, filled in by whoever has read and checked the stored bytes.
        padding: left padding of each row.
        left: so many columns have left the buffer.
        known: so many of them are filled in.
        dropped: so many columns after the first `sinks` ones are evicted.
    """

    def __init__(self, buffer: int, sinks: int, *, windowed: bool, history: bool) -> None:
        self.buffer, self.sinks, self.windowed, self.history = buffer, sinks, windowed, history
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.packed_keys: Tensor | None = None
        self.packed_values: Tensor | None = None
        self.padding: list[int] = []
        self.left = self.known = self.dropped = 0

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def stored(self) -> range:
        """The columns in the packed history."""
        return range(self.sinks + self.dropped, self.left if self.history else 0)

    def append(self, keys: Tensor, values: Tensor, padding: list[int] | None) -> None:
        """Take new tokens in; each pushes the oldest out of a full buffer."""
        keys, values = keys.double(), values.double()
        if padding is not None:
            self.padding = list(padding)
        if self.keys is None:
            self.padding = self.padding or [0] * keys.shape[0]
            self.keys, self.values = keys, values
            self.packed_keys, self.packed_values = torch.zeros_like(keys), torch.zeros_like(values)
        else:
            self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            self.packed_keys = torch.cat([self.packed_keys, torch.zeros_like(keys)], 2)
            self.packed_values = torch.cat([self.packed_values, torch.zeros_like(values)], 2)
        self.left = max(self.left, self.length - self.buffer)

    def seen(self, before: int, left: int, causal: bool = True) -> tuple[Tensor, Tensor]:
        """Say what the queries of the newest tokens see dense, and what packed: ``[rows, 1, queries, columns]``.

        Args:
            before: tokens before the new ones.
            left: tokens that had left before the new ones came.
            causal: whether later tokens are hidden; a mask says that itself.
        """
        column, query = torch.arange(self.length), torch.arange(before, self.length)[:, None]
        turn = query if self.windowed else query[:1]  # of the token that was the newest when a query looked
        gone = column < (turn + 1 - self.buffer).clamp(min=left)
        start = torch.tensor(self.padding)[:, None, None]
        visible = ((column <= query) | torch.tensor(not causal)) & (column >= start)
        dense = visible & (~gone | (column < start + self.sinks))
        packed = visible & ~dense & (column >= self.sinks + self.dropped)
        return dense[:, None], (packed if self.history else torch.zeros_like(packed))[:, None]

    def attend(self, q: Tensor, before: int, left: int, scale: float, mask: Tensor | None = None) -> Answer:
        """Attend with the queries of the newest tokens; a mask says all that they see. What sees nothing gets zeros."""
        assert self.keys is not None and self.values is not None
        assert self.packed_keys is not None and self.packed_values is not None
        dense, packed = self.seen(before, left, mask is None)
        if mask is not None:
            dense, packed = (which & mask[..., : self.length] for which in (dense, packed))
        group = q.shape[1] // self.keys.shape[1]
        tensors = self.keys, self.packed_keys, self.values, self.packed_values
        keys, packed_keys, values, packed_values = (t.repeat_interleave(group, dim=1) for t in tensors)
        scores = torch.where(dense, q.double() @ keys.mT, q.double() @ packed_keys.mT) * scale
        weights = scores.masked_fill(~(dense | packed), -math.inf).softmax(-1).nan_to_num(0)
        on_dense, on_packed = weights * dense, weights * packed
        lengths = torch.where(dense, length_of(keys), length_of(packed_keys)) * (dense | packed)
        return Answer(
            on_dense @ values + on_packed @ packed_values,
            on_dense @ values.abs(),
            on_packed @ packed_values.abs(),
            (on_packed * length_of(packed_values)).amax(-1, keepdim=True),
            q.double().norm(dim=-1, keepdim=True) * lengths.amax(-1, keepdim=True) * abs(scale),
            self.length,
        )

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on; what comes in their place is new, and evicted only if that is owed."""
        if length == 0:
            return self.forget()
        assert self.keys is not None and self.values is not None
        assert self.packed_keys is not None and self.packed_values is not None
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.packed_keys, self.packed_values = self.packed_keys[:, :, :length], self.packed_values[:, :, :length]
        owed = self.dropped - min(self.dropped, max(self.left - self.sinks, 0))
        self.left, self.known = min(self.left, length), min(self.known, length)
        self.dropped = min(self.dropped, max(self.left - self.sinks, 0)) + owed

    def evict(self, tokens: int) -> None:
        """Forget the oldest columns after the sinks: those in the history, and then the next ones that leave."""
        self.dropped += tokens

    def rows(self, indices: list[int]) -> None:
        """Keep these rows, in this order."""
        assert self.keys is not None and self.values is not None
        assert self.packed_keys is not None and self.packed_values is not None
        self.keys, self.values = self.keys[indices], self.values[indices]
        self.packed_keys, self.packed_values = self.packed_keys[indices], self.packed_values[indices]
        self.padding = [self.padding[row] for row in indices]

    def to(self, dtype: torch.dtype) -> None:
        """Round what is dense to a dtype."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.to(dtype).double(), self.values.to(dtype).double()

    def copy(self) -> "Oracle":
        """Return a copy; no tensor here is ever written in place."""
        return copy.copy(self)


def length_of(vectors: Tensor) -> Tensor:
    """Return the length of each vector as ``[..., 1, tokens]``."""
    return vectors.norm(dim=-1)[..., None, :]
