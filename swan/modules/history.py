"""`History`: the packed tokens of a cache, in memory that grows with them or is taken at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from swan.compiling import keep_in_place, outside_inference_mode
from swan.functional.dispatch import Impl, pack_impl, store_kernel, take_in_kernel
from swan.functional.packing import pack
from swan.modules.buffer import Evicted
from swan.modules.state import CacheState
from swan.storage import LayerPlan, Layout, Packed, unpack
from swan.storage.by_head import at_places

__all__ = ["BLOCK", "History", "StaticHistory", "grown"]

Packer = Callable[[Tensor, Layout], Packed]
BLOCK = 64  # histories are allocated in multiples of this many tokens, which kernels read at a time
TILE = 1024  # tokens that are packed at a time


class History:
    """The tokens that left the buffer, packed, in memory that grows with them.

    Args:
        plan_layer: layouts of keys and values; None keeps no token.
        state: that of the cache.
        sinks: first tokens of the sequence, which are not stored here.
    """

    def __init__(self, plan_layer: LayerPlan | None, state: CacheState, sinks: int) -> None:
        self.plan_layer, self.state, self.sinks = plan_layer, state, sinks

    @property
    def start(self) -> int:
        """The column of its first token."""
        return self.sinks + self.state.dropped

    @property
    def length(self) -> int:
        """Tokens stored."""
        return 0 if self.plan_layer is None else max(int(self.state.first) - self.start, 0)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return 0 if self.state.k_history is None else self.state.k_history.shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors beside those of the state."""
        return []

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Take memory ahead for keys and values like these; a growing history takes none."""

    def packers(self, k: Tensor, v: Tensor, impl: Impl) -> tuple[Packer, Packer]:
        """Choose the functions that pack keys and values.

        Raises:
            ValueError: `impl` is unknown, or cannot store the layouts here.
        """
        layouts = (None, None) if self.plan_layer is None else (self.plan_layer.keys, self.plan_layer.values)
        return store_kernel(pack_impl(impl, k, layouts[0])), store_kernel(pack_impl(impl, v, layouts[1]))

    def kernel(self, k: Tensor, v: Tensor, impl: Impl) -> Callable[..., None] | None:
        """Return the kernel that stores new tokens in buffer and history; None where the buffer hands them to `append`.

        Raises:
            ValueError: `impl` is unknown, or cannot store the layouts here.
        """
        return take_in_kernel(impl, k, v, self.plan_layer)

    def append(self, evicted: Evicted, impl: Impl = "auto") -> None:
        """Pack tokens that the buffer hands over; it has counted them out, so `length` has them already."""
        k, v, _ = evicted
        plan_layer, tokens = self.plan_layer, k.shape[2]
        if plan_layer is None or tokens == 0:
            return
        pack_k, pack_v = self.packers(k, v, impl)
        after = self.length
        skipped = max(tokens - after, 0)  # the first ones may be dropped already
        self.reserve(k, v)
        for start in range(skipped, tokens, TILE):
            tile, place = slice(start, start + TILE), after - tokens + start
            self._write(pack_k(k[:, :, tile], plan_layer.keys), pack_v(v[:, :, tile], plan_layer.values), place)

    def reserve(self, k: Tensor, v: Tensor) -> None:
        """Have room for all tokens that the buffer has counted out; `k` and `v` are like them."""
        state, plan_layer, tokens = self.state, self.plan_layer, self.length
        if plan_layer is None or self.capacity >= tokens:
            return
        capacity = grown(tokens)
        if state.k_history is None or state.v_history is None:
            state.k_history = _empty(k, plan_layer.keys, capacity)
            state.v_history = _empty(v, plan_layer.values, capacity)
            return
        state.k_history = _resized(state.k_history, capacity)
        state.v_history = _resized(state.v_history, capacity)

    def until(self, column: int | None) -> tuple[Packed | None, Packed | None]:
        """Return keys and values before a column; for None all that there is room for."""
        k, v = self.state.k_history, self.state.v_history
        if k is None or v is None or column is None:
            return k, v
        stop = column - self.start
        return (k.tokens(0, stop), v.tokens(0, stop)) if stop > 0 else (None, None)

    def repack(self, plan_layer: LayerPlan) -> None:
        """Move all tokens to other layouts, keys and values one after the other."""
        state, stored = self.state, self.length
        if state.k_history is not None and state.v_history is not None:
            state.k_history = _repacked(state.k_history, plan_layer.keys, stored)
            state.v_history = _repacked(state.v_history, plan_layer.values, stored)
        self.plan_layer = plan_layer

    def evict(self, tokens: int) -> None:
        """Forget the oldest tokens and free their memory."""
        state, stored = self.state, self.length
        state.dropped += tokens
        remaining = self.length
        if tokens and state.k_history is not None and state.v_history is not None:
            capacity = min(self.capacity, grown(remaining))
            start = stored - remaining
            state.k_history = _resized(state.k_history.tokens(start, stored), capacity) if remaining else None
            state.v_history = _resized(state.v_history.tokens(start, stored), capacity) if remaining else None
        if state.scores is not None:
            state.scores = state.scores[:, :, stored - remaining :].clone()

    def choose(self, places: Tensor) -> None:
        """Keep the tokens at some places of each row and KV head ``[batch, kv_heads, kept]``, in their order."""
        state, kept = self.state, places.shape[2]
        state.dropped += self.length - kept
        state.chosen = self.start + kept
        capacity = min(self.capacity, grown(kept))
        for name in ("k_history", "v_history"):
            chosen = at_places(getattr(state, name), places)
            setattr(state, name, _resized(chosen, capacity) if kept else None)

    def crop(self, first: int) -> None:
        """Forget the tokens that the buffer's `crop` has uncounted, up to column `first`; they are not read again."""

    def _write(self, k: Packed, v: Packed, place: int) -> None:
        assert self.state.k_history is not None and self.state.v_history is not None
        _put(self.state.k_history, k, place)
        _put(self.state.v_history, v, place)


class StaticHistory(History):
    """A `History` whose memory is taken at once and never moves, for torch.compile.

    Args:
        plan_layer: layouts of keys and values; None keeps no token.
        state: that of the cache.
        sinks: first tokens of the sequence, which are not stored here.
        room: tokens that it can hold; a slot behind them takes the contents of empty slots.
    """

    def __init__(self, plan_layer: LayerPlan | None, state: CacheState, sinks: int, room: int) -> None:
        super().__init__(plan_layer, state, sinks)
        self.room = room

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Take the memory for keys and values like these."""
        if self.plan_layer is not None:
            capacity = -(-(self.room + 1) // BLOCK) * BLOCK
            self.state.k_history = _empty(k, self.plan_layer.keys, capacity)
            self.state.v_history = _empty(v, self.plan_layer.values, capacity)
            keep_in_place(*self.state.tensors)

    def reserve(self, k: Tensor, v: Tensor) -> None:
        """Do nothing: all the room there is was taken at once."""

    def append(self, evicted: Evicted, impl: Impl = "auto") -> None:
        """Pack tokens that the buffer hands over, each to its place."""
        k, v, places = evicted
        plan_layer, state = self.plan_layer, self.state
        if plan_layer is None or k.shape[2] == 0:
            return
        assert places is not None and state.k_history is not None and state.v_history is not None
        pack_k, pack_v = self.packers(k, v, impl)
        places = torch.where(places < 0, self.room, places)
        packed_k, packed_v = pack_k(k, plan_layer.keys), pack_v(v, plan_layer.values)
        for history, new in ((state.k_history, packed_k), (state.v_history, packed_v)):
            for target, source in zip(history.tensors, new.tensors, strict=True):
                target.index_copy_(2, places, source)

    def repack(self, plan_layer: LayerPlan) -> None:
        """Move all tokens to other layouts, in memory that stays where it is from then on."""
        super().repack(plan_layer)
        keep_in_place(*self.state.tensors)

    def crop(self, first: int) -> None:
        """Write zeros over the tokens that the buffer's `crop` has uncounted, up to column `first`.

        All room is read, with weights of 0 where there is no token. The slot behind it takes the contents of a cleared
        slot of the ring before it is read again.
        """
        for history in (self.state.k_history, self.state.v_history):
            for t in () if history is None else history.tensors:
                t[:, :, self.length : max(first - self.start, 0)].zero_()

    def evict(self, tokens: int) -> None:
        """Refuse: the memory would not shrink."""
        raise ValueError("a static cache keeps all its tokens; evict them from a dynamic one")


def grown(tokens: int) -> int:
    """Return the capacity for so many tokens: with room ahead, so that few steps move the history; 0 for none."""
    return -(-(tokens + max(BLOCK, tokens // 32)) // BLOCK) * BLOCK if tokens else 0


def _empty(like: Tensor, layout: Layout, capacity: int) -> Packed:
    """Make an empty history with room for `capacity` vectors like these."""
    return _resized(layout.pack(like.new_zeros(*like.shape[:2], 1, layout.d)).tokens(0, 0), capacity)


@outside_inference_mode
def _resized(history: Packed, capacity: int) -> Packed:
    """Return a history with room for `capacity` tokens that begins with those of another."""

    def resize(t: Tensor) -> Tensor:
        new = t.new_zeros(t.shape[0], t.shape[1], capacity, t.shape[3])
        new[:, :, : t.shape[2]] = t
        return new

    return history.map(resize)


def _repacked(history: Packed, layout: Layout, stored: int) -> Packed:
    if layout == history.format:
        return history
    new = _resized(layout.pack(unpack(history.tokens(0, 1))).tokens(0, 0), history.shape[2])
    for start in range(0, stored, TILE):
        tile = pack(unpack(history.tokens(start, min(start + TILE, stored))), layout)
        _put(new, tile, start)
    return new


def _put(history: Packed, new: Packed, place: int) -> None:
    """Write tokens into a history, from a place on."""
    for target, source in zip(history.tensors, new.tensors, strict=True):
        target[:, :, place : place + source.shape[2]] = source
