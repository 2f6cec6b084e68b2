"""`pack`: from vectors to the tensors that a cache stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swan.compiling import outside_autocast
from swan.functional.dispatch import Impl, pack_impl, store_kernel
from swan.storage import Layout, Packed
from swan.storage.packed import check_vectors

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["pack"]


@outside_autocast
def pack(x: Float[Tensor, "batch heads tokens d"], layout: Layout, *, impl: Impl = "auto") -> Packed:
    """Store vectors in a layout: ``unpack(pack(x, layout))`` is the pruned `x`.

    Args:
        x: ``[batch, heads, tokens, d]``, float32, bfloat16 or float16.
        layout: a `TopK`, `Graded` or other `Layout` of the same ``d``.
        impl: ``"cpp"`` (a kernel for CPUs), ``"cuda"`` (one for NVIDIA GPUs), ``"compiled"`` (tensor code of the
            layout); ``"auto"`` takes the kernel of the device where it knows the layout and is built, else compiled.
            They agree but for numbers within rounding of the edge of a step.

    Returns:
        The stored tensors.

    Raises:
        ValueError: `x` does not have 4 axes or its last one is not the layout's ``d``; or `impl` is unknown, or cannot
            store these vectors in this layout.
        TypeError: `x` is not floating point.
        RuntimeError: ``impl="cpp"`` and the kernel cannot be built.

    Example:
        >>> from swan import TopK, unpack
        >>> packed = pack(torch.tensor([[[[3.0, -1.0, 0.5, 2.0] * 4]]]), TopK(16, keep=8, bits=16))
        >>> unpack(packed)[0, 0, 0, :4]
        tensor([3., 0., 0., 2.])

    Source: arXiv:2511.18936.
    """
    if not torch.compiler.is_compiling():
        check_vectors(x, layout)
    return store_kernel(pack_impl(impl, x, layout))(x, layout)
