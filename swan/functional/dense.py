"""Implementations of dense attention: torch's SDPA, FlexAttention, and tensor code for torch.compile."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from swan.functional.dispatch import NO_LSE, sdpa_gives_lse

__all__ = ["flex", "sdpa", "sdpa_with_lse", "tensor_code", "with_causal"]


def with_causal(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """Hide later keys too; the last query sees all of them."""
    queries, tokens = q.shape[2], k.shape[2]
    ones = torch.ones(queries, tokens, dtype=torch.bool, device=q.device)
    lower = ones.tril(tokens - queries)[None, None]
    return lower if mask is None else mask & lower


def _group_rows(q: Tensor, kv_heads: int) -> Tensor:
    """Arrange query groups as rows of their KV head, so that each key is read once for all of them."""
    return rearrange(q, "b (h g) q d -> b h (g q) d", h=kv_heads)


def _group_mask(mask: Tensor | None, q: Tensor, kv_heads: int) -> Tensor | None:
    group_size = q.shape[1] // kv_heads
    if mask is None or group_size == 1:
        return mask
    if mask.shape[1] == 1:
        return repeat(mask, "b 1 q k -> b 1 (g q) k", g=group_size)
    return rearrange(mask, "b (h g) q k -> b h (g q) k", g=group_size)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attend by torch's fused kernels."""
    attention = torch.nn.functional.scaled_dot_product_attention
    if causal or (q.device.type == "cuda" and mask is None):  # there these kernels read each key once for a group
        return _spoilt(attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]), q)
    rows = attention(_group_rows(q, k.shape[1]), k, v, attn_mask=_group_mask(mask, q, k.shape[1]), scale=scale)
    out = _spoilt(rearrange(rows, "b h (g q) d -> b (h g) q d", q=q.shape[2]), q)
    # Torch's kernels differ in their output for a query that sees nothing; here it is zero.
    return out if mask is None else torch.where(mask.any(-1, keepdim=True), out, 0)


def sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend by those of torch's kernels that give a log-sum-exp.

    Raises:
        ValueError: not for tensors like these.
    """
    if not sdpa_gives_lse(q, v, mask is not None):
        raise ValueError(NO_LSE.format(device=q.device.type, d=q.shape[-1], dv=v.shape[-1], dtype=q.dtype))
    if q.device.type == "cuda":
        q, k, v = map(_in_a_row, (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out, lse
    bias = None
    if mask is not None:
        bias = _group_mask(torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf), q, k.shape[1])
    rows, lse_rows = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *map(_in_a_row, (_group_rows(q, k.shape[1]), k, v)), attn_mask=bias, scale=scale
    )
    out = _spoilt(rearrange(rows, "b h (g q) d -> b (h g) q d", q=q.shape[2]), q)
    lse = _spoilt(rearrange(lse_rows, "b h (g q) -> b (h g) q 1", q=q.shape[2]), q).squeeze(-1)
    if mask is not None:  # the kernel returns 0 for a query that sees nothing
        lse = torch.where(mask.any(-1), lse, -math.inf)
    return out, lse


def _in_a_row(x: Tensor) -> Tensor:
    """Copy vectors whose coordinates do not lie side by side: torch's kernels read them as if they did."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _spoilt(out: Tensor, q: Tensor) -> Tensor:
    """Return NaN for queries that are not finite: torch's kernels for CPUs give some of them zeros."""
    return out if q.device.type == "cuda" else out + (q * 0).sum(-1, keepdim=True)  # 0 times these is NaN


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Attend by FlexAttention, compiled."""
    if q.device.type == "cpu" and return_lse:
        raise ValueError("impl='flex' has no log-sum-exp on the CPU; use impl='sdpa' or 'compiled'")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("impl='flex' is for inference; use impl='sdpa' where gradients are needed")
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention  # imports the compiler

    kv_heads = k.shape[1]
    rows, row_mask = _group_rows(q, kv_heads), _group_mask(mask, q, kv_heads)
    score_mod = None if row_mask is None else _masking(row_mask.expand(q.shape[0], kv_heads, -1, -1))
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    if return_lse:
        rows, aux = flex(rows, k, v, score_mod=score_mod, scale=scale, return_aux=AuxRequest(lse=True))
        lse = rearrange(aux.lse, "b h (g q) -> b (h g) q", q=q.shape[2])
    else:
        rows, lse = flex(rows, k, v, score_mod=score_mod, scale=scale), q.new_zeros(())
    return rearrange(rows, "b h (g q) d -> b (h g) q d", q=q.shape[2]), lse


def _masking(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda score, b, h, i, j: torch.where(mask[b, h, i, j], score, -math.inf)


def tensor_code(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend by plain tensor code, with scores in float32."""
    kv_heads = k.shape[1]
    scores = einsum(_group_rows(q, kv_heads).float(), k.float(), "b h r d, b h k d -> b h r k") * scale
    row_mask = _group_mask(mask, q, kv_heads)
    if row_mask is not None:
        scores = scores.masked_fill(~row_mask, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    if row_mask is not None:  # of a query that sees nothing; where it sees infinities only, its output is NaN
        peak = torch.where(row_mask.any(-1, keepdim=True), peak, 0)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    rows = einsum(weights / total.clamp(min=1e-38), v.float(), "b h r k, b h k d -> b h r d").to(q.dtype)
    lse = (peak + total.log()).squeeze(-1)
    return (
        rearrange(rows, "b h (g q) d -> b (h g) q d", q=q.shape[2]),
        rearrange(lse, "b h (g q) -> b (h g) q", q=q.shape[2]),
    )
