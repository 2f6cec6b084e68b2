"""Packing of graded layouts on a CPU, in C++."""

import torch
from torch import Tensor

from swan.kernels import matrix_of, numbers_of, planes_of
from swan.kernels.cpu import operator
from swan.storage import Graded, Layout, Packed

__all__ = ["restore", "store", "stores", "take_in"]


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
    tensors = operator("pack")(x, layout.numbers, matrix_of(x, layout))
    coded = layout.row_bytes > 0
    planes, scales = (tensors[:-1], tensors[-1]) if coded else (tensors, None)
    return Packed(tuple(planes), scales, None, layout, x.dtype)


def take_in(
    k: Tensor,
    v: Tensor,
    recent: tuple[Tensor, Tensor],
    history: tuple[Packed, Packed],
    counters: tuple[int | Tensor, int | Tensor],
    padding: Tensor | None,
    sinks: int,
    start: int,
) -> None:
    """Take new tokens into a cache, in place: `DenseBuffer.push` and `History.append` in one call.

    Args:
        k: keys ``[batch, kv_heads, tokens, d]``, float32, bfloat16 or float16, on a CPU.
        v: values, likewise.
        recent: keys and values of sinks and ring, ``[batch, kv_heads, sinks + size, d]``.
        history: packed keys and values with room for the tokens that leave the ring.
        counters: tokens seen before, and the oldest column in the ring.
        padding: left padding of each row, or None.
        sinks: first tokens of each row, which have slots of their own.
        start: the column of the first token of the history.

    Example:
        ```python
        take_in(k, v, (state.k_recent, state.v_recent), (state.k_history, state.v_history), (128, 0), None, 4, 4)
        ```

    Source: arXiv:2511.18936.
    """
    layouts = [packed.format for packed in history]
    operator("take_in")(
        k,
        v,
        *recent,
        *([*packed.tensors] for packed in history),
        *(numbers_of(layout) for layout in layouts),
        [matrix_of(x, layout) for x, layout in zip((k, v), layouts, strict=True)],
        [n if isinstance(n, Tensor) else torch.scalar_tensor(n, dtype=torch.long) for n in counters],
        padding,
        sinks,
        start,
    )
    if not torch.compiler.is_compiling():
        # Who saved one of these for a backward pass is told that it changed, as torch's own functions tell.
        written = [*recent, *history[0].tensors, *history[1].tensors]
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


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
    """Tell if the kernel packs a layout."""
    return isinstance(layout, Graded)
