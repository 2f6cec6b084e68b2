"""Attention over dense and packed keys and values, and the exact merge of attention over disjoint sets of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import einsum
from torch import Tensor

from swan.compiling import outside_autocast
from swan.functional import reference
from swan.functional.dense import flex, sdpa, sdpa_with_lse, tensor_code, with_causal
from swan.functional.dispatch import (
    Impl,
    dense_impl,
    is_kernel,
    one_call_serves,
    packed_impl,
    unpack_kernel,
)
from swan.kernels import Recent, Seen, attend_in_runs, calls
from swan.storage import ByHead, Packed
from swan.storage.packed import mixing

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["check_attention", "dense_attention", "merge_attention", "packed_attention", "swan_attention"]

TILE = 1024  # history tokens that are unpacked at a time


@overload
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = ..., causal: bool = ..., scale: float | None = ...,
    impl: Impl = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = ..., causal: bool = ..., scale: float | None = ...,
    impl: Impl = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@outside_autocast
def dense_attention(
    q: Float[Tensor, "batch heads queries d"],
    k: Float[Tensor, "batch kv_heads tokens d"],
    v: Float[Tensor, "batch kv_heads tokens dv"],
    *,
    mask: Bool[Tensor, "batch_or_1 heads_or_1 queries tokens"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: Impl = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Compute softmax attention: $o_i = \sum_j p_{ij} v_j$, $p_i = \mathrm{softmax}_j(s\, q_i \cdot k_j)$.

    Query head ``h`` reads KV head ``h // (heads // kv_heads)``. A query that sees no key gets a zero output
    and a log-sum-exp of minus infinity, so outputs over disjoint sets of keys merge exactly (`merge_attention`).

    Args:
        q: queries; ``heads`` is a multiple of ``kv_heads``.
        k: keys.
        v: values.
        mask: True where a query sees a key.
        causal: the last query sees all keys, the one before it all but the last, and so on.
        scale: factor of the scores, ``d ** -0.5`` by default.
        impl: ``"sdpa"`` (torch's fused kernels), ``"flex"`` (FlexAttention, compiled),
            ``"compiled"`` (plain tensor code with scores in float32, made for torch.compile),
            ``"reference"`` (float64-capable oracle); ``"auto"`` takes sdpa wherever it gives
            what `return_lse` and gradients need, else compiled.
        return_lse: also return the natural log of the softmax denominator.

    Returns:
        Output ``[batch, heads, queries, dv]`` in the dtype of `q`; with `return_lse` also the
        float32 log-sum-exp ``[batch, heads, queries]``.

    Raises:
        ValueError: shapes or devices do not fit, or `impl` cannot compute this.
        TypeError: dtypes differ, or the mask is not boolean.

    Example:
        >>> q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
        >>> dense_attention(q, k, v, causal=True).shape
        torch.Size([1, 4, 3, 16])

    Source: Vaswani et al., arXiv:1706.03762; grouped queries are arXiv:2305.13245.
    """
    if not torch.compiler.is_compiling():
        check_attention(q, k, v, mask)
    factor = _factor(q, scale)
    impl = dense_impl(impl, q, k, v, mask is not None or causal, return_lse)
    if k.shape[2] == 0:
        out, lse = _attention_to_nothing(q, v.shape[-1])
    elif impl == "reference":
        out, lse = reference.dense_attention(q, k, v, mask=mask, causal=causal, scale=factor)
    else:
        if causal and (mask is not None or impl != "sdpa" or return_lse or q.shape[2] != k.shape[2]):
            mask, causal = with_causal(mask, q, k), False
        match impl:
            case "sdpa" if return_lse:
                out, lse = sdpa_with_lse(q, k, v, mask, factor)
            case "sdpa":
                return sdpa(q, k, v, mask, causal, factor)
            case "flex":
                out, lse = flex(q, k, v, mask, factor, return_lse)
            case _:
                out, lse = tensor_code(q, k, v, mask, factor)
    return (out, lse) if return_lse else out


@overload
def packed_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    *,
    mask: Tensor | Seen | None = ...,
    scale: float | None = ...,
    impl: Impl = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def packed_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    *,
    mask: Tensor | Seen | None = ...,
    scale: float | None = ...,
    impl: Impl = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@outside_autocast
def packed_attention(
    q: Float[Tensor, "batch heads queries d"],
    k: Packed,
    v: Packed,
    *,
    mask: Bool[Tensor, "batch_or_1 heads_or_1 queries tokens"] | Seen | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to packed keys and values: `dense_attention` on what `unpack` would return.

    $o_i = \sum_j p_{ij} \hat v_j$, $p_i = \mathrm{softmax}_j(s\, q_i \cdot \hat k_j)$, with $\hat k_j$ and $\hat v_j$
    as they are stored. At most 1024 tokens are unpacked at a time; their outputs are merged by log-sum-exp, so the
    dense history never exists (``impl="reference"`` is exempt).

    Args:
        q: rotated queries.
        k: packed rotated keys, of the shape ``[batch, kv_heads, tokens, d]``.
        v: packed rotated values, ``[batch, kv_heads, tokens, dv]``.
        mask: True where a query sees a token; or a `Seen`, the same as numbers.
        scale: factor of the scores, ``d ** -0.5`` by default.
        impl: ``"cpp"`` (a kernel for CPUs), ``"cuda"`` (one for NVIDIA GPUs), or as in `dense_attention`, for each
            tile; FlexAttention cannot read packed tensors. ``"auto"`` takes the kernel of the device where it reads the
            layouts and is built, for up to 16 query rows of each KV head on a CPU and 256 on a GPU, else tiles.
        return_lse: also return the log-sum-exp.

    Returns:
        As `dense_attention`.

    Raises:
        ValueError: shapes do not fit, ``impl="flex"``, or a kernel that does not read the layouts or run on the device.
        TypeError: keys or values are not `Packed`, dtypes differ, or the mask is not boolean.
        RuntimeError: `impl` names a kernel that cannot be built.

    Example:
        >>> from swan import TopK, pack
        >>> k, v = (pack(torch.randn(1, 2, 50, 16), TopK(16, keep=8)) for _ in range(2))
        >>> packed_attention(torch.randn(1, 4, 1, 16), k, v).shape
        torch.Size([1, 4, 1, 16])

    Source: arXiv:2511.18936.
    """
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"keys hold {k.shape[2]} tokens and values {v.shape[2]}; pack both from the same tokens")
    if not torch.compiler.is_compiling():
        check_attention(q, k, v, mask)
    impl = packed_impl(impl, q, k, v)
    if is_kernel(impl):
        out, lse = calls.attend(q, k, v, mask, _factor(q, scale))
    else:
        out, lse = _in_tiles(q, k, v, mask, scale, impl)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _factor(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


def _in_tiles(
    q: Tensor, k: Packed, v: Packed, mask: Tensor | Seen | None, scale: float | None, impl: Impl
) -> tuple[Tensor, Tensor]:
    """Attend tile by tile to unpacked tokens; the output is at least in float32."""
    if isinstance(k.format, ByHead) or isinstance(v.format, ByHead):
        return attend_in_runs(lambda q, k, v, mask, _: _in_tiles(q, k, v, mask, scale, impl), q, k, v, mask)
    tokens, key_mix, value_mix = k.shape[2], mixing(k), mixing(v)
    q = q if key_mix is None else q @ key_mix
    tile = max(tokens, 1) if impl == "reference" else TILE
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs: list[tuple[Tensor, Tensor]] = []
    unpack_keys, unpack_values = unpack_kernel(impl, k), unpack_kernel(impl, v)
    by_some, by_all = _tokens_seen(mask, tokens, q)
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        if stop <= by_some.start or start >= by_some.stop:
            continue
        if mask is None or (by_all.start <= start and stop <= by_all.stop):
            tile_mask = None
        elif isinstance(mask, Seen):
            tile_mask = mask._replace(start=mask.start + start).mask(stop - start).expand(-1, -1, q.shape[2], -1)
        else:
            tile_mask = mask[..., start:stop]
        keys, values = unpack_keys(k.tokens(start, stop)), unpack_values(v.tokens(start, stop))
        out, lse = dense_attention(q, keys, values, mask=tile_mask, scale=scale, impl=impl, return_lse=True)
        outputs.append((out.to(wide), lse))
        if len(outputs) * q.shape[2] >= TILE:  # many queries: their outputs, too, stay within a tile
            outputs = [merge_attention(outputs)]
    out, lse = merge_attention(outputs or [_attention_to_nothing(q, v.format.d)])
    return out if value_mix is None else out @ value_mix.mT.to(out.dtype), lse


def _tokens_seen(mask: Tensor | Seen | None, tokens: int, q: Tensor) -> tuple[range, range]:
    """Return tokens outside which no query sees one, and tokens that all see, as far as numbers tell at once."""
    if mask is None:
        return range(tokens), range(tokens)
    waits = q.device.type != "cpu" or torch.compiler.is_compiling()  # for the numbers
    if not isinstance(mask, Seen) or waits:
        return range(tokens), range(0)
    first = [0] if mask.first is None else (mask.first.flatten() - mask.start).tolist()
    end = [tokens] if mask.end is None else (mask.end.flatten() - mask.start).tolist()
    if not first or not end:  # no rows
        return range(0), range(0)
    return range(min(first), max(end)), range(max(first), min(end))


@outside_autocast
def merge_attention(
    parts: Sequence[tuple[Float[Tensor, "batch heads queries dv"], Float[Tensor, "batch heads queries"]]],
) -> tuple[Float[Tensor, "batch heads queries dv"], Float[Tensor, "batch heads queries"]]:
    r"""Merge attention over disjoint sets of keys exactly, from each set's output and log-sum-exp.

    $L = \log \sum_p e^{L_p}$, $o = \sum_p e^{L_p - L} o_p$, in float32.

    Args:
        parts: a pair (output, log-sum-exp) for each set of keys; where a query sees none of them, its
            log-sum-exp is minus infinity.

    Returns:
        Merged output, in the dtype of the first, and merged float32 log-sum-exp.

    Raises:
        ValueError: there are no pairs.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
        >>> parts = [dense_attention(q, k[:, :, i], v[:, :, i], return_lse=True) for i in (slice(3), slice(3, 8))]
        >>> torch.allclose(merge_attention(parts)[0], dense_attention(q, k, v), atol=1e-6)
        True

    Source: Dao et al., arXiv:2205.14135.
    """
    if not parts:
        raise ValueError("merge_attention needs at least one part (output, log-sum-exp)")
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse.float() for _, lse in parts])
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.where(lse == -math.inf, 0, (lses - lse).exp())
    outs = torch.stack([out.float() for out, _ in parts])
    merged = einsum(weights, outs, "set b h q, set b h q d -> b h q d")
    return merged.to(parts[0][0].dtype), lse


@outside_autocast
def swan_attention(
    q: Float[Tensor, "batch heads queries d"],
    k_history: Packed | None,
    v_history: Packed | None,
    k_buffer: Float[Tensor, "batch kv_heads recent d"],
    v_buffer: Float[Tensor, "batch kv_heads recent dv"],
    *,
    history_mask: Bool[Tensor, "batch_or_1 heads_or_1 queries tokens"] | Seen | None = None,
    buffer_mask: Bool[Tensor, "batch_or_1 heads_or_1 queries recent"] | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "batch heads queries dv"]:
    r"""Attend to packed history and dense recent tokens together: one softmax, nothing rebuilt.

    $o_i = \sum_{j \in H} p_{ij} \hat v_j + \sum_{j \in R} p_{ij} v_j$ with
    $p_i = \mathrm{softmax}_{j \in H \cup R}(s\, q_i \cdot k_j)$: what `merge_attention` makes of `packed_attention`
    over the history $H$, whose keys count as they are stored, and `dense_attention` over the recent tokens $R$.

    Args:
        q: rotated queries.
        k_history: packed keys ``[batch, kv_heads, tokens, d]``, or None where there is no history yet.
        v_history: packed values ``[batch, kv_heads, tokens, dv]``, or None.
        k_buffer: dense keys of the recent tokens: buffer and sinks, in any order.
        v_buffer: dense values of the recent tokens.
        history_mask: True where a query sees a history token; or a `Seen`, the same as numbers.
        buffer_mask: True where a query sees a recent token.
        scale: factor of the scores, ``d ** -0.5`` by default.
        impl: as in `packed_attention`; a kernel over packed tokens needs a history.

    Returns:
        Output in the rotated coordinates of the values: `inverse_rotate` brings it back.

    Raises:
        ValueError: shapes do not fit, only one of the histories is given, or `impl` cannot compute this.
        TypeError: dtypes differ, or a mask is not boolean.
        RuntimeError: `impl` names a kernel that cannot be built.

    Example:
        >>> from swan import TopK, pack
        >>> history = [pack(torch.randn(1, 2, 50, 16), TopK(16, keep=8)) for _ in range(2)]
        >>> recent = [torch.randn(1, 2, 4, 16) for _ in range(2)]
        >>> swan_attention(torch.randn(1, 4, 1, 16), *history, *recent).shape
        torch.Size([1, 4, 1, 16])

    Source: arXiv:2511.18936.
    """
    if (k_history is None) != (v_history is None):
        raise ValueError("give both histories, or None for both")
    if k_history is None or v_history is None:
        if is_kernel(impl):
            raise ValueError(f"impl={impl!r} reads packed tokens, and there is no history; use impl='auto'")
        return dense_attention(q, k_buffer, v_buffer, mask=buffer_mask, scale=scale, impl=impl)
    impl = packed_impl(impl, q, k_history, v_history)
    if is_kernel(impl) and one_call_serves(q, k_history, v_history, k_buffer, v_buffer):
        if not torch.compiler.is_compiling():
            check_attention(q, k_history, v_history, history_mask)
            check_attention(q, k_buffer, v_buffer, buffer_mask)
        tokens = Recent(k_buffer, v_buffer, buffer_mask)
        out, _ = calls.attend(q, k_history, v_history, history_mask, _factor(q, scale), tokens)
        return out.to(q.dtype)
    history = packed_attention(q, k_history, v_history, mask=history_mask, scale=scale, impl=impl, return_lse=True)
    recent_impl: Impl = "auto" if is_kernel(impl) else impl
    recent = dense_attention(q, k_buffer, v_buffer, mask=buffer_mask, scale=scale, impl=recent_impl, return_lse=True)
    return merge_attention([history, recent])[0]


def _attention_to_nothing(q: Tensor, dv: int) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(*q.shape[:-1], dv)
    return out, torch.full(q.shape[:-1], -math.inf, dtype=torch.float32, device=q.device)


def check_attention(q: Any, k: Any, v: Any, mask: Any) -> None:
    """Raise a ValueError or TypeError that says what of queries, keys, values and a mask does not fit."""
    shapes: list[tuple[int, ...]] = []
    for name, t in (("q", q), ("k", k), ("v", v)):
        shape = tuple(t.shape) if isinstance(t, Tensor | Packed) else ()
        if len(shape) != 4:
            got = list(shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor [batch, heads, tokens, d], got {got}")
        shapes.append(shape)
    (batch, heads, queries, d), k_shape, v_shape = shapes
    _, kv_heads, tokens, _ = k_shape
    if k_shape[:3] != v_shape[:3] or (batch, d) != (k_shape[0], k_shape[3]) or heads % kv_heads:
        raise ValueError(
            "expected q [batch, heads, queries, d], k [batch, kv_heads, tokens, d], v [batch, kv_heads, tokens, dv], "
            f"heads a multiple of kv_heads, got {[batch, heads, queries, d]}, {list(k_shape)}, {list(v_shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if mask is None:
        return
    if isinstance(mask, Seen):
        for name, numbers, count in (("first", mask.first, batch), ("end", mask.end, queries)):
            if numbers is not None and (numbers.numel() not in (1, count) or numbers.dtype != torch.int64):
                raise ValueError(f"Seen needs {name} with {count} numbers of int64, or one, got {numbers}")
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"the mask must be boolean (True = visible), got {mask.dtype}")
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    if not fits or tuple(mask.shape[2:]) != (queries, tokens):
        raise ValueError(f"expected a mask [{batch} or 1, {heads} or 1, {queries}, {tokens}], got {list(mask.shape)}")
