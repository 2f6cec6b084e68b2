"""`DenseBuffer`: the newest tokens in a ring, and the first ones (sinks), unpruned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import pad

from swan.compiling import keep_in_place, outside_inference_mode
from swan.modules.state import CacheState, StaticState

__all__ = ["DenseBuffer", "Evicted", "StaticBuffer", "ring_columns"]

FEWEST = 8  # slots that the ring of a dynamic buffer begins with
NOWHERE = 2**62  # the column of an empty slot: later than every query, so no query sees it


class Evicted(NamedTuple):
    """Tokens that left a `DenseBuffer`, oldest first.

    Attributes:
        keys: ``[batch, kv_heads, tokens, d]``.
        values: ``[batch, kv_heads, tokens, dv]``.
        places: for a `StaticBuffer` the place of each token in the history, or -1 where the slot was
            empty; None for a dynamic buffer, whose tokens simply follow the last ones.
    """

    keys: Tensor
    values: Tensor
    places: Tensor | None


class DenseBuffer(nn.Module):
    """Keeps the newest `size` tokens and the first `sinks` tokens of each row, unpruned.

    The ring is written in place: token ``c`` of the sequence (its *column*) lies in slot
    ``c % size``. Until `size` tokens have come, it has memory for those that are there, and doubles when that is full.
    Sinks are the first tokens after each row's left padding; each is copied to a slot of its own at once,
    which counts as soon as the ring has lost it. Columns in the slots of ``DenseBuffer(4, sinks=1)``:

        after 3 tokens   sink -   ring 0 1 2 -    (0 is in the ring: its sink does not count yet)
        after 6 tokens   sink 0   ring 4 5 2 3    (1 was evicted)

    Args:
        size: tokens in the ring, at least 1.
        sinks: first tokens that never leave.
        state: the state that holds the tokens: that of a cache, or by default a new one.

    Raises:
        ValueError: `size` below 1 or `sinks` below 0.

    Example:
        >>> buffer = DenseBuffer(size=4, sinks=1)
        >>> k = v = torch.arange(6.0).view(1, 1, 6, 1)
        >>> buffer.push(k, v).keys.flatten()  # token 0 is the sink, tokens 2 to 5 stay
        tensor([1.])
        >>> buffer
        DenseBuffer(size=4, sinks=1)

    Source: the buffer is arXiv:2511.18936's; sinks are Xiao et al., arXiv:2309.17453.
    """

    def __init__(self, size: int = 128, sinks: int = 4, *, state: CacheState | None = None) -> None:
        super().__init__()
        if size < 1 or sinks < 0:
            raise ValueError(f"a buffer needs size >= 1 and sinks >= 0, got size={size}, sinks={sinks}")
        self.size, self.sinks = size, sinks
        self.state = self._new_state() if state is None else state

    @property
    def slots(self) -> int:
        """Slots of the ring that there is memory for."""
        values = self.state.v_recent  # which get theirs after the keys
        return 0 if values is None else values.shape[2] - self.sinks

    def slots_after(self, tokens: int) -> int:
        """Count the slots of the ring that there will be memory for after so many more tokens."""
        needed, slots = min(int(self.state.length) + tokens, self.size), self.slots
        return slots if needed <= slots else min(max(needed, 2 * slots, FEWEST), self.size)

    def reset(self) -> None:
        """Forget all tokens and free the memory."""
        self.state.reset()

    @outside_inference_mode
    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Take the memory that is missing for these keys and values."""
        state, slots = self.state, self.sinks + self.slots_after(k.shape[2])
        state.k_recent = _with_slots(state.k_recent, k, slots)
        state.v_recent = _with_slots(state.v_recent, v, slots)

    def push(self, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Evicted:
        """Take new tokens in and hand out those that have to leave.

        Args:
            k: ``[batch, kv_heads, tokens, d]``.
            v: ``[batch, kv_heads, tokens, dv]``.
            padding: ``[batch]``, left padding of each row in columns of the whole sequence.

        Returns:
            The evicted tokens (sinks are never among them where no row is padded).
        """
        state = self.state
        self.prepare(k, v, padding)
        assert state.k_recent is not None and state.v_recent is not None
        if self._lacks_sinks():
            source = self._sink_source(k.shape[2], k.device)
            for stored, new in ((state.k_recent, k), (state.v_recent, v)):
                _write_sinks(stored[:, :, : self.sinks], new, source)
        overwritten = [self._turn(t[:, :, self.sinks :], new) for t, new in ((state.k_recent, k), (state.v_recent, v))]
        evicted = self._evicted(*overwritten)
        self.count(k.shape[2])
        return evicted

    def prepare(self, k: Tensor, v: Tensor, padding: Tensor | None) -> None:
        """Have memory for keys and values like these, and remember their padding."""
        if self.slots < self.slots_after(k.shape[2]):
            self.allocate(k, v)
        if padding is not None:
            self._set_padding(padding)

    def count(self, tokens: int) -> None:
        """Count new tokens, and those that they push out."""
        state = self.state
        state.length = int(state.length) + tokens
        state.first = max(int(state.first), state.length - self.size)

    def columns(self) -> Tensor:
        """Return the column of the token in each slot, ``[batch or 1, sinks + slots]``; a token counts once.

        An empty slot, and the slot of a sink that is still in the ring too, have a column later than
        every query.
        """
        state = self.state
        assert state.k_recent is not None
        ring = ring_columns(state.length - 1, self.size, state.k_recent.device)[: self.slots]
        ring = torch.where(ring >= state.first, ring, NOWHERE)
        offsets = torch.arange(self.sinks, device=ring.device)[None]
        sinks = offsets if state.padding is None else state.padding[:, None] + offsets
        sinks = torch.where(sinks < state.first, sinks, NOWHERE)
        return torch.cat([sinks, repeat(ring, "slot -> row slot", row=sinks.shape[0])], dim=1)

    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on; tokens already evicted do not come back."""
        self._clear(length)
        state = self.state
        state.length, state.first = length, min(int(state.first), length)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return f"size={self.size}, sinks={self.sinks}"

    def _new_state(self) -> CacheState:
        return CacheState()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.state.convert(fn)
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]

    @torch.no_grad()
    def _clear(self, length: int) -> None:
        """Write zeros over the tokens from column `length` on.

        They would be hidden by a weight of 0, which does not hide infinity or NaN.
        """
        state, now = self.state, int(self.state.length)
        if state.k_recent is None or state.v_recent is None:
            return
        forgotten = torch.arange(max(length, now - self.size), now, device=state.k_recent.device)
        sinks = torch.arange(self.sinks, device=state.k_recent.device)[None]
        sinks = sinks if state.padding is None else sinks + state.padding[:, None]
        for stored in (state.k_recent, state.v_recent):
            stored.index_fill_(2, forgotten % self.size + self.sinks, 0)
            stored[:, :, : self.sinks].masked_fill_(rearrange(sinks >= length, "b s -> b 1 s 1"), 0)

    def _set_padding(self, padding: Tensor) -> None:
        padding = padding.to(torch.long, copy=True).contiguous()  # as kernels read it; the caller may reuse its own
        self.state.padding, self.state.padded = padding, int(padding.max()) if padding.numel() else 0

    def _lacks_sinks(self) -> bool:
        """Tell if a sink of some row may be among the new tokens."""
        return int(self.state.length) < self.state.padded + self.sinks

    def _sink_source(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Find each sink's place among the new tokens ``[batch or 1, sinks]``, and tell if it is there at all."""
        place = torch.arange(self.sinks, device=device)[None] - self.state.length
        if self.state.padding is not None:
            place = place + self.state.padding[:, None]
        return place.clamp(0, tokens - 1), (place >= 0) & (place < tokens)

    def _turn(self, ring: Tensor, new: Tensor) -> Tensor:
        """Write new tokens over the oldest slots; return the tokens that were there, oldest first."""
        tokens, size, length = new.shape[2], self.size, self.state.length
        slots = torch.arange(min(tokens, size), device=new.device)
        if tokens <= size:
            slots = (slots + length) % size
            old = ring.index_select(2, slots)
            ring.index_copy_(2, slots, new)
            return old
        old = torch.cat([ring.index_select(2, (slots + length) % size), new[:, :, : tokens - size]], dim=2)
        ring.index_copy_(2, (slots + length + tokens) % size, new[:, :, tokens - size :])
        return old

    def _evicted(self, k: Tensor, v: Tensor) -> Evicted:
        """Leave out sinks and the contents of empty slots; the first overwritten slot is column ``length - size``."""
        overwritten, leaving = int(self.state.length) - self.size, max(int(self.state.first), self.sinks)
        skip = min(max(leaving - overwritten, 0), k.shape[2])
        return Evicted(k[:, :, skip:], v[:, :, skip:], None)


class StaticBuffer(DenseBuffer):
    """A `DenseBuffer` for torch.compile: its counters are tensors, all slots are there at once, and no shape changes.

    Args:
        size: tokens in the ring, at least 1.
        sinks: first tokens that never leave.
        state: the state that holds the tokens: that of a cache, or by default a new one.

    Raises:
        ValueError: `size` below 1 or `sinks` below 0.

    Example:
        >>> buffer = StaticBuffer(size=4, sinks=1)
        >>> k = v = torch.arange(6.0).view(1, 1, 6, 1)
        >>> buffer.push(k, v).places  # four empty slots, the sink, and the first token after it
        tensor([-1, -1, -1, -1, -1,  0])

    Source: as of `DenseBuffer`.
    """

    def slots_after(self, tokens: int) -> int:
        """Return `size`."""
        return self.size

    @outside_inference_mode
    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Take the memory for keys and values like these, of however many tokens, and for the counters."""
        super().allocate(k, v)
        state = self.state
        state.length, state.first = (torch.zeros((), dtype=torch.long, device=k.device) for _ in range(2))
        state.padding = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
        keep_in_place(*state.tensors)

    def count(self, tokens: int) -> None:
        """Count new tokens, and those that they push out."""
        length, first = self.state.length, self.state.first
        assert isinstance(length, Tensor) and isinstance(first, Tensor)
        length.add_(tokens)
        first.copy_(torch.maximum(first, length - self.size))

    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on; tokens already evicted do not come back."""
        state = self.state
        if not isinstance(state.length, Tensor) or not isinstance(state.first, Tensor):
            return  # empty
        self._clear(length)
        state.length.fill_(length)
        state.first.clamp_(max=length)
        if length == 0 and state.padding is not None:
            state.padding.zero_()  # another sequence begins

    def _new_state(self) -> CacheState:
        return StaticState()

    def _set_padding(self, padding: Tensor) -> None:
        assert self.state.padding is not None
        self.state.padding.copy_(padding)

    def _lacks_sinks(self) -> bool:
        return self.sinks > 0  # always: compiled code cannot read the counter

    def _evicted(self, k: Tensor, v: Tensor) -> Evicted:
        state = self.state
        column = state.length - self.size + torch.arange(k.shape[2], device=k.device)
        real = (column >= state.first) & (column >= self.sinks)
        return Evicted(k, v, torch.where(real, column - self.sinks, -1))


def ring_columns(last: int | Tensor, size: int, device: torch.device) -> Tensor:
    """Return the column in each slot of a full ring ``[size]`` whose newest token is column `last`."""
    slots = torch.arange(size, device=device)
    return last - (last - slots) % size


def _with_slots(stored: Tensor | None, like: Tensor, slots: int) -> Tensor:
    """Return tokens with memory for so many; the new slots are empty."""
    if stored is None:
        return like.new_zeros(*like.shape[:2], slots, like.shape[3])
    return pad(stored, (0, 0, 0, slots - stored.shape[2]))


def _write_sinks(stored: Tensor, new: Tensor, source: tuple[Tensor, Tensor]) -> None:
    place, inside = (rearrange(t, "b s -> b 1 s 1") for t in source)
    place = place.expand(new.shape[0], new.shape[1], -1, new.shape[3])
    stored.copy_(torch.where(inside, new.gather(2, place), stored))
