"""Fused kernels over `Packed`, compiled at the first use, and what they share: layouts as numbers."""

from typing import NamedTuple

from torch import Tensor

from swan.storage import Graded, Layout, Packed, TopK


class Recent(NamedTuple):
    """Dense recent tokens: keys and values ``[batch, kv_heads, tokens, d]``, and a mask of those that a query sees."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


def numbers_of(layout: Layout) -> list[int] | None:
    """Write a layout as every kernel takes it: 0, then size and bits of each group; or 1, d, keep and bits.

    Return None for layouts that no kernel reads: those of other forms, and `TopK` with a list of positions.
    """
    match layout:
        case Graded():
            return layout.numbers
        case TopK() if layout.positions == "bitmap" or layout.keep == layout.d:
            return layout.numbers
    return None


def matrix_of(x: Tensor, layout: Layout) -> Tensor:
    """Return the matrix that mixes vectors like `x` in a layout, or an empty tensor where there is none."""
    matrix = layout.mix(x.dtype, x.device)
    return x.new_empty(0) if matrix is None else matrix


def planes_of(packed: Packed) -> list[Tensor]:
    """Return codes, values in the dtype of the cache, scales, positions; empty tensors where there are none."""
    codes = whole = empty = packed.planes[0].new_empty(0)
    for plane in packed.planes:
        if plane.is_floating_point():
            whole = plane
        else:
            codes = plane
    scales, positions = packed.scales, packed.positions
    return [codes, whole, empty if scales is None else scales, empty if positions is None else positions]
