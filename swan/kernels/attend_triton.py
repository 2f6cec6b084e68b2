r"""Attention over packed planes in Triton: one decode step reads each stored byte once.

A graded layout is a sum of *parts*. A code of 4, 2 or 1 bits is one part, one of 3, 5, 6 or 8 bits is two
(`swan.storage.codes.PARTS`), and as the steps of a code are symmetric about zero, so are those of each part:

$$\hat x = \sum_{\text{parts}} 2^e s\, (2f - (2^p - 1)) = \sum_{\text{parts}} 2^{e+p+1} s\, (y - c),
\qquad y = 1 + 2^{-p} f, \quad c = \tfrac32 - 2^{-p-1}$$

with a field $f$ of $p$ bits, the scale $s$ of its group, and $e$ the place of the part in the code less the bits of
the code. $y$ is a float whose mantissa begins with the bits of $f$: a shift, a mask and an OR make it, of two fields
at once in bfloat16, and it is exact. So tensor cores multiply $y$; $c$ is subtracted from sums, and scales never
touch a coordinate: for keys they multiply scores, for values weights. For that the rows of queries are repeated for
each part, zero outside of it, where a product of few rows would be padded anyway.

One program takes up to 16 rows of one KV head and a span of tokens; a second kernel merges the spans.
Where a layout keeps its bytes, scales and coordinates is read from a small table. Of a layout only widths are
compiled in: fields of 4, 2 and 1 bits take 0, d/2, d or 2d columns each (d rounded up to a power of two), so layouts
of like widths share a kernel, however they are grouped. Fewer widths would be fewer kernels (seconds to compile, once
for each machine) and more padding in every step. Bytes are loaded one by one, since parts begin anywhere; but each
only once, by neighbouring lanes from neighbouring addresses, which is less work than unpacking it.
"""

# Pyright takes kernels for Python: it cannot know what is compiled in, nor how a kernel is launched.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from swan.kernels import Recent
from swan.kernels.gpu import (
    INTERPRETED,
    MOST_PARTS,
    Form,
    check_device,
    checked_numbers,
    columns_of,
    form_of,
    power_of_two,
    scale_of,
    table_of,
    tl,
    triton,
)
from swan.storage import Packed
from swan.storage.packed import mixing

__all__ = ["attend"]

BLOCK = tl.constexpr(64)  # tokens of a tile
SPAN = 128  # tokens that are worth a program, at least
PROGRAMS = 512  # that keep a large GPU busy: about 4 for each of its processors
ROWS, PRODUCT_ROWS = 16, MOST_PARTS  # of queries in a program; and of a product, which has as many for each part
WARPS = 4
LOG2_E, LN_2 = math.log2(math.e), tl.constexpr(math.log(2))


def attend(
    q: Tensor, k: Packed, v: Packed, mask: Tensor | None, scale: float, recent: Recent | None = None
) -> tuple[Tensor, Tensor]:
    r"""Attention to stored vectors: $o_i = \sum_j p_{ij} \hat v_j$, $p_i = \mathrm{softmax}_j(s\,q_i \cdot \hat k_j)$.

    That is `packed_attention` without the mixes. With `recent` it is all of `swan_attention`: queries and outputs
    are mixed here, and the same launch reads both.

    Scores, softmax and sums are float32, and stored vectors are not rounded to the dtype of the cache, as `unpack`
    does. For bfloat16 queries weights are rounded to bfloat16, for float16 queries to 11 bits.

    Args:
        q: queries ``[batch, heads, queries, d]``, float32, bfloat16 or float16.
        k: packed keys: `Graded`, or `TopK` with a bitmap.
        v: packed values, likewise; their dimension may be another.
        mask: boolean ``[batch or 1, heads or 1, queries, tokens]``, True where a query sees a token; or None.
        scale: factor of the scores.
        recent: tokens beside the history.

    Returns:
        Output ``[batch, heads, queries, dv]`` and the log-sum-exp ``[batch, heads, queries]``, both float32; zeros
        and minus infinity where a query sees nothing.

    Raises:
        ValueError: a layout that no kernel here reads, or a device without Triton.

    Source: arXiv:2511.18936; the split over tokens is that of Flash-Decoding (Dao et al., 2023).
    """
    check_device(q)
    layouts = checked_numbers(k.format), checked_numbers(v.format)
    if recent is None:
        out, _, lse = _attend(q, list(k.tensors), list(v.tensors), mask, *layouts, scale, None, [], None)
        return out, lse
    key_mix, value_mix = mixing(k), mixing(v)
    mixed = q if key_mix is None else q @ key_mix
    beside = [recent.keys, recent.values]
    stored, dense, lse = _attend(
        mixed, list(k.tensors), list(v.tensors), mask, *layouts, scale, q, beside, recent.mask
    )  # fmt: skip
    return dense + (stored if value_mix is None else stored @ value_mix.mT.to(stored.dtype)), lse


# Of the numbers that are multiplied, and what tensor cores make of float32.
DTYPES = {
    torch.float32: (tl.float32, "ieee"),
    torch.float16: (tl.float32, "tf32"),  # its own range is too small for weights times scales
    torch.bfloat16: (tl.bfloat16, "ieee"),
}


# Not a `triton_op`: traced, the tables of layouts would be copied to the GPU in each step.
@custom_op("swan::attend_packed", mutates_args=())
def _attend(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    mask: Tensor | None,
    k_layout: list[int],
    v_layout: list[int],
    scale: float,
    recent_q: Tensor | None,
    recent: list[Tensor],
    recent_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What history and recent tokens add to the output, each in its own coordinates, and the log-sum-exp of both."""
    batch, heads, queries, d = q.shape
    kv_heads, tokens = k[0].shape[1:3]
    recents = recent[0].shape[2] if recent else 0
    k_form, v_form = form_of(*k_layout), form_of(*v_layout)
    dv = v_form.d
    out = q.new_empty(batch, heads, queries, dv, dtype=torch.float32)
    recent_out = q.new_empty(batch, heads, queries, dv if recent else 0, dtype=torch.float32)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0 or tokens + recents == 0:
        return out.zero_(), recent_out.zero_(), lse.fill_(-math.inf)
    rows = heads // kv_heads * queries
    parts = max(k_form.parts, v_form.parts)
    R = max(1, min(power_of_two(rows), ROWS, PRODUCT_ROWS // parts))
    G = max(parts, 16 // R)  # tl.dot needs 16 rows
    blocks = triton.cdiv(rows, R)
    programs = max(1, PROGRAMS // (batch * kv_heads * blocks) - (recents > 0))
    span = max(triton.cdiv(tokens + recents, programs * BLOCK.value) * BLOCK.value, SPAN)
    splits, recent_splits = triton.cdiv(tokens, span), triton.cdiv(recents, span)
    every = batch * heads * queries
    partial = q.new_empty(every, splits, sum(v_form.widths), dtype=torch.float32)
    recent_partial = q.new_empty(every, recent_splits, dv, dtype=torch.float32)
    partial_lse = q.new_empty(every, splits + recent_splits, dtype=torch.float32)
    (k_planes, k_room), (v_planes, v_room) = _planes(k, k_form), _planes(v, v_form)
    k_table, v_table = table_of(tuple(k_layout), q.device), table_of(tuple(v_layout), q.device)
    dtype, precision = DTYPES[q.dtype]
    beside: list[Any] = [None] * 3
    if recent and recent_q is not None:
        beside = [recent_q.contiguous(), *(t.flatten(0, 1).contiguous() for t in recent)]
    with torch.cuda.device_of(q):
        attend_kernel[batch * kv_heads * blocks, splits + recent_splits](
            q.contiguous(), *_seen(mask, batch, heads), partial, partial_lse, *k_planes, k_table, *v_planes, v_table,
            *beside, *_seen(recent_mask, batch, heads), recent_partial,
            rows, blocks, d, dv, tokens, recents, span, splits, k_room, v_room, kv_heads, queries, scale * LOG2_E,
            *k_form.widths, k_form.bits, k_form.sparse, *v_form.widths, v_form.bits, v_form.sparse,
            columns_of(d), columns_of(dv), R, G, dtype, precision, num_warps=WARPS,
        )  # fmt: skip
        merge_kernel[every,](
            partial, recent_partial, partial_lse, v_table, out, recent_out, lse,
            splits, recent_splits, partial.shape[2], dv, len(v_table) - 3 * dv,
            PROGRAMS, columns_of(dv), 16, bool(recent), num_warps=WARPS,
        )  # fmt: skip
    return out, recent_out, lse


@_attend.register_fake
def _(
    q: Tensor, k: Any, v: Any, mask: Any, k_layout: Any, v_layout: Any, scale: Any, recent_q: Any, recent: Any, _: Any
) -> tuple[Tensor, Tensor, Tensor]:
    form, *numbers = v_layout
    dv = numbers[0] if form else sum(numbers[::2])
    out, recent_out = (q.new_empty(*q.shape[:3], n, dtype=torch.float32) for n in (dv, dv if recent else 0))
    return out, recent_out, q.new_empty(*q.shape[:3], dtype=torch.float32)


def _seen(mask: Tensor | None, batch: int, heads: int) -> tuple[Tensor | None, int, int, int, int]:
    """A mask as bytes with its strides."""
    if mask is None:
        return None, 0, 0, 0, 0
    seen = mask.expand(batch, heads, -1, -1).view(torch.uint8)
    return seen, *seen.stride()  # pyright: ignore


def _planes(tensors: list[Tensor], form: Form) -> tuple[list[Tensor], int]:
    """Codes, values, scales and positions (any for those there are not), and how many tokens a head has room for."""
    rest = iter(tensors)
    planes = [(next(rest) if size else tensors[0]).flatten(0, 1) for size in form.sizes]
    room = planes[0].stride(0) // planes[0].shape[2]
    if any(t.stride() != (room * t.shape[2], t.shape[2], 1) for t in planes):  # not as a cache keeps them
        return [t.contiguous() for t in planes], planes[0].shape[1]
    return planes, room


# Kernels ------------------------------------------------------------------------------------------
# R rows of queries times G parts are the rows of each product; a column is a field or a value.
# What changes from step to step or with the layout must not compile another kernel.


CHANGING = ["tokens", "recents", "span", "splits", "k_room", "v_room", "mask_batch", "mask_head", "mask_query"]


@triton.jit(do_not_specialize=[*CHANGING, "recent_mask_batch", "recent_mask_head", "recent_mask_query"])
def attend_kernel(
    q, mask, mask_batch, mask_head, mask_query, mask_token, out, lse,
    k_codes, k_values, k_scales, k_positions, k_table,
    v_codes, v_values, v_scales, v_positions, v_table,
    recent_q, recent_keys, recent_values,
    recent_mask, recent_mask_batch, recent_mask_head, recent_mask_query, recent_mask_token, recent_out,
    rows, blocks, d, dv, tokens, recents, span, splits, k_room, v_room, kv_heads, queries, scale,
    K4: tl.constexpr, K2: tl.constexpr, K1: tl.constexpr, K0: tl.constexpr, KB: tl.constexpr, KS: tl.constexpr,
    V4: tl.constexpr, V2: tl.constexpr, V1: tl.constexpr, V0: tl.constexpr, VB: tl.constexpr, VS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) % blocks * R + tl.arange(0, R)
    real = row < rows
    lse += head * rows * tl.num_programs(1) + split
    if recent_keys is not None and split >= splits:
        if recent_mask is not None:
            recent_mask += head // kv_heads * recent_mask_batch
        recent_splits = tl.num_programs(1) - splits
        _attend_recent(
            recent_q + head * rows * d, recent_keys + head * recents * d, recent_values + head * recents * dv,
            recent_mask, recent_mask_head, recent_mask_query, recent_mask_token,
            recent_out + (head * rows * recent_splits + split - splits) * dv, lse,
            tl.program_id(0) % blocks * R, rows, d, dv, (split - splits) * span, recents, span,
            recent_splits, head % kv_heads, queries, scale, D, DV, R, DTYPE, PRECISION,
        )  # fmt: skip
        return
    k4 = k_table + 5
    k2, k1, k0 = k4 + 5 * K4, k4 + 5 * (K4 + K2), k4 + 5 * (K4 + K2 + K1)
    v4 = v_table + 5
    v2, v1, v0 = v4 + 5 * V4, v4 + 5 * (V4 + V2), v4 + 5 * (V4 + V2 + V1)
    q += head * rows * d
    k_codes += head * k_room * tl.load(k_table)
    k_values += head * k_room * tl.load(k_table + 1)
    k_scales += head * k_room * tl.load(k_table + 2)
    k_positions += head * k_room * tl.load(k_table + 3)
    v_codes += head * v_room * tl.load(v_table)
    v_values += head * v_room * tl.load(v_table + 1)
    v_scales += head * v_room * tl.load(v_table + 2)
    v_positions += head * v_room * tl.load(v_table + 3)
    if K4:
        q4, c4 = _queries(q, row, real, d, k4, K4, 4, G)
    if K2:
        q2, c2 = _queries(q, row, real, d, k2, K2, 2, G)
    if K1:
        q1, c1 = _queries(q, row, real, d, k1, K1, 1, G)
    if K0:
        q0, c0 = _queries(q, row, real, d, k0, K0, 0, G)
    if V4:
        o4, w4 = tl.zeros((R * G, V4), tl.float32), tl.zeros((R * G,), tl.float32)
    if V2:
        o2, w2 = tl.zeros((R * G, V2), tl.float32), tl.zeros((R * G,), tl.float32)
    if V1:
        o1, w1 = tl.zeros((R * G, V1), tl.float32), tl.zeros((R * G,), tl.float32)
    if V0:
        o0, w0 = tl.zeros((R * G, V0), tl.float32), tl.zeros((R * G,), tl.float32)
    peak = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    if mask is not None:
        mask += head // kv_heads * mask_batch
        mask += _mask_row(row, rows, head % kv_heads, queries, mask_head, mask_query)
    stop = tl.minimum((split + 1) * span, tokens)
    for start in range(split * span, stop, BLOCK):
        token = start + tl.arange(0, BLOCK)
        seen = real[:, None] & (token < stop)[None, :]
        some = True
        if mask is not None:
            seen = tl.load(mask[:, None] + token[None, :] * mask_token, mask=seen, other=0) != 0
            some = tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0
        if some:
            parts = tl.zeros((R, G, BLOCK), tl.float32)
            if K4:
                x, s = _fields(k_codes, k_scales, start, stop, k_table, k4, K4, 4, G, False, DTYPE)
                parts += _scores(q4, x, s, c4, DTYPE, PRECISION)
            if K2:
                x, s = _fields(k_codes, k_scales, start, stop, k_table, k2, K2, 2, G, False, DTYPE)
                parts += _scores(q2, x, s, c2, DTYPE, PRECISION)
            if K1:
                x, s = _fields(k_codes, k_scales, start, stop, k_table, k1, K1, 1, G, False, DTYPE)
                parts += _scores(q1, x, s, c1, DTYPE, PRECISION)
            if K0:
                x, s = _values(k_values, k_scales, k_positions, start, stop, k_table, K0, KB, KS, G)
                parts += _scores(q0, x, s, c0, DTYPE, PRECISION)
            score = tl.where(seen, tl.sum(parts, 1) * scale, float("-inf"))
            peak, fade, weight = _weights(peak, score)
            total = total * fade + tl.sum(weight, 1)
            if V4:
                x, s = _fields(v_codes, v_scales, start, stop, v_table, v4, V4, 4, G, True, DTYPE)
                o4, w4 = _weighted(o4, w4, fade, weight, x, s, DTYPE, PRECISION)
            if V2:
                x, s = _fields(v_codes, v_scales, start, stop, v_table, v2, V2, 2, G, True, DTYPE)
                o2, w2 = _weighted(o2, w2, fade, weight, x, s, DTYPE, PRECISION)
            if V1:
                x, s = _fields(v_codes, v_scales, start, stop, v_table, v1, V1, 1, G, True, DTYPE)
                o1, w1 = _weighted(o1, w1, fade, weight, x, s, DTYPE, PRECISION)
            if V0:
                x, s = _values(v_values, v_scales, v_positions, start, stop, v_table, V0, VB, VS, G)
                o0, w0 = _weighted(o0, w0, fade, weight, x, s, DTYPE, PRECISION)
    out += ((head * rows + row) * splits + split) * (V4 + V2 + V1 + V0)
    total = tl.where(peak == float("-inf"), 1.0, total)  # which saw nothing
    tl.store(lse + row * tl.num_programs(1), peak + tl.log2(total), mask=real)
    if V4:
        _store(out, o4, w4, total, real, v4, V4, 4, G)
    if V2:
        _store(out + V4, o2, w2, total, real, v2, V2, 2, G)
    if V1:
        _store(out + V4 + V2, o1, w1, total, real, v1, V1, 1, G)
    if V0:
        _store(out + V4 + V2 + V1, o0, w0, total, real, v0, V0, 0, G)


@triton.jit
def _attend_recent(
    q, keys, values, mask, mask_head, mask_query, mask_token, out, lse,
    first, rows, d, dv, start, recents, span, splits, kv_head, queries, scale,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A span of dense tokens; pointers are those of the KV head."""
    ROWS_: tl.constexpr = max(R, 16)  # pyright: ignore  # tl.dot needs 16
    row = first + tl.arange(0, ROWS_)
    real = (tl.arange(0, ROWS_) < R) & (row < rows)
    column, value_column = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
    x = tl.load(q + row[:, None] * d + column, mask=real[:, None] & (column < d), other=0)
    o = tl.zeros((ROWS_, DV), tl.float32)
    peak = tl.full((ROWS_,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS_,), tl.float32)
    if mask is not None:
        mask += _mask_row(row, rows, kv_head, queries, mask_head, mask_query)
    stop = tl.minimum(start + span, recents)
    for begin in range(start, stop, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        there = (token < stop)[:, None]
        seen = real[:, None] & (token < stop)[None, :]
        if mask is not None:
            seen = tl.load(mask[:, None] + token[None, :] * mask_token, mask=seen, other=0) != 0
        key = tl.load(keys + token[:, None] * d + column, mask=there & (column < d), other=0)
        zero = tl.zeros((ROWS_, BLOCK), tl.float32)
        score = tl.where(seen, _dot(x, tl.trans(key), zero, DTYPE, PRECISION) * scale, float("-inf"))
        peak, fade, weight = _weights(peak, score)
        total = total * fade + tl.sum(weight, 1)
        weight = _rounded(weight, DTYPE, PRECISION)
        value = tl.load(values + token[:, None] * dv + value_column, mask=there & (value_column < dv), other=0)
        o = _dot(weight, value, o * fade[:, None], DTYPE, PRECISION)
    total = tl.where(peak == float("-inf"), 1.0, total)
    tl.store(lse + row * tl.num_programs(1), peak + tl.log2(total), mask=real)
    place = out + row[:, None] * splits * dv + value_column
    tl.store(place, o / total[:, None], mask=real[:, None] & (value_column < dv))


@triton.jit
def _mask_row(row, rows, kv_head, queries, mask_head, mask_query):
    """Where the mask of a query begins."""
    head = kv_head * (rows // queries) + row // queries
    return head.to(tl.int64) * mask_head + (row % queries).to(tl.int64) * mask_query


@triton.jit
def _weights(peak, score):
    """The new peak of each row, what the old sums are worth under it, and the weights of new scores."""
    new = tl.maximum(peak, tl.max(score, 1))
    origin = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(peak - origin), tl.exp2(score - origin[:, None])


@triton.jit
def _rounded(weight, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Weights as they are multiplied."""
    if PRECISION == "tf32":  # tensor cores would cut them, and the sum would not know
        weight = (weight.to(tl.int32, bitcast=True) + 0x1000 & -0x2000).to(tl.float32, bitcast=True)
    return weight.to(DTYPE)


@triton.jit
def _queries(q, row, real, d, table, C: tl.constexpr, P: tl.constexpr, G: tl.constexpr):
    """Rows of queries for each part, zero outside of it [R * G, C], and what their products begin with [R * G, 1]."""
    coordinate = tl.load(table + tl.arange(0, C))[None, None, :]
    own = _own(table, C, G) & (coordinate >= 0) & real[:, None, None]
    x = tl.load(q + row[:, None, None] * d + coordinate, mask=own, other=0)
    x = tl.reshape(x, (row.shape[0] * G, C))
    return x, -_middle(P) * tl.sum(x.to(tl.float32), 1)[:, None]


@triton.jit
def _own(table, C: tl.constexpr, G: tl.constexpr):
    """Which columns belong to each part: [1, G, C]."""
    part = tl.load(table + C + tl.arange(0, C))
    return part[None, None, :] == tl.arange(0, G)[None, :, None]


@triton.jit
def _fields(
    codes, scales, start, stop, sizes, table,
    C: tl.constexpr, P: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Fields of P bits as floats from 1 to 2 [BLOCK, C], and the scales of parts [BLOCK, G].

    They are made in pairs of neighbours along the axis that a product sums over, tokens or columns: then those of
    bfloat16 are the registers that tensor cores take.
    """
    N: tl.constexpr = C * P // 8
    end = P * (tl.arange(0, 8 // P) + 1)  # of a field in its byte
    if TOKENS:
        token, place = start + 2 * tl.arange(0, BLOCK // 2), tl.load(table + 2 * C + tl.arange(0, N))
        a = tl.trans(_bytes(codes, token, stop, tl.load(sizes), place))[None, :, :]
        b = tl.trans(_bytes(codes, token + 1, stop, tl.load(sizes), place))[None, :, :]
        end = end[:, None, None]
    else:
        token, place = start + tl.arange(0, BLOCK), table + 2 * C + 2 * tl.arange(0, N // 2)
        a = _bytes(codes, token, stop, tl.load(sizes), tl.load(place))[:, None, :]
        b = _bytes(codes, token, stop, tl.load(sizes), tl.load(place + 1))[:, None, :]
        end = end[None, :, None]
    MASK: tl.constexpr = 2**P - 1
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        pair = (a | b << 16) << tl.maximum(7 - end, 0) >> tl.maximum(end - 7, 0)
        pair = pair & (MASK << 7 - P) * 0x10001 | 0x3F803F80
        x = tl.join((pair & 0xFFFF).to(tl.int16), (pair >> 16).to(tl.int16)).to(tl.bfloat16, bitcast=True)
    else:
        x = tl.join(a, b) << 23 >> end[:, :, :, None] & MASK << 23 - P | 0x3F800000
        x = x.to(tl.float32, bitcast=True)
    x = tl.trans(tl.reshape(x, (C, BLOCK))) if TOKENS else tl.reshape(x, (BLOCK, C))
    part = tl.arange(0, G)
    place = tl.load(table + 3 * C + part, mask=part < C, other=0)
    exponent = tl.load(table + 4 * C + part, mask=part < C, other=0)[None, :]
    return x, scale_of(_bytes(scales, start + tl.arange(0, BLOCK), stop, tl.load(sizes + 2), place), exponent)


@triton.jit
def _bytes(pointer, token, stop, width, place):
    """Bytes of tokens [tokens, places]; after the last token that one again."""
    return tl.load((pointer + tl.minimum(token, stop - 1) * width)[:, None] + place[None, :]).to(tl.int32)


@triton.jit
def _values(
    values, scales, positions, start, stop, sizes,
    C: tl.constexpr, BITS: tl.constexpr, SPARSE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Values [BLOCK, C], zero where a vector has none, and their scale [BLOCK, G]."""
    column, token = tl.arange(0, C)[None, :], tl.minimum(start + tl.arange(0, BLOCK), stop - 1)[:, None]
    kept, index = column < tl.load(sizes + 4), column
    if SPARSE:
        width = tl.load(sizes + 3)
        byte = tl.load(positions + token * width + column // 8, mask=kept, other=0).to(tl.int32)
        bit = byte >> column % 8 & 1
        kept, index = bit == 1, tl.cumsum(bit, 1) - bit
    width = tl.load(sizes + 1)
    if BITS == 4:
        byte = tl.load(values + (token * width + index // 2), mask=kept, other=0).to(tl.int32)
        x = tl.where(kept, 2 * (byte >> 4 * (index % 2) & 15) - 15, 0).to(tl.float32)
    else:
        x = tl.load(values + (token * width + index), mask=kept, other=0).to(tl.float32)
    if BITS == 4:
        scale = scale_of(tl.load(scales + token), -4)
    elif BITS == 8:
        scale = tl.load(scales + token).to(tl.float32)
    else:
        scale = tl.full((BLOCK, 1), 1.0, tl.float32)
    return x, tl.broadcast_to(scale, (BLOCK, G))


@triton.jit
def _middle(P: tl.constexpr):
    """What fields of P bits, as floats from 1 to 2, are symmetric about; values (P = 0) are about zero."""
    return 1.5 - 0.5 ** (P + 1) if P else 0.0


@triton.jit
def _scores(q, x, s, c, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """What the columns of each part add to the scores: [R, G, BLOCK]."""
    G: tl.constexpr = s.shape[1]
    products = _dot(q, tl.trans(x), tl.broadcast_to(c, (q.shape[0], BLOCK)), DTYPE, PRECISION)
    return tl.reshape(products, (q.shape[0] // G, G, BLOCK)) * tl.trans(s)[None, :, :]


@triton.jit
def _weighted(o, w, fade, weight, x, s, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Outputs [R * G, C], of which rows of other parts than a column's are never read, and sums of weights [R * G]."""
    R: tl.constexpr = weight.shape[0]
    G: tl.constexpr = s.shape[1]
    weight = tl.reshape(weight[:, None, :] * tl.trans(s)[None, :, :], (R * G, s.shape[0]))
    fade = tl.reshape(tl.broadcast_to(fade[:, None], (R, G)), (R * G,))
    weight = _rounded(weight, DTYPE, PRECISION)
    return _dot(weight, x, o * fade[:, None], DTYPE, PRECISION), w * fade + tl.sum(weight.to(tl.float32), 1)


@triton.jit
def _dot(a, b, c, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    a, b = a.to(DTYPE), b.to(DTYPE)
    if INTERPRETED:  # the interpreter takes bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _store(out, o, w, total, real, table, C: tl.constexpr, P: tl.constexpr, G: tl.constexpr):
    """Of each column the output in the row of its part, over the softmax denominator."""
    R: tl.constexpr = total.shape[0]
    o -= _middle(P) * w[:, None]
    x = tl.sum(tl.where(_own(table, C, G), tl.reshape(o, (R, G, C)), 0.0), 1)
    tl.store(out[:, None] + tl.arange(0, C)[None, :], x / total[:, None], mask=real[:, None])


@triton.jit(do_not_specialize=["splits", "recent_splits", "columns", "first"])
def merge_kernel(
    partial, recent_partial, partial_lse, table, out, recent_out, lse, splits, recent_splits, columns, d, first,
    SPLITS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    split = tl.arange(0, SPLITS)
    every = splits + recent_splits
    partial_lse += row * every
    lses = tl.load(partial_lse + split, mask=split < every, other=float("-inf"))
    peak = tl.max(lses, 0)
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lses - origin), 0)
    whole = origin + tl.log2(tl.where(total == 0, 1.0, total))
    tl.store(lse + row, tl.where(total == 0, peak, whole * LN_2))
    a = tl.load(table + first + n, mask=n < d, other=-1)[None, :]
    b = tl.load(table + first + d + n, mask=n < d, other=-1)[None, :]
    x = tl.zeros((TILE, D), tl.float32)
    for start in range(0, splits, TILE):
        split = start + tl.arange(0, TILE)
        some = (split < splits)[:, None]
        weight = tl.load(partial_lse + split, mask=split < splits, other=float("-inf"))
        weight = tl.exp2(weight - whole)
        at = partial + (row * splits + split[:, None]) * columns
        x += weight[:, None] * tl.load(at + a, mask=some & (a >= 0), other=0)
        x += weight[:, None] * tl.load(at + b, mask=some & (b >= 0), other=0)
    tl.store(out + row * d + n, tl.sum(x, 0), mask=n < d)
    if RECENT:
        x = tl.zeros((TILE, D), tl.float32)
        for start in range(0, recent_splits, TILE):
            split = start + tl.arange(0, TILE)
            some = (split < recent_splits)[:, None]
            weight = tl.load(partial_lse + splits + split, mask=split < recent_splits, other=float("-inf"))
            at = recent_partial + (row * recent_splits + split[:, None]) * d
            x += tl.exp2(weight - whole)[:, None] * tl.load(at + n[None, :], mask=some & (n < d)[None, :], other=0)
        tl.store(recent_out + row * d + n, tl.sum(x, 0), mask=n < d)
