"""`DenseBuffer`: the newest tokens in a ring, and the first ones (sinks), unpruned."""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from swan.compiling import keep_in_place

__all__ = ["DenseBuffer", "Evicted"]

NOWHERE = 2**62  # the column of a slot that holds nothing: later than every query


class Evicted(NamedTuple):
    """Tokens that left a `DenseBuffer`, oldest first.

    Attributes:
        keys: ``[batch, kv_heads, tokens, d]``.
        values: ``[batch, kv_heads, tokens, dv]``.
        places: for a static buffer the place of each token after the sinks, or -1 where the slot
            held nothing; None for a dynamic buffer, whose tokens simply follow the last ones.
    """

    keys: Tensor
    values: Tensor
    places: Tensor | None


class DenseBuffer(nn.Module):
    """Keeps the newest `size` tokens and the first `sinks` tokens of each row, unpruned.

    The ring is written in place: token ``c`` of the sequence (its *column*) lies in slot
    ``c % size``. Sinks are the first tokens after each row's left padding.

    Args:
        size: tokens in the ring, at least 1.
        sinks: first tokens kept for ever.
        static: keep counters as tensors and never change a shape, for torch.compile.

    Raises:
        ValueError: `size` below 1 or `sinks` below 0.

    Example:
        >>> buffer = DenseBuffer(size=4, sinks=1)
        >>> k = v = torch.arange(6.0).view(1, 1, 6, 1)
        >>> buffer.push(k, v).keys.flatten()  # token 0 is the sink, tokens 2 to 5 stay
        tensor([1.])
        >>> buffer
        DenseBuffer(size=4, sinks=1, static=False)

    Source: the buffer is arXiv:2511.18936's; sinks are Xiao et al., arXiv:2309.17453.
    """

    def __init__(self, size: int = 128, sinks: int = 4, *, static: bool = False) -> None:
        super().__init__()
        if size < 1 or sinks < 0:
            raise ValueError(f"a buffer needs size >= 1 and sinks >= 0, got size={size}, sinks={sinks}")
        self.size, self.sinks, self.static = size, sinks, static
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and free the memory."""
        self.keys: Tensor | None = None  # [batch, kv_heads, sinks + size, d]: sinks, then the ring
        self.values: Tensor | None = None
        self.length: int | Tensor = 0  # tokens seen
        self.first: int | Tensor = 0  # the oldest column in the ring
        self.padding: Tensor | None = None  # [batch], left padding of each row; None = no padding
        self.sinks_end = self.sinks  # column after which no row has a sink left to write (dynamic)

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Take the memory for keys and values like these, of however many tokens."""
        slots = self.sinks + self.size
        self.keys = k.new_zeros(*k.shape[:2], slots, k.shape[3])
        self.values = v.new_zeros(*v.shape[:2], slots, v.shape[3])
        if self.static:
            self.length = torch.zeros((), dtype=torch.long, device=k.device)
            self.first = torch.zeros((), dtype=torch.long, device=k.device)
            self.padding = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
            keep_in_place(self.keys, self.values, self.length, self.first, self.padding)

    def push(self, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Evicted:
        """Take new tokens in and hand out those that have to leave.

        Args:
            k: ``[batch, kv_heads, tokens, d]``.
            v: ``[batch, kv_heads, tokens, dv]``.
            padding: ``[batch]``, left padding of each row in columns of the whole sequence.

        Returns:
            The evicted tokens (sinks are never among them where no row is padded).
        """
        if self.keys is None or self.values is None:
            self.allocate(k, v)
            assert self.keys is not None and self.values is not None
        if padding is not None:
            self._set_padding(padding)
        tokens, length = k.shape[2], self.length
        if self.sinks and (self.static or int(length) < self.sinks_end):
            source = self._sink_source(tokens, k.device)
            for stored, new in ((self.keys, k), (self.values, v)):
                _write_sinks(stored[:, :, : self.sinks], new, source)
        k_out, v_out = self._turn(self.keys[:, :, self.sinks :], k), self._turn(self.values[:, :, self.sinks :], v)
        evicted = self._evicted(k_out, v_out, length)
        if isinstance(self.length, Tensor) and isinstance(self.first, Tensor):
            self.length.add_(tokens)
            self.first.copy_(torch.maximum(self.first, self.length - self.size))
        else:
            self.length = int(self.length) + tokens
            self.first = max(int(self.first), self.length - self.size)
        return evicted

    def columns(self) -> Tensor:
        """The column that each slot holds, ``[batch or 1, sinks + size]``; a token counts once.

        A slot that holds nothing, and a sink that is still in the ring, have a column later than
        every query.
        """
        assert self.keys is not None
        device = self.keys.device
        slots = torch.arange(self.size, device=device)
        last = self.length - 1
        ring = last - (last - slots) % self.size
        ring = torch.where(ring >= self.first, ring, NOWHERE)
        offsets = torch.arange(self.sinks, device=device)[None]
        sinks = offsets if self.padding is None else self.padding[:, None] + offsets
        sinks = torch.where(sinks < self.first, sinks, NOWHERE)
        return torch.cat([sinks, repeat(ring, "slot -> row slot", row=sinks.shape[0])], dim=1)

    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on; tokens already evicted do not come back."""
        if isinstance(self.length, Tensor) and isinstance(self.first, Tensor):
            self.length.fill_(length)
            self.first.clamp_(max=length)
            if length == 0 and self.padding is not None:
                self.padding.zero_()  # another sequence begins
        else:
            self.length, self.first = length, min(int(self.first), length)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"size={self.size}, sinks={self.sinks}, static={self.static}"

    def _set_padding(self, padding: Tensor) -> None:
        if self.static:
            assert self.padding is not None
            self.padding.copy_(padding)
        else:
            self.padding = padding
            self.sinks_end = int(padding.max()) + self.sinks

    def _sink_source(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each sink its place among the new tokens ``[batch or 1, sinks]``, and whether it is there."""
        place = torch.arange(self.sinks, device=device)[None] - self.length
        if self.padding is not None:
            place = place + self.padding[:, None]
        return place.clamp(0, tokens - 1), (place >= 0) & (place < tokens)

    def _turn(self, ring: Tensor, new: Tensor) -> Tensor:
        """Write new tokens over the oldest slots; returns what the slots held, oldest first."""
        tokens, size = new.shape[2], self.size
        slots = torch.arange(min(tokens, size), device=new.device)
        if tokens <= size:
            slots = (slots + self.length) % size
            old = ring.index_select(2, slots)
            ring.index_copy_(2, slots, new)
            return old
        old = torch.cat([ring.index_select(2, (slots + self.length) % size), new[:, :, : tokens - size]], dim=2)
        ring.index_copy_(2, (slots + self.length + tokens) % size, new[:, :, tokens - size :])
        return old

    def _evicted(self, k: Tensor, v: Tensor, length: int | Tensor) -> Evicted:
        """Of what the slots held, columns ``length - size`` on, the tokens that the ring really had."""
        if isinstance(length, Tensor):
            column = length - self.size + torch.arange(k.shape[2], device=k.device)
            held = (column >= self.first) & (column >= self.sinks)
            return Evicted(k, v, torch.where(held, column - self.sinks, -1))
        skip = min(max(max(int(self.first), self.sinks) - (length - self.size), 0), k.shape[2])
        return Evicted(k[:, :, skip:], v[:, :, skip:], None)


def _write_sinks(stored: Tensor, new: Tensor, source: tuple[Tensor, Tensor]) -> None:
    place, inside = (rearrange(t, "b s -> b 1 s 1") for t in source)
    place = place.expand(new.shape[0], new.shape[1], -1, new.shape[3])
    stored.copy_(torch.where(inside, new.gather(2, place), stored))
