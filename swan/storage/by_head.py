"""`ByHead`: the KV heads of a layer, each in a layout of its own."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from swan.storage.graded import Graded
from swan.storage.layout import LayerPlan, Layout, keep_derived
from swan.storage.packed import Packed, unpack

__all__ = ["BY_HEAD", "ByHead", "Run", "at_places", "by_head", "in_runs", "parts_of", "share_of"]


BY_HEAD = 2  # the first of `ByHead.numbers`


class Run(NamedTuple):
    """Neighbouring KV heads in one layout: those from `start` to before `stop`."""

    start: int
    stop: int
    layout: Graded


@dataclass(frozen=True)
class ByHead:
    """The layout of a layer whose KV heads have layouts of their own: those in which errors do more harm, more bits.

    Neighbouring heads of one layout are a *run*, whose tensors lie together: ``[batch, heads of the run, tokens,
    bytes]``.

    Args:
        layouts: the layout of each KV head, of one head dimension.

    Raises:
        TypeError: some layout is not `Graded`.
        ValueError: there is no layout, or head dimensions differ.

    Example:
        >>> from swan import Graded, pack
        >>> layout = ByHead((Graded(((64, 4),)), Graded(((64, 4),)), Graded(((32, 4), (32, 2)))))
        >>> [(run.start, run.stop) for run in layout.runs]
        [(0, 2), (2, 3)]
        >>> layout.vector_bytes()  # on average over the heads
        30.666666666666668
        >>> pack(torch.randn(1, 3, 100, 64), layout).shape
        (1, 3, 100, 64)

    Source: this library; the heads of a layer compete for bits as layers do, see `Plan`.
    """

    form: ClassVar[str] = "by-head"

    layouts: tuple[Graded, ...]

    # Derived from the layouts once for each instance, as those of `Graded` are.
    kv_heads: ClassVar[int]
    runs: ClassVar[tuple[Run, ...]]
    numbers: ClassVar[list[int]]  # the layout as kernels take it: 2, then for each run its heads, a count, its numbers
    if TYPE_CHECKING:

        @property
        def d(self) -> int:
            """Head dimension."""
            ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "layouts", tuple(self.layouts))
        if not all(isinstance(layout, Graded) for layout in self.layouts):
            raise TypeError(f"each KV head has a Graded layout, got {self.layouts}")
        dims = [layout.d for layout in self.layouts]
        if len(set(dims)) != 1:
            raise ValueError(f"give a layout for each KV head, all of one head dimension; got dimensions {dims}")
        ends = [i + 1 for i, (a, b) in enumerate(itertools.pairwise(self.layouts)) if a != b]
        edges = itertools.pairwise([0, *ends, len(self.layouts)])
        runs, numbers = tuple(Run(*edge, self.layouts[edge[0]]) for edge in edges), [BY_HEAD]
        for run in runs:
            numbers += [run.stop - run.start, len(run.layout.numbers), *run.layout.numbers]
        keep_derived(self, d=dims[0], kv_heads=len(dims), runs=runs, numbers=numbers)

    def vector_bytes(self, itemsize: int = 2) -> float:
        """Count the bytes that one vector takes in a cache whose dtype has `itemsize` bytes, on average over heads."""
        return sum(layout.vector_bytes(itemsize) for layout in self.layouts) / len(self.layouts)

    def pack(self, x: Tensor) -> Packed:
        """Store the heads of each run in its layout."""
        return self.join([run.layout.pack(x[:, run.start : run.stop]) for run in self.runs])

    def join(self, parts: Sequence[Packed]) -> Packed:
        """Return what all runs store as one: their tensors are its planes, one run after the other."""
        return Packed(tuple([t for part in parts for t in part.tensors]), None, None, self, parts[0].dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the vectors in their own coordinates: each run has another mix."""
        return torch.cat([unpack(part) for part in parts_of(packed)], dim=1)

    def mix(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: `unpack` undoes the mixes."""


def by_head(layouts: Sequence[Graded]) -> Layout:
    """Return the layout of a layer whose KV heads have these layouts: a `ByHead` only if they differ."""
    return ByHead(tuple(layouts)) if len(set(layouts)) > 1 else layouts[0]


def parts_of(packed: Packed) -> list[Packed]:
    """Return what each run of KV heads stores: views of a `Packed` in the layout `ByHead`, else itself."""
    layout = packed.format
    if not isinstance(layout, ByHead):
        return [packed]
    parts, first = [], 0
    for run in layout.runs:
        coded = run.layout.row_bytes > 0
        stop = first + coded + run.layout.whole
        scales = packed.planes[stop] if coded else None
        parts.append(Packed(packed.planes[first:stop], scales, None, run.layout, packed.dtype))
        first = stop + coded
    return parts


def in_runs(k: Packed, v: Packed) -> list[tuple[slice, Packed, Packed]]:
    """Cut keys and values where the layout of either changes; return KV heads, keys and values of each piece."""
    sides = [_with_edges(k), _with_edges(v)]
    edges = sorted({0, k.shape[1], *(start for side in sides for start, _ in side)})
    pieces = []
    for start, stop in itertools.pairwise(edges):
        cut = []
        for side in sides:
            first, part = [each for each in side if each[0] <= start][-1]
            heads = slice(start - first, stop - first)
            cut.append(part.map(lambda t, heads=heads: t[:, heads]))
        pieces.append((slice(start, stop), *cut))
    return pieces


def _with_edges(packed: Packed) -> list[tuple[int, Packed]]:
    """Return what each run stores with its first KV head."""
    starts = [run.start for run in packed.format.runs] if isinstance(packed.format, ByHead) else [0]
    return list(zip(starts, parts_of(packed), strict=True))


def share_of(layer: LayerPlan, rank: int, ranks: int) -> LayerPlan:
    """Return the layouts of the KV heads that a rank has: equal shares, in their order."""

    def share(layout: Layout) -> Layout:
        if not isinstance(layout, ByHead):
            return layout
        count = layout.kv_heads // ranks
        return by_head(layout.layouts[rank * count : (rank + 1) * count])

    return LayerPlan(share(layer.keys), share(layer.values))


def at_places(packed: Packed, places: Tensor) -> Packed:
    """Return the tokens at some places of each row and KV head ``[batch, kv_heads, chosen]``."""
    layout = packed.format
    if isinstance(layout, ByHead):
        runs = zip(parts_of(packed), layout.runs, strict=True)
        return layout.join([at_places(part, places[:, run.start : run.stop]) for part, run in runs])
    index = places[..., None]
    return packed.map(lambda t: t.gather(2, index.expand(-1, -1, -1, t.shape[3])))
