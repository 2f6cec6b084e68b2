"""Calls of the kernels over packed tokens: for each one operator, for eager and compiled code, on every device."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from swan.kernels import Recent, Seen, attend_in_runs, cpu, cuda, matrices_of, numbers_of, planes_of
from swan.storage import ByHead, Graded, Layout, Packed
from swan.storage.by_head import parts_of
from swan.storage.packed import mixing

__all__ = ["attend", "attend_pages", "kernels_on", "restore", "store", "store_in_pages", "take_in"]

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}  # by type of device


def kernels_on(device: torch.device) -> Any:
    """Return the package of kernels for a device, `swan.kernels.cpu` or `swan.kernels.cuda`, or None."""
    return KERNELS.get(device.type)


def attend(
    q: Tensor,
    k: Packed,
    v: Packed,
    seen: Tensor | Seen | None,
    scale: float,
    recent: Recent | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attend with few queries to a packed history, and to recent tokens beside it, in one softmax.

    This is `packed_attention`, and with `recent` all of `swan_attention`. Queries are mixed, and outputs mixed back, in
    the kernel.

    On a CPU threads take KV heads and stretches of tokens. Where keys and values are both coded (`Graded`, no group of
    16 bits) and the CPU has AVX2, or AVX-512 with VBMI and VNNI (up to 4 groups), each token is read once for four
    query rows: scores are products of codes with queries rounded to two bytes of their largest coordinate, outputs sums
    of codes with weights $p_j s_j$ rounded to 15 bits of their largest in 64 tokens (with AVX-512 in float32 four
    bytes, and not rounded). Else each token is unpacked to floats, once for all rows.

    On a GPU a program takes a KV head, a stretch of tokens and eight query rows, and tensor cores multiply codes, which
    are exact in half precision, with queries and with weights $p_j s_j$ rounded to half precision.

    Args:
        q: ``[batch, heads, queries, d]``, float32, bfloat16 or float16.
        k: packed keys, in a layout to which the kernels of the device attend.
        v: packed values, likewise.
        seen: the tokens that queries see: booleans ``[batch or 1, heads or 1, queries, tokens]``, or numbers; None:
            all. Stretches that no query sees are not read.
        scale: factor of the scores.
        recent: recent tokens beside the history.

    Returns:
        Output ``[batch, heads, queries, dv]``, float32 on a CPU, in the dtype of `q` on a GPU, and natural log-sum-exp
        ``[batch, heads, queries]``, float32.

    Example:
        ```python
        out, lse = attend(q, pack(k, Graded(((64, 4),))), pack(v, Graded(((64, 4),))), None, 64**-0.5)
        ```

    Source: the split over the history is Dao et al., Flash-Decoding; the method arXiv:2511.18936.
    """
    if (isinstance(k.format, ByHead) or isinstance(v.format, ByHead)) and not kernels_on(q.device).ATTENDS_TO_RUNS:
        return attend_in_runs(lambda q, k, v, seen, recent: attend(q, k, v, seen, scale, recent), q, k, v, seen, recent)
    mask, span = (None, seen) if isinstance(seen, Seen) else (seen, Seen(None, None, 0))
    return _operator("attend", q)(
        q,
        planes_of(k),
        numbers_of(k.format),
        planes_of(v),
        numbers_of(v.format),
        k.planes[0].shape[2],
        mask,
        scale,
        [*matrices_of(q, k.format), *matrices_of(q, v.format)],
        [] if recent is None else [recent.keys, recent.values],
        None if recent is None else recent.mask,
        *span,
    )


def attend_pages(
    q: Tensor, k: Packed, v: Packed, table: Tensor, first: int, ends: Tensor, scale: float, recent: Recent
) -> tuple[Tensor, Tensor]:
    """Attend as `attend` does, where packed tokens lie in pages that sequences share.

    What lies behind the end of a sequence in its last page may be anything.

    Args:
        q: ``[batch, heads, queries, d]``, float32, bfloat16 or float16.
        k: packed keys of all pages ``[pages, kv_heads, tokens of a page, d]``; of a page 64 tokens or a multiple: on a
            CPU a power of two. On a GPU pages and their planes begin at multiples of 16 bytes.
        v: packed values, likewise.
        table: pages of each sequence ``[batch, pages of a sequence]``, int64; entries behind its end are not read.
            On a CPU a page that is not there is an error, on a GPU it is memory of others.
        first: the first packed token that queries see.
        ends: each query sees those before this one ``[batch, queries]``, int64.
        scale: factor of the scores.
        recent: recent tokens beside them.

    Returns:
        As `attend`.

    Raises:
        ValueError: tensors are not as said here; on a CPU a RuntimeError.

    Example:
        ```python
        out, _ = attend_pages(
            q, k, v, torch.tensor([[7, 2]]), 0, torch.tensor([[100]]), 64**-0.5, Recent(*recent, None)
        )
        ```

    Source: pages of a cache are Kwon et al., arXiv:2309.06180; the rest as in `attend`.
    """
    return _operator("attend_pages", q)(
        q,
        planes_of(k),
        numbers_of(k.format),
        planes_of(v),
        numbers_of(v.format),
        table,
        first,
        ends,
        scale,
        [*matrices_of(q, k.format), *matrices_of(q, v.format)],
        [recent.keys, recent.values],
        recent.mask,
    )


def store(x: Tensor, layout: Layout) -> Packed:
    """Pack as `Graded.pack` does, but by the kernel: values within rounding of the edge of a step may differ.

    Args:
        x: ``[batch, heads, tokens, d]``, float32, bfloat16 or float16; gradients are lost.
        layout: a `Graded` or `ByHead` layout.

    Returns:
        The stored tensors.

    Example:
        >>> from swan.kernels import cpu
        >>> packed = store(torch.randn(1, 2, 5, 64), Graded(((16, 5), (48, 3)))) if cpu.built() else None

    Source: arXiv:2511.18936.
    """
    if isinstance(layout, ByHead):
        return layout.join([store(x[:, run.start : run.stop], run.layout) for run in layout.runs])
    assert isinstance(layout, Graded)
    tensors = _operator("pack", x)(x, layout.numbers, *matrices_of(x, layout))
    coded = layout.row_bytes > 0
    planes, scales = (tensors[:-1], tensors[-1]) if coded else (tensors, None)
    return Packed(tuple(planes), scales, None, layout, x.dtype)


def store_in_pages(k: Tensor, v: Tensor, k_pages: Packed, v_pages: Packed, slots: Tensor, page: int) -> None:
    """Pack keys and values as `store` does, into slots of pages, in place: kernels on an NVIDIA GPU.

    Args:
        k: keys ``[1, kv_heads, tokens, d]``, float32, bfloat16 or float16.
        v: values, likewise.
        k_pages: packed keys of all pages ``[pages, kv_heads, tokens of a page, d]``, in a `Graded` layout; or of the
            first tokens of each page.
        v_pages: packed values, likewise.
        slots: of each token ``[tokens]``, int64: page times tokens of a page, plus the place in it. Where it is below
            0, or pages have no such place, the token is not stored.
        page: tokens of a page.

    Raises:
        ValueError: slots are of another shape or dtype.

    Example:
        ```python
        store_in_pages(k, v, k_pages, v_pages, torch.tensor([7 * 64 + 63, 2 * 64], device="cuda"), 64)
        ```

    Source: pages of a cache are Kwon et al., arXiv:2309.06180; packing arXiv:2511.18936.
    """
    pages = [[*k_pages.tensors], [*v_pages.tensors]]
    layouts = numbers_of(k_pages.format), numbers_of(v_pages.format)
    mixes = [*matrices_of(k, k_pages.format), *matrices_of(v, v_pages.format)]
    _operator("pack_pages", k)(k, v, *pages, *layouts, mixes, slots, page)
    if not torch.compiler.is_compiling():  # as in `take_in`
        written = [*k_pages.tensors, *v_pages.tensors]
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


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
        k: keys ``[batch, kv_heads, tokens, d]``, float32, bfloat16 or float16.
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
    k_history, v_history = history
    _operator("take_in", k)(
        k,
        v,
        *recent,
        [*k_history.tensors],
        [*v_history.tensors],
        numbers_of(k_history.format),
        numbers_of(v_history.format),
        [*matrices_of(k, k_history.format), *matrices_of(v, v_history.format)],
        [n if isinstance(n, Tensor) else torch.scalar_tensor(n, dtype=torch.long, device="cpu") for n in counters],
        padding,
        sinks,
        start,
    )
    if not torch.compiler.is_compiling():
        # Who saved one of these for a backward pass is told that it changed, as torch's own functions tell.
        written = [*recent, *k_history.tensors, *v_history.tensors]
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def restore(packed: Packed) -> Tensor:
    """Unpack as `swan.storage.packed.unpack_mixed` does: in mixed coordinates, but for `ByHead`.

    Args:
        packed: in a layout that the kernel of the device unpacks, of float32, bfloat16 or float16.

    Returns:
        ``[batch, heads, tokens, d]`` in the dtype of the vectors.

    Example:
        ```python
        keys = restore(packed.tokens(0, 1024))
        ```

    Source: arXiv:2511.18936.
    """
    if isinstance(packed.format, ByHead):
        parts = [(restore(part), mixing(part)) for part in parts_of(packed)]
        return torch.cat([x if matrix is None else x @ matrix.mT for x, matrix in parts], dim=1)
    like = packed.planes[0].new_empty(0, dtype=packed.dtype)
    return _operator("unpack", like)(planes_of(packed), numbers_of(packed.format), packed.planes[0].shape[2], like)


def _operator(name: str, x: Tensor) -> Any:
    return KERNELS[x.device.type].operator(name)
