"""Hard inputs, and how far attention over packed tokens may be from attention over what was packed."""

import itertools
import math

import torch
from torch import Tensor

from swan import Graded, Layout, TopK
from swan.functional import reference
from swan.storage.codes import PARTS
from tests.coding import byte_of, scale_of, stored_range
from tests.strategies import U32, normal, unit

INPUTS = ["normal", "zeros", "constant", "duplicates", "outliers", "all scales", "cancelling"]


def hard(seed: int, kind: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Vectors ``[..., tokens, d]`` of a kind of `INPUTS`, none of them above the range of any layout."""
    x, random = normal(seed, *shape), torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    match kind:
        case "zeros":
            x = torch.where(random[..., :1] < 0.5, 0, x)
        case "constant":
            x = x[..., :1].expand(shape)
        case "duplicates":
            x = x[..., :1, :].expand(shape)
        case "outliers":
            x = torch.where(random < 0.03, 1e4 * x.sign(), x)
        case "all scales":
            x = x * torch.exp2(24 * random[..., :1] - 14)
        case "cancelling":
            x = 100 * x[..., :1, :] + 0.1 * x
    return x.to(dtype)


def norms(x: Tensor) -> Tensor:
    """The length of each vector, float64."""
    return x.double().norm(dim=-1)


# What a layout discards ---------------------------------------------------------------------------


def discarded(x: Tensor, layout: Layout) -> Tensor:
    """The most that the length of ``unpack(pack(x, layout)) - x`` can be, by the documentation of the layouts.

    Float64 ``[..., tokens]``: the energy of pruned coordinates, what `stored_range` allows those that are coded, and
    the roundings of the numbers and of the mix, which is a product in the dtype with a matrix that is rounded to it.
    """
    u, wide = unit(x.dtype), x.double()
    if isinstance(layout, TopK):
        energy = discarded_by_topk(wide, layout)
    else:
        assert isinstance(layout, Graded)
        energy, start = torch.zeros_like(wide[..., 0]), 0
        for size, bits in layout.groups:
            group = wide[..., start : start + size]
            start += size
            if bits == 0:
                energy += group.square().sum(-1)
            if bits in PARTS:
                rounding = (2 * u + (size + 4) * U32) * group.norm(dim=-1, keepdim=True)
                mixed = group @ reference.hadamard(size)
                least, most, _, _ = stored_range(mixed, rounding, bits)
                energy += torch.maximum((most - mixed).abs(), (mixed - least).abs()).square().sum(-1)
    # Stored numbers are rounded to the dtype when they are unpacked, and where they are mixed back.
    back = 2 * u * (1 + layout.d**0.5) * (wide.norm(dim=-1) + energy.sqrt())
    return energy.sqrt() + back + layout.d**0.5 * torch.finfo(x.dtype).smallest_normal


def discarded_by_topk(x: Tensor, layout: TopK) -> Tensor:
    ranked = x.abs().sort(dim=-1, descending=True).values
    energy, peak = ranked[..., layout.keep :].square().sum(-1), ranked[..., 0]
    if layout.bits == 8:  # half a step, of a scale that is rounded to bfloat16
        return energy + layout.keep * (peak / 254 * (1 + 2.0**-7)) ** 2
    if layout.bits == 4:
        return energy + layout.keep * (2.0**-4 * scale_of(byte_of(peak * (1 + 2.0**-20)))) ** 2
    return energy


# What that does to attention ----------------------------------------------------------------------


def attention_error(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, scale: float, layouts: tuple[Layout, Layout],
    dense: Tensor | None = None, visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The most that an output can be off, as a length, and a log-sum-exp, each ``[batch, heads, queries]``.

    The derivation is in tests/functional/test_numerics.py. Rounding moves scores and values too:

    - a score is `d` products and sums of float32, and a query that is mixed is rounded to the dtype or, by the kernel,
      to 2 ** -15 of its largest coordinate; torch's exponentials in 16 bits are off by up to 2 ** -13;
    - weights, outputs of parts and the merged output are rounded to the dtype, weights times scales by the kernel to
      2 ** -15 of the largest of 64 tokens, and sums over tokens are of float32.

    Args:
        q: queries ``[batch, heads, queries, d]``.
        k: keys before they were packed ``[batch, kv_heads, tokens, d]``.
        v: values, likewise.
        e: what was discarded of the keys, ``[batch, kv_heads, tokens]``.
        f: what was discarded of the values.
        scale: factor of the scores.
        layouts: those of keys and values.
        dense: which tokens a query sees dense, like the weights; None: none.
        visible: which it sees at all; None: all.
    """
    group, tokens, u = q.shape[1] // k.shape[1], k.shape[2], unit(q.dtype)
    k, v, e, f = (t.double().repeat_interleave(group, dim=1) for t in (k, v, e, f))
    q, e, f = q.double(), e[:, :, None], f[:, :, None]
    mixed = [isinstance(layout, Graded) and layout.mixed for layout in layouts]
    largest = scale * norms(q)[..., None] * (norms(k)[:, :, None] + e)
    loose = U32 * (2 * k.shape[3] + 8) + mixed[0] * k.shape[3] ** 0.5 * (2.0**-15 + 2 * u)
    moves = (
        scale * norms(q)[..., None] * torch.where(dense, 0, e) if dense is not None else scale * norms(q)[..., None] * e
    )
    moves = moves + loose * largest + (tokens + 16) * U32 + 2.0**-13 * (u > U32)
    scores = scale * q @ k.mT
    if visible is not None:
        scores, moves = scores.masked_fill(~visible, -math.inf), torch.where(visible, moves, 0)
    p = torch.softmax(scores, dim=-1).nan_to_num(0)
    out = p @ v
    most = moves.exp() / (p * (-moves).exp()).sum(-1, keepdim=True).clamp(min=1e-300)
    least = (-moves).exp() / (p * moves.exp()).sum(-1, keepdim=True).clamp(min=1e-300)
    f = f if dense is None else torch.where(dense, 0, f)
    lengths = norms(v)[:, :, None] + f
    coded = (2.0**-15 + 2 * u) * k.shape[3] ** 0.5 * mixed[1]
    f = f + (6 * u + 2 * tokens * U32) * lengths
    change = torch.maximum(most - 1, 1 - least)
    apart = (v[:, :, None] - out[:, :, :, None]).norm(dim=-1)
    total = (p * most * f).sum(-1) + (p * change * apart).sum(-1)
    # Numbers of 2 bytes are steps of the largest weight times scale in 64 tokens; a weight below the smallest normal
    # number of the dtype is off by u times that.
    tiny = torch.finfo(torch.float16).smallest_normal * u if u > U32 else 1e-30
    total = total + min(tokens, 64) * 2 * coded * (p * most * lengths).amax(-1) + tokens * tiny * lengths.amax(-1)
    total = total + v.shape[3] ** 0.5 * tiny
    return total, moves.amax(-1)


def dense_tokens(chunks: list[int], buffer: int, sinks: int, windowed: bool) -> Tensor:
    """Which tokens the queries of a sequence in chunks see dense, ``[queries, tokens]``, as `KVCache` says."""
    tokens = sum(chunks)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    starts = [
        start for start, size in zip(itertools.accumulate([0, *chunks[:-1]]), chunks, strict=True) for _ in range(size)
    ]
    turn = i if windowed else torch.tensor(starts)[:, None]
    return (j > turn - buffer) | (j < sinks)
