"""Packing of graded layouts on a CPU, in C++."""

import torch
from torch import Tensor

from swan.kernels import numbers_of, planes_of
from swan.kernels.cpu import operator
from swan.storage import Graded, Layout, Packed

__all__ = ["restore", "store", "stores"]


def store(x: Tensor, layout: Layout) -> Packed:
    """Pack as `Graded.pack` does, but by the kernel: values within rounding of the edge of a step may differ.

    Args:
        x: ``[batch, heads, tokens, d]``, float32, bfloat16 or float16, on a CPU; gradients are lost.
        layout: a layout for which `stores` is True.

    Returns:
        The stored tensors.

    Example:
        >>> from swan.kernels import cpu
        >>> packed = store(torch.randn(1, 2, 5, 64), Graded(((16, 5), (48, 3)))) if cpu.built() else None

    Source: arXiv:2511.18936.
    """
    assert isinstance(layout, Graded)
    matrix = layout.mix(x.dtype, x.device)
    assert matrix is not None  # some group is of few bits
    codes, scales = operator("pack")(x, layout.numbers, matrix)
    whole = [x[..., start:stop] for start, stop, bits in layout.stored if bits == 16]
    planes = (codes, torch.cat(whole, dim=-1)) if whole else (codes,)
    return Packed(planes, scales, None, layout, x.dtype)


def restore(packed: Packed) -> Tensor:
    """Unpack as `swan.storage.packed.unpack_mixed` does: in mixed coordinates.

    Args:
        packed: on a CPU, in a layout that `swan.kernels.cpu.attend.reads` knows, of float32, bfloat16 or float16.

    Returns:
        ``[batch, heads, tokens, d]`` in the dtype of the vectors.

    Example:
        ```python
        keys = restore(packed.tokens(0, 1024))
        ```

    Source: arXiv:2511.18936.
    """
    like = packed.planes[0].new_empty(0, dtype=packed.dtype)
    return operator("unpack")(planes_of(packed), numbers_of(packed.format), packed.planes[0].shape[2], like)


def stores(layout: Layout) -> bool:
    """Tell if the kernel packs a layout: `Graded` with a group below 16 bits."""
    return isinstance(layout, Graded) and layout.mixed
