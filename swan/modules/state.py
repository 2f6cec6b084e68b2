"""`CacheState`: every tensor and counter of the cache of one layer, named once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swan.compiling import keep_in_place, outside_inference_mode
from swan.storage import LayerPlan, Layout, Packed

__all__ = ["CacheState", "StaticState"]

# Names in files and state dicts, with the fields that they stand for.
COUNTERS = ("length", "first", "padded", "dropped")
KEPT = ("observed", "chosen")  # counters of a cache that keeps the best tokens; others have none
PAGE = 64  # queries between two looks of such a cache at its history
RECENT = {"keys": "k_recent", "values": "v_recent", "padding": "padding", "queries": "queries", "scores": "scores"}
HISTORIES = {"k": "k_history", "v": "v_history"}


@dataclass
class CacheState:
    """The tensors and counters of one cache; a `KVCache`, its `DenseBuffer` and its `History` share one object.

    A token's *column* is its place in the whole sequence.

    Attributes:
        k_recent: dense keys ``[batch, kv_heads, sinks + slots, d]``: the sinks, then the ring of the buffer, or the
            part of it that there is memory for yet.
        v_recent: dense values ``[batch, kv_heads, sinks + slots, dv]``.
        padding: left padding of each row ``[batch]``; None where no row is padded.
        k_history: packed keys, with room for more tokens than are stored.
        v_history: packed values, likewise.
        length: tokens seen.
        first: the oldest column in the ring; the history has the columns from ``sinks + dropped`` to before it.
        padded: the most left padding of a row: after so many columns and the sinks, no row has a sink left to write.
        dropped: tokens after the sinks that the history does not keep.
        queries: the newest queries, a page that is being filled ``[batch, heads, page, d]``; None where no token is
            dropped by its score.
        scores: score of each token of the history that a page has seen, ``[batch, kv_heads, tokens]``, uint8.
        observed: columns whose queries are in the scores.
        chosen: the history before this column was chosen from: it is no longer that of all tokens.
        asked: the column after the newest query in `queries`.

    Example:
        >>> import swan
        >>> cache = swan.KVCache(swan.LayerPlan(swan.TopK(64, 40), swan.TopK(64, 24)), buffer=16)
        >>> _ = cache.update(*torch.randn(2, 1, 2, 100, 64))
        >>> cache.state.k_recent.shape, cache.state.k_history.shape, cache.state.first
        (torch.Size([1, 2, 20, 64]), (1, 2, 192, 64), 84)
    """

    k_recent: Tensor | None = None
    v_recent: Tensor | None = None
    padding: Tensor | None = None
    k_history: Packed | None = None
    v_history: Packed | None = None
    length: int | Tensor = 0
    first: int | Tensor = 0
    padded: int = 0
    dropped: int = 0
    queries: Tensor | None = None
    scores: Tensor | None = None
    observed: int = 0
    chosen: int = 0
    asked: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        values = (self.k_recent, self.v_recent, self.padding, self.length, self.first, self.queries, self.scores)
        histories = [t for p in (self.k_history, self.v_history) if p is not None for t in p.tensors]
        return [t for t in values if isinstance(t, Tensor)] + histories

    def is_empty(self) -> bool:
        """Tell if there are surely no tokens."""
        return int(self.length) == 0

    def observed_from(self) -> int:
        """Return the column from which pages of queries are looked at: those after a token that nobody asked for."""
        length = int(self.length)
        return self.observed if self.asked >= length else max(self.observed, -(-length // PAGE) * PAGE)

    def before(self) -> tuple[int | Tensor, int | Tensor]:
        """Return `length` and `first` as they are now; later counting does not change them."""
        return self.length, self.first

    def reset(self) -> None:
        """Forget everything and free the memory."""
        vars(self).update(vars(type(self)()))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by `fn` of it, one field after the other: only one of them exists twice."""
        self._replace(fn, lambda packed: packed.map(fn))

    def apply_to_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to all tensors with a batch axis: select, repeat or reorder rows."""
        self.apply(lambda t: fn(t) if t.ndim else t)

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply the `fn` by which ``nn.Module.to``, ``half`` and the like change the device or dtype of parameters.

        Packed values in the dtype of the cache follow it; codes and their scales keep theirs.
        """
        self._replace(fn, lambda packed: _converted(packed, fn))

    def to_dict(self, stored: int) -> dict[str, Tensor]:
        """Return tensors and counters by name, all as tensors, without room ahead of the `stored` history tokens."""
        if self.k_recent is None and not self.dropped:
            return {}
        counters = COUNTERS if self.queries is None else (*COUNTERS, *KEPT)
        tensors: dict[str, Tensor | None] = {name: _counter(getattr(self, name)) for name in counters}
        if self.queries is not None:
            tensors["observed"] = _counter(self.observed_from())
        tensors |= {name: getattr(self, field) for name, field in RECENT.items()}
        for side, field in HISTORIES.items():
            if (history := getattr(self, field)) is not None:
                packed = history.tokens(0, stored)
                tensors |= {f"{side}.plane{i}": plane for i, plane in enumerate(packed.planes)}
                tensors |= {f"{side}.scales": packed.scales, f"{side}.positions": packed.positions}
        return {name: t for name, t in tensors.items() if t is not None}

    @outside_inference_mode
    def from_dict(self, tensors: dict[str, Tensor], plan_layer: LayerPlan | None) -> None:
        """Take copies of the tensors that `to_dict` returned for the same layouts."""
        counters = tensors.keys() & {*COUNTERS, *KEPT}
        for name in counters:
            setattr(self, name, int(tensors[name]))
        self.asked = int(self.length)
        copies = {name: t.clone() for name, t in tensors.items() if name not in counters}
        for name, field in RECENT.items():
            setattr(self, field, copies.get(name))
        if plan_layer is not None and "k.plane0" in copies:
            self.k_history = _packed(copies, "k", plan_layer.keys)
            self.v_history = _packed(copies, "v", plan_layer.values)

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Take the fields of a pickled or copied state, also where that was done in inference mode."""
        vars(self).update(fields)
        CacheState.apply(self, lambda t: t.clone() if t.is_inference() else t)

    @outside_inference_mode
    def _replace(self, of_tensor: Callable[[Tensor], Tensor], of_packed: Callable[[Packed], Packed]) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Packed):
                setattr(self, name, of_packed(value))
            elif isinstance(value, Tensor):
                setattr(self, name, of_tensor(value))


@dataclass
class StaticState(CacheState):
    """A state whose tensors stay where they are, counters as tensors: compiled code writes into them."""

    def is_empty(self) -> bool:
        """Tell if there are surely no tokens. Compiled code cannot read the counter, so there this returns False."""
        return not torch.compiler.is_compiling() and super().is_empty()

    def before(self) -> tuple[int | Tensor, int | Tensor]:
        """Return copies of `length` and `first`, because counting changes those in place."""
        length, first = self.length, self.first
        assert isinstance(length, Tensor) and isinstance(first, Tensor)
        return length.clone(), first.clone()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Write `fn` of each tensor into it where the shape stays."""

        def written(t: Tensor) -> Tensor:
            new = fn(t)
            return t.copy_(new) if new.shape == t.shape else new

        super().apply(written)
        keep_in_place(*self.tensors)

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` as a `CacheState` does; the new tensors stay where they are from then on."""
        super().convert(fn)
        keep_in_place(*self.tensors)

    def from_dict(self, tensors: dict[str, Tensor], plan_layer: LayerPlan | None) -> None:
        """Copy the tensors that `to_dict` returned into the memory that was taken."""
        source = CacheState()
        source.from_dict(tensors, plan_layer)
        for name, target in vars(self).items():
            new = getattr(source, name)
            if isinstance(target, Packed) and new is not None:
                for room, stored in zip(target.tensors, new.tensors, strict=True):
                    room[:, :, : stored.shape[2]].copy_(stored)
            elif isinstance(target, Tensor):
                new = _counter(0 if new is None else new)
                room = target[:, :, : new.shape[2]] if name in ("k_recent", "v_recent") else target
                room.copy_(new)


def _counter(value: int | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def _converted(packed: Packed, fn: Callable[[Tensor], Tensor]) -> Packed:
    def moved(t: Tensor) -> Tensor:  # viewed as bytes, so that `fn` does not change the dtype
        return fn(t.view(torch.uint8)).view(t.dtype)

    planes = tuple([fn(plane) if plane.dtype == packed.dtype else moved(plane) for plane in packed.planes])
    scales, positions = (None if t is None else moved(t) for t in (packed.scales, packed.positions))
    dtype = fn(torch.empty(0, dtype=packed.dtype, device=packed.device)).dtype
    return Packed(planes, scales, positions, packed.format, dtype)


def _packed(tensors: dict[str, Tensor], side: str, layout: Layout) -> Packed:
    count = sum(name.startswith(f"{side}.plane") for name in tensors)
    planes = tuple([tensors[f"{side}.plane{i}"] for i in range(count)])
    dtype = tensors["keys"].dtype
    return Packed(planes, tensors.get(f"{side}.scales"), tensors.get(f"{side}.positions"), layout, dtype)
