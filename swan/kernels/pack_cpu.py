"""Packing of graded layouts on a CPU, in C++."""

import torch
from torch import Tensor

from swan.kernels.cpu import operator
from swan.storage import Graded, Layout, Packed

__all__ = ["store", "stores"]


def store(x: Tensor, layout: Layout) -> Packed:
    """`Graded.pack` by the kernel: the same but for values within rounding of the edge of a step.

    Args:
        x: ``[batch, heads, tokens, d]``, float32, bfloat16 or float16, on a CPU; gradients are lost.
        layout: one that `stores` knows.

    Returns:
        The stored tensors.

    Example:
        >>> from swan.kernels import cpu
        >>> packed = store(torch.randn(1, 2, 5, 64), Graded(((16, 5), (48, 3)))) if cpu.built() else None

    Source: arXiv:2511.18936.
    """
    assert isinstance(layout, Graded)
    matrix = layout.mix(x.dtype, x.device)
    mixed = x if matrix is None else x @ matrix
    codes, scales = operator("pack")(mixed, layout.numbers)
    whole = [x[..., start:stop] for start, stop, bits in layout.stored if bits == 16]
    planes = (codes, torch.cat(whole, dim=-1)) if whole else (codes,)
    return Packed(planes, scales, None, layout, x.dtype)


def stores(layout: Layout) -> bool:
    """Whether the kernel knows a layout: `Graded` with a group below 16 bits."""
    return isinstance(layout, Graded) and layout.mixed
