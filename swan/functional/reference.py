"""A slow, obvious twin of each function, in any precision: the fast ones are tested against these.

Nothing here is tiled, fused or clever. Give float64 inputs for an oracle.
"""

import math

import torch
from torch import Tensor

from swan.storage import Graded, Layout, TopK
from swan.storage.codes import CLIPS

__all__ = [
    "dense_attention", "graded_prune", "hadamard", "merge_attention", "mix", "prune", "rotate", "topk_prune",
    "windowed_attention",
]  # fmt: skip


def rotate(x: Tensor, basis: Tensor) -> Tensor:
    """Compute `swan.functional.rotate`, one head at a time."""
    group_size = x.shape[1] // basis.shape[0]
    return torch.stack([x[:, h] @ basis[h // group_size] for h in range(x.shape[1])], dim=1)


def topk_prune(x: Tensor, keep: int) -> Tensor:
    """Compute `swan.functional.topk_prune`, one vector at a time."""
    out = torch.zeros_like(x)
    for source, target in zip(x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1]), strict=True):
        for i in sorted(range(len(source)), key=lambda i: -abs(float(source[i])))[:keep]:
            target[i] = source[i]
    return out


def graded_prune(x: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """Compute `swan.functional.graded_prune`, one group of one vector at a time; search all steps and all scales."""
    out, start = torch.zeros_like(x), 0
    for size, bits in groups:
        group = slice(start, start + size)
        if bits == 16:
            out[..., group] = x[..., group]
        elif bits:
            matrix = hadamard(size).to(x)
            mixed = (x[..., group] @ matrix).double()
            middles = torch.arange(2**bits).double() - (2**bits - 1) / 2
            scales = 2 ** ((torch.arange(255).double() - 128) / 8)
            for vector in mixed.view(-1, size):
                peak, square = float(vector.abs().max()), float(vector.square().sum())
                scale = next((s for s in scales if s >= peak), torch.tensor(math.nan))
                if bits not in CLIPS or peak == 0:
                    steps = middles * 2 ** (1 - bits) * scale
                    vector[:] = steps[(vector[:, None] - steps).abs().argmin(-1)]
                elif math.isfinite(scale):
                    steps = middles * 2 ** (1 - bits) * min(scale, CLIPS[bits] * math.sqrt(square / size))
                    code = middles[(vector[:, None] - steps).abs().argmin(-1)] * 2 ** (1 - bits)
                    longer = square / (vector @ code)
                    vector[:] = code * scales[(scales / longer).log2().abs().argmin()]
                else:
                    vector[:] = math.nan
            out[..., group] = mixed.to(x) @ matrix.mT
        start += size
    return out


def hadamard(size: int) -> Tensor:
    """Build `swan.storage.mixing.hadamard`, entry by entry: signs for the power of two, cosines for the odd factor."""
    odd = size // (size & -size)

    def entry(row: int, column: int) -> float:
        (a, i), (b, j) = divmod(row, odd), divmod(column, odd)
        cosine = math.cos(math.pi / odd * (i + 0.5) * j) * math.sqrt(2 if j else 1)
        return (-1) ** (a & b).bit_count() * cosine / math.sqrt(size)

    return torch.tensor([[entry(row, column) for column in range(size)] for row in range(size)], dtype=torch.float64)


def mix(groups: tuple[tuple[int, int], ...]) -> Tensor:
    """Build the matrix of `Graded.mix`: a `hadamard` for each group of 1 to 8 bits."""
    blocks = [hadamard(size) if 0 < bits < 16 else torch.eye(size, dtype=torch.float64) for size, bits in groups]
    return torch.block_diag(*blocks)


def prune(x: Tensor, layout: Layout) -> Tensor:
    """Prune vectors as a layout does: ``unpack(pack(x, layout))``, but for the rounding of `TopK`."""
    if isinstance(layout, Graded):
        return graded_prune(x, layout.groups)
    assert isinstance(layout, TopK)
    return topk_prune(x, layout.keep)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `swan.functional.dense_attention` with its log-sum-exp; float64 stays float64."""
    group_size = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (t.to(wide).repeat_interleave(group_size, dim=1) for t in (k, v))
    scores = q.to(wide) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    if causal:
        visible = visible.tril(scores.shape[-1] - scores.shape[-2])
    scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return (_softmax(scores, visible) @ values).to(q.dtype), lse


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Compute `swan.functional.merge_attention` by its definition."""
    total = sum(lse.exp() for _, lse in parts)
    assert isinstance(total, Tensor)
    out = sum(out * (lse.exp() / total)[..., None] for out, lse in parts)
    assert isinstance(out, Tensor)
    return out.masked_fill((total == 0)[..., None], 0), total.log()


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
    """Attend over a whole sequence as decoding token by token does.

    Query i sees key j dense if ``i - j < buffer`` or j is a sink, else pruned. `padding` counts each
    row's left padding; `window_start` [queries] overrides ``i - buffer + 1`` (for ``prefill="chunk"``).
    """
    batch, _, tokens, _ = q.shape
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    first = torch.zeros(batch, dtype=torch.long) if padding is None else padding
    start = (i - buffer + 1) if window_start is None else window_start[:, None]
    sink = j[None] < first[:, None, None] + sinks
    visible = (j <= i)[None] & (j[None] >= first[:, None, None])
    dense = ((j >= start)[None] | sink).expand(batch, tokens, tokens)
    group_size = q.shape[1] // k.shape[1]
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale

    def scores(keys: Tensor) -> Tensor:
        return q @ keys.repeat_interleave(group_size, dim=1).mT * factor

    mixed = torch.where(dense[:, None], scores(k), scores(k_pruned)).masked_fill(~visible[:, None], -math.inf)
    weights = _softmax(mixed, visible[:, None])
    from_dense = torch.where(dense[:, None], weights, 0) @ v.repeat_interleave(group_size, dim=1)
    from_pruned = torch.where(dense[:, None], 0, weights) @ v_pruned.repeat_interleave(group_size, dim=1)
    return from_dense + from_pruned


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Compute the weights, zero for a query that sees nothing; NaN among its scores stays."""
    blind = ~visible.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0), dim=-1).masked_fill(blind, 0)
