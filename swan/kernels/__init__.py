"""Fused kernels over `Packed`, one file each. None of them is imported before it is used."""

from typing import NamedTuple

from torch import Tensor

from swan.storage import Graded, Layout, TopK


class Recent(NamedTuple):
    """Tokens that are not packed: keys and values ``[batch, kv_heads, tokens, d]``, and which a query sees or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


def numbers_of(layout: Layout) -> list[int] | None:
    """A layout as every kernel takes it: 0, then size and bits of each group; or 1, d, keep and bits.

    None for those that no kernel reads: layouts of other kinds, and `TopK` with a list of positions.
    """
    match layout:
        case Graded():
            return layout.numbers
        case TopK() if layout.positions == "bitmap" or layout.keep == layout.d:
            return layout.numbers
    return None
