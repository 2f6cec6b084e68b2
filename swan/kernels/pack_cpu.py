"""Packing of graded layouts on a CPU, in C++."""

import torch
from torch import Tensor

from swan.kernels.cpu import built, operator
from swan.storage import Graded, Layout, Packed
from swan.storage.packed import check_vectors

__all__ = ["pack"]


def pack(x: Tensor, layout: Layout) -> Packed:
    """`swan.pack`, by a kernel where there is one: the same but for values within rounding of the edge of a step.

    Args:
        x: ``[batch, heads, tokens, d]``, float32, bfloat16 or float16.
        layout: how to store them.

    Returns:
        The stored tensors.

    Raises:
        ValueError: `x` does not fit the layout.
        TypeError: `x` is not floating point.

    Example:
        >>> packed = pack(torch.randn(1, 2, 5, 64), Graded(((16, 5), (48, 3))))
        >>> packed.planes[0].shape, packed.scales.shape
        (torch.Size([1, 2, 5, 28]), torch.Size([1, 2, 5, 2]))

    Source: arXiv:2511.18936.
    """
    if not torch.compiler.is_compiling():
        check_vectors(x, layout)
    if not isinstance(layout, Graded) or not layout.mixed or not _serves(x):
        return layout.pack(x)
    matrix = layout.mix(x.dtype, x.device)
    mixed = x if matrix is None else x @ matrix
    codes, scales = operator("pack")(mixed, layout.numbers)
    whole = [x[..., start:stop] for start, stop, bits in layout.stored if bits == 16]
    planes = (codes, torch.cat(whole, dim=-1)) if whole else (codes,)
    return Packed(planes, scales, None, layout, x.dtype)


def _serves(x: Tensor) -> bool:
    grad = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cpu" and x.dtype != torch.float64 and not grad and built()
