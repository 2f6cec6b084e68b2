"""What a winnowed cache should hold and answer, in float64 and in plain words; nothing of swan is used here.

Every token stays here for ever, dense, at its *column*: its place in the whole sequence. The documented semantics say
what became of it:

- The newest `buffer` tokens are dense. A token that a newer one pushes out has *left*; it is packed at that moment.
- The first `sinks` tokens of each row, counted from the row's first real token, are dense for ever.
- A query sees the columns from its row's padding to its own, as they are when its token has come. In a chunk it sees
  them as they were when the first token of the chunk had come, and the tokens of the chunk dense.
- Evicted columns, and without a history all that have left, are not seen; while they are in the buffer they are.
- `crop` forgets the last columns. What has left stays packed, and the buffer holds fewer tokens until new ones come.

With `keep`, after each page of 64 columns that is full, every head drops packed tokens, those of the least score times
length of the value, until the share `keep` of all that have left is there; a row's padding goes first:

- The score of a token is a mean over pages, half of it the newest page. A page gives it the attention that it receives
  as tokens are stored at that moment, for each of the page's queries that comes after it. Of the pages that come at
  once the last four count; a page that was cropped into, after its queries had come, does not count.
- A score is stored as a byte `c`, which means `2 ** (c / 8 - 28)`.
- The tokens that stay move to the newest columns that have left, in their order. Heads differ, columns do not.
- What is evicted are such tokens too, as far as there are scores, and then the oldest.
- A token that no page has scored stays. Once tokens were chosen from, crop cannot go back behind that.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PAGE", "Answer", "Oracle", "mean_of"]

PAGE = 64
U32 = 2.0**-24


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
        queries: those of all columns, where tokens are dropped by score.
        scores: the least and the most that the bytes of scores may be ``[rows, kv_heads, tokens]``, or None.
        looked: pages before this column have been looked at.
        chosen: the columns before this one, as far as they are packed, were chosen from.
    """

    def __init__(self, buffer: int, sinks: int, *, windowed: bool, history: bool, keep: float | None = None) -> None:
        self.buffer, self.sinks, self.windowed, self.history, self.keep = buffer, sinks, windowed, history, keep
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.packed_keys: Tensor | None = None
        self.packed_values: Tensor | None = None
        self.queries: Tensor | None = None
        self.scores: tuple[Tensor, Tensor] | None = None
        self.padding: list[int] = []
        self.left = self.known = self.dropped = self.looked = self.chosen = 0

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def stored(self) -> range:
        """The columns in the packed history."""
        return range(self.sinks + self.dropped, self.left if self.history else 0)

    @property
    def scored(self) -> int:
        """How many of the stored tokens have a score; they are the oldest."""
        return 0 if self.scores is None else self.scores[0].shape[2]

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
        query = torch.arange(before, self.length)[:, None]
        turn = query if self.windowed else query[:1]  # of the token that was the newest when a query looked
        return self._seen(query, (turn + 1 - self.buffer).clamp(min=left), causal)

    def _seen(self, query: Tensor, left: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
        """Say what queries at some columns see dense and packed, where so many tokens had left for each."""
        column, start = torch.arange(self.length), torch.tensor(self.padding)[:, None, None]
        gone = column < left
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
        values, packed_values = (t.repeat_interleave(group, dim=1) for t in (self.values, self.packed_values))
        weights, largest_score = self._weights(q, dense, packed, scale)
        on_dense, on_packed = weights * dense, weights * packed
        return Answer(
            on_dense @ values + on_packed @ packed_values,
            on_dense @ values.abs(),
            on_packed @ packed_values.abs(),
            (on_packed * length_of(packed_values)).amax(-1, keepdim=True),
            largest_score,
            self.length,
        )

    def _weights(self, q: Tensor, dense: Tensor, packed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the weight of each column for each query, and the largest score that a query may have."""
        assert self.keys is not None and self.packed_keys is not None
        group, q = q.shape[1] // self.keys.shape[1], q.double()
        keys, packed_keys = (t.repeat_interleave(group, dim=1) for t in (self.keys, self.packed_keys))
        scores = torch.where(dense, q @ keys.mT, q @ packed_keys.mT) * scale
        weights = scores.masked_fill(~(dense | packed), -math.inf).softmax(-1).nan_to_num(0)
        lengths = torch.where(dense, length_of(keys), length_of(packed_keys)) * (dense | packed)
        return weights, q.norm(dim=-1, keepdim=True) * lengths.amax(-1, keepdim=True) * abs(scale)

    # Tokens that are dropped by score -------------------------------------------------------------

    def pieces(self, tokens: int) -> list[int]:
        """Split new tokens as a windowed cache does that drops some after each page."""
        if self.keep is None or not self.windowed:
            return [tokens]
        ends = [end for end in range(self.length + 1, self.length + tokens) if end % PAGE == 0]
        edges = [self.length, *ends, self.length + tokens]
        return [stop - start for start, stop in itertools.pairwise(edges)]

    def choices(self, tokens: int) -> list[int]:
        """Say what `chosen` will be before each of the pieces of new tokens."""
        found, after = [], self.copy()
        length = self.length
        for size in self.pieces(tokens):
            found.append(after.chosen)
            length += size
            after.left = max(after.left, length - self.buffer)
            kept = math.ceil((self.keep or 1) * max(after.left - self.sinks, 0))
            if length % PAGE == 0 and length > self.looked and len(after.stored) > kept:
                after.chosen, after.dropped = after.left, after.dropped + len(after.stored) - kept
        return found

    def look_back(self, q: Tensor, before: int, scale: float, error_of: Callable[[Tensor], Tensor]) -> int:
        """Score the stored tokens by the pages that the queries of the newest tokens fill.

        Args:
            q: those queries.
            before: tokens before them.
            scale: factor of products.
            error_of: how far products may be off, given the largest that a query may have.

        Returns:
            How many of the stored tokens are dropped now.
        """
        if self.keep is None:
            return 0
        earlier = q.double()[:, :, :0] if self.queries is None else self.queries[:, :, :before]
        self.queries = torch.cat([earlier, q.double()], 2)
        full = list(range(before // PAGE * PAGE, self.length - PAGE + 1, PAGE))[-4:]
        full = [first for first in full if first >= self.looked]
        for first in full:
            self._look_at(first, scale, error_of)
        surplus = len(self.stored) - math.ceil(self.keep * (len(self.stored) + self.dropped))
        return min(max(surplus, 0), self.scored) if full else 0

    def _look_at(self, first: int, scale: float, error_of: Callable[[Tensor], Tensor]) -> None:
        assert self.queries is not None and self.keys is not None
        self.looked = first + PAGE
        columns = torch.tensor([*self.stored])
        after = (first + PAGE - columns).clamp(0, PAGE)  # queries of the page that come after a token
        if not len(columns):
            return
        query = torch.arange(first, first + PAGE)[:, None]
        dense, packed = self._seen(query, torch.tensor(self.left))
        weights, largest = self._weights(self.queries[:, :, first : first + PAGE], dense, packed, scale)
        relative = torch.expm1(2 * error_of(largest)) + 2 * U32 * self.length
        received = [
            ((weights * packed)[..., columns] * factor).unflatten(1, (self.keys.shape[1], -1)).sum((2, 3))
            / after.clamp(min=1)
            for factor in ((1 - relative).clamp(min=0), 1 + relative)
        ]
        if self.scores is not None:
            for new, old in zip(received, self.scores, strict=True):
                new[:, :, : self.scored] = (new[:, :, : self.scored] + mean_of(old)) / 2
        count = max(int((after > 0).sum()), self.scored)
        low, high = (byte_of(mean[:, :, :count], sign * 1e-3) for mean, sign in zip(received, (-1, 1), strict=True))
        self.scores = low, high

    def choose(self, places: Tensor, scores: Tensor) -> None:
        """Keep the stored tokens at some places ``[rows, kv_heads, tokens]``, whose scores are known now."""
        assert self.packed_keys is not None and self.packed_values is not None
        before, self.scores = self.stored, (scores.double(), scores.double())
        self.dropped += len(before) - places.shape[2]
        self.chosen, after = self.left, self.stored
        for name in ("packed_keys", "packed_values"):
            packed = getattr(self, name).clone()
            index = places[..., None].expand(-1, -1, -1, packed.shape[3])
            packed[:, :, after.start : after.stop] = packed[:, :, before.start : before.stop].gather(2, index)
            setattr(self, name, packed)

    # Other changes --------------------------------------------------------------------------------

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
        self.looked = min(self.looked, -(-length // PAGE) * PAGE)
        self._cut_scores(0, len(self.stored))

    def evict(self, tokens: int) -> None:
        """Forget the oldest columns after the sinks: those in the history, and then the next ones that leave."""
        before = len(self.stored)
        self.dropped += tokens
        if tokens and self.scored:
            self.chosen = self.left
        self._cut_scores(before - len(self.stored), before)

    def _cut_scores(self, start: int, stop: int) -> None:
        if self.scores is not None:
            low, high = self.scores
            self.scores = low[:, :, start:stop], high[:, :, start:stop]

    def rows(self, indices: list[int]) -> None:
        """Keep these rows, in this order."""
        assert self.keys is not None and self.values is not None
        assert self.packed_keys is not None and self.packed_values is not None
        self.keys, self.values = self.keys[indices], self.values[indices]
        self.packed_keys, self.packed_values = self.packed_keys[indices], self.packed_values[indices]
        self.queries = None if self.queries is None else self.queries[indices]
        self.scores = None if self.scores is None else (self.scores[0][indices], self.scores[1][indices])
        self.padding = [self.padding[row] for row in indices]

    def to(self, dtype: torch.dtype) -> None:
        """Round what is dense to a dtype."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.to(dtype).double(), self.values.to(dtype).double()
            self.queries = None if self.queries is None else self.queries.to(dtype).double()

    def copy(self) -> "Oracle":
        """Return a copy; no tensor here is ever written in place."""
        return copy.copy(self)


def length_of(vectors: Tensor) -> Tensor:
    """Return the length of each vector as ``[..., 1, tokens]``."""
    return vectors.norm(dim=-1)[..., None, :]


def mean_of(score: Tensor) -> Tensor:
    """Return the mean attention that a byte means."""
    return 2 ** (score.double() / 8 - 28)


def byte_of(mean: Tensor, slack: float) -> Tensor:
    """Return the byte of a mean attention, which is off by a part of a step."""
    return ((mean.clamp(min=2.0**-28).log2() + 28) * 8 + slack).round().clamp(0, 255)
