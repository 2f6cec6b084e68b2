"""Pages of a server's cache: so many tokens of one layer, as `swan.pack` stores them.

A server keeps its cache in pages of equal size and says for each sequence which pages hold it (its block table). A page
here holds the packed keys and values of all KV heads of a layer; of each head one *plane* after the other: codes of the
keys, their numbers of 16 bits, the same of the values, scales of the keys, of the values; and its first tokens once
more, dense. So the rows of a plane follow each other as in `Packed`, byte for byte, and a pool of pages is a `Packed`
whose batch axis counts pages.

Of the dense first tokens only those in the first page of a sequence are read: they are its sinks. They are in all pages
because pages are alike, and a page does not know which of a sequence it is.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from swan.functional.dispatch import store_in_pages_kernel
from swan.functional.packing import pack
from swan.kernels import Recent
from swan.storage import Graded, LayerPlan, Packed

__all__ = ["PAGE", "DensePages", "PackedPages", "PageLayout"]

PAGE = 64  # tokens of a page: a multiple of this, which kernels read at a time


@dataclass(frozen=True)
class PageLayout:
    """Where a page has what.

    Args:
        plan_layer: layouts of keys and values, both `Graded`.
        tokens: tokens of a page, a multiple of 64.
        dtype: dtype of the model, which groups of 16 bits and sinks are stored in.
        sinks: first tokens of a page that it holds dense, too.
        padding: bytes of a slot that hold nothing.

    Raises:
        ValueError: the number of tokens is none, or of sinks, or a layout is not `Graded`.

    Example:
        >>> layout = PageLayout(LayerPlan(*[Graded(((64, 4),))] * 2), tokens=64, dtype=torch.bfloat16)
        >>> layout.slot_bytes  # of a token and KV head
        66
    """

    plan_layer: LayerPlan
    tokens: int
    dtype: torch.dtype
    sinks: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.tokens % PAGE:
            raise ValueError(f"a page holds a multiple of {PAGE} tokens, got {self.tokens}")
        if not 0 <= self.sinks <= PAGE:
            raise ValueError(f"a page holds up to {PAGE} sinks, got {self.sinks}")
        for layout in (self.plan_layer.keys, self.plan_layer.values):
            if not isinstance(layout, Graded):
                raise ValueError(f"pages hold vectors in Graded layouts, got {layout}")

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token and KV head, keys and values, with its share of the sinks, rounded up, and the padding."""
        share = -(-sum(self.plan_layer.dense_nbytes(self.sinks, self.dtype.itemsize)) // self.tokens)
        return sum(self.plan_layer.nbytes(1, self.dtype.itemsize)) + share + self.padding

    def pool(self, memory: Tensor) -> "PackedPages":
        """Return all pages as views.

        Args:
            memory: ``[pages, kv_heads, tokens, slot_bytes]``, uint8, the last two axes without gaps.
        """
        heads = memory.view(*memory.shape[:2], self.tokens * self.slot_bytes)
        sides = [self.plan_layer.keys, self.plan_layer.values]
        planes: list[list[Tensor]] = [[], []]
        scales: list[Tensor | None] = [None, None]
        start = 0

        def take(width: int, dtype: torch.dtype) -> Tensor:
            nonlocal start
            stop = start + self.tokens * width
            plane = heads[..., start:stop].unflatten(-1, (self.tokens, width))
            start = stop
            return plane.view(dtype)

        for side, layout in enumerate(sides):
            assert isinstance(layout, Graded)
            if layout.row_bytes:
                planes[side].append(take(layout.row_bytes, torch.uint8))
            if whole := sum(stop - start for start, stop, bits in layout.stored if bits == 16):
                planes[side].append(take(whole * self.dtype.itemsize, self.dtype))
        for side, layout in enumerate(sides):
            assert isinstance(layout, Graded)
            if groups := sum(bits != 16 for _, _, bits in layout.stored):
                scales[side] = take(groups, torch.uint8)
        keys, values = (
            Packed(tuple(planes[side]), scales[side], None, layout, self.dtype) for side, layout in enumerate(sides)
        )
        stop = start + sum(self.plan_layer.dense_nbytes(self.sinks, self.dtype.itemsize))
        both = heads[..., start:stop].view(self.dtype).unflatten(-1, (self.sinks, -1)) if self.sinks else None
        return PackedPages(keys, values, None if both is None else DensePages.split(both, keys.format.d))


@dataclass(frozen=True)
class PackedPages:
    """Packed keys and values of all sequences of a layer, from `PageLayout.pool`.

    Args:
        keys: ``[pages, kv_heads, tokens, d]``.
        values: likewise.
        first: the first tokens of each page, dense; None where there are no sinks.
    """

    keys: Packed
    values: Packed
    first: "DensePages | None" = None

    @property
    def tokens(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[2]

    @property
    def sinks(self) -> int:
        """First tokens of a sequence that all its queries see dense."""
        return 0 if self.first is None else self.first.tokens

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Pack new tokens into their slots.

        Args:
            slots: ``[tokens]``, int64: page times tokens of a page, plus the place in it; below 0 for padding.
            k: rotated keys ``[1, kv_heads, tokens, d]``.
            v: rotated values.
        """
        if (kernel := store_in_pages_kernel(k, v, self.keys.format, self.values.format)) is not None:
            kernel(k, v, self.keys, self.values, slots, self.tokens)
        else:
            stored = [*self.keys.tensors, *self.values.tensors]
            packed = [*pack(k, self.keys.format).tensors, *pack(v, self.values.format).tensors]
            _write([*zip(stored, packed, strict=True)], slots, self.tokens)
        if self.first is not None:
            self.first.write(slots, k, v, self.tokens)

    def read(self, table: Tensor, start: int, stop: int) -> tuple[Packed, Packed]:
        """Copy the packed tokens from column `start`, the first of a page, to `stop`, of one sequence.

        Args:
            table: pages of the sequence ``[pages]``.
            start: a multiple of the tokens of a page.
            stop: the column after the last.
        """
        pages = table[start // self.tokens : -(-stop // self.tokens)]

        def rows(plane: Tensor) -> Tensor:
            return rearrange(plane[pages], "p h t w -> 1 h (p t) w")

        keys, values = (x.map(rows).tokens(0, stop - start) for x in (self.keys, self.values))
        return keys, values


@dataclass(frozen=True)
class DensePages:
    """Dense keys and values: of the newest tokens of all sequences of a layer, or of their first.

    Args:
        keys: ``[pages, kv_heads, tokens, d]``.
        values: ``[pages, kv_heads, tokens, dv]``.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def split(cls, memory: Tensor, d: int) -> "DensePages":
        """Take the first `d` numbers of each token for its key, the others for its value."""
        return cls(memory[..., :d], memory[..., d:])

    @property
    def tokens(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[2]

    def write(self, slots: Tensor, k: Tensor, v: Tensor, page: int | None = None) -> None:
        """Store new tokens in their slots, as `PackedPages.write` does.

        Args:
            slots: likewise.
            k: likewise.
            v: likewise.
            page: tokens of a page, of which only the first are here; by default all are.
        """
        page = page or self.tokens
        pages = self.keys, self.values
        layouts = [_whole(x.shape[-1]) for x in pages]
        if (kernel := store_in_pages_kernel(k, v, *layouts)) is not None:
            both = [Packed((x,), None, None, layout, x.dtype) for x, layout in zip(pages, layouts, strict=True)]
            kernel(k, v, *both, slots, page)
        else:
            _write([*zip(pages, (k, v), strict=True)], slots, page)

    def read(self, table: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copy keys and values ``[1, kv_heads, tokens, d]`` of one sequence, from column `start` to `stop`."""
        first = start // self.tokens
        pages = table[first : -(-stop // self.tokens)]
        inside = slice(start - first * self.tokens, stop - first * self.tokens)
        keys, values = (rearrange(x[pages], "p h t d -> 1 h (p t) d")[:, :, inside] for x in (self.keys, self.values))
        return keys, values

    def newest(self, table: Tensor, columns: Tensor) -> Recent:
        """Copy tokens of several sequences, and mask those that are not there.

        Args:
            table: pages of each sequence ``[sequences, pages]``.
            columns: of each sequence ``[sequences, tokens]``; below 0 there is none.
        """
        inside = columns.clamp(min=0)
        page, place = table.gather(1, inside // self.tokens), inside % self.tokens
        keys, values = (rearrange(x[page, :, place], "s t h d -> s h t d") for x in (self.keys, self.values))
        return Recent(keys, values, rearrange(columns >= 0, "s t -> s 1 1 t"))


@functools.cache
def _whole(d: int) -> Graded:
    """Return the layout in which kernels store dense vectors."""
    return Graded(((d, 16),))


def _write(pairs: Sequence[tuple[Tensor, Tensor]], slots: Tensor, page: int) -> None:
    """Write rows ``[1, heads, tokens, width]`` into those of their slots that pages have a place for."""
    number, place = slots // page, slots % page
    there = (slots >= 0) & (place < pairs[0][0].shape[2])
    if not there.all():
        pairs = [(pages, rows[:, :, there]) for pages, rows in pairs]
        number, place = number[there], place[there]
    for pages, rows in pairs:
        pages[number, :, place] = rearrange(rows, "1 h t w -> t h w")
