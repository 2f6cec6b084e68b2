"""The slow, obvious twin of each function: what the fast ones are tested against, in any precision.

Nothing here is tiled, fused or clever. Give float64 inputs for an oracle.
"""

import math

import torch
from torch import Tensor

from swan.storage import Graded, Layout, TopK
from swan.storage.mixing import hadamard

__all__ = ["dense_attention", "graded_prune", "merge_attention", "prune", "rotate", "topk_prune", "windowed_attention"]


def rotate(x: Tensor, basis: Tensor) -> Tensor:
    """`swan.functional.rotate`, one head at a time."""
    groups = x.shape[1] // basis.shape[0]
    return torch.stack([x[:, h] @ basis[h // groups] for h in range(x.shape[1])], dim=1)


def topk_prune(x: Tensor, keep: int) -> Tensor:
    """`swan.functional.topk_prune`, one vector at a time."""
    out = torch.zeros_like(x)
    for source, target in zip(x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1]), strict=True):
        for i in sorted(range(len(source)), key=lambda i: -abs(float(source[i])))[:keep]:
            target[i] = source[i]
    return out


def graded_prune(x: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """`swan.functional.graded_prune`, one group of one vector at a time, the nearest of all steps by search."""
    out, start = torch.zeros_like(x), 0
    for size, bits in groups:
        part = slice(start, start + size)
        if bits == 16:
            out[..., part] = x[..., part]
        elif bits:
            matrix = hadamard(size, x.device).to(x.dtype)
            mixed = x[..., part] @ matrix
            for vector in mixed.view(-1, size):
                peak = float(vector.abs().max())
                byte = next((c for c in range(256) if 2 ** ((c - 128) / 8) >= peak), 255)
                levels = (torch.arange(2**bits).to(x) - (2**bits - 1) / 2) * 2 ** (1 - bits) * 2 ** ((byte - 128) / 8)
                vector[:] = levels[(vector[:, None] - levels).abs().argmin(-1)]
            out[..., part] = mixed @ matrix.mT
        start += size
    return out


def prune(x: Tensor, layout: Layout) -> Tensor:
    """What ``unpack(pack(x, layout))`` stands for, before quantization."""
    if isinstance(layout, Graded):
        return graded_prune(x, layout.groups)
    assert isinstance(layout, TopK)
    return topk_prune(x, layout.keep)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`swan.functional.dense_attention` with its log-sum-exp; float64 stays float64."""
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.to(wide) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if causal:
        above = torch.ones(scores.shape[-2:], device=q.device).triu(scores.shape[-1] - scores.shape[-2] + 1).bool()
        scores = scores.masked_fill(above, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0)  # a row that sees nothing gives zero
    return (weights @ values).to(q.dtype), lse


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`swan.functional.merge_attention` by the definition."""
    total = sum(lse.exp() for _, lse in parts)
    assert isinstance(total, Tensor)
    out = sum(out * (lse.exp() / total)[..., None] for out, lse in parts)
    assert isinstance(out, Tensor)
    return out.nan_to_num(0), total.log()


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pruned: Tensor,
    v_pruned: Tensor,
    *,
    buffer: int,
    sinks: int,
    padding: Tensor | None = None,
    window_start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """A whole sequence as decoding token by token sees it.

    Query i sees key j dense if ``i - j < buffer`` or j is a sink, else pruned. `padding` counts each
    row's left padding; `window_start` [queries] overrides ``i - buffer + 1`` (the prefill form ``chunk``).
    """
    batch, _, tokens, _ = q.shape
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    first = torch.zeros(batch, dtype=torch.long) if padding is None else padding
    start = (i - buffer + 1) if window_start is None else window_start[:, None]
    sink = j[None] < first[:, None, None] + sinks
    visible = (j <= i)[None] & (j[None] >= first[:, None, None])
    dense = ((j >= start)[None] | sink).expand(batch, tokens, tokens)
    groups = q.shape[1] // k.shape[1]
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale

    def scores(keys: Tensor) -> Tensor:
        return q @ keys.repeat_interleave(groups, dim=1).mT * factor

    mixed = torch.where(dense[:, None], scores(k), scores(k_pruned)).masked_fill(~visible[:, None], -math.inf)
    weights = torch.softmax(mixed, dim=-1).nan_to_num(0)
    dense_part = torch.where(dense[:, None], weights, 0) @ v.repeat_interleave(groups, dim=1)
    pruned_part = torch.where(dense[:, None], 0, weights) @ v_pruned.repeat_interleave(groups, dim=1)
    return dense_part + pruned_part
