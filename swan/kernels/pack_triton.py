r"""Packing in Triton: a vector is mixed, quantized and laid out by one program, in one launch.

For `Graded` a program computes $u = 1 + y / s$ with the mixed coordinates $y$ and the scale $s$ of each one's group.
The field of a part with $p$ bits is then $\lfloor 2^{p-e} u \rfloor \bmod 2^p$ with the exponent $e$ of `gpu.table_of`:
the steps of fewer bits are those of more without their last bits. For `TopK` it counts how many coordinates are larger
than each.
"""

# Pyright takes kernels for Python: it cannot know what is compiled in, nor how a kernel is launched.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import torch
from torch import Tensor
from torch.library import custom_op

from swan.kernels.gpu import (
    OCTAVE_,
    OFFSET_,
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
from swan.storage import Layout, Packed
from swan.storage.codes import SCALE_DTYPE
from swan.storage.packed import check_vectors

__all__ = ["store"]

TILE = tl.constexpr(16)  # coordinates that are multiplied, or compared, with all at a time
WARPS = 4


def store(x: Tensor, layout: Layout) -> Packed:
    """`swan.pack`: the same but for values within rounding of the edge of a step, and which of equals top-k keeps.

    Mixed coordinates are not rounded to the dtype of `x` before they are quantized.

    Args:
        x: ``[batch, heads, tokens, d]``, float32, bfloat16 or float16.
        layout: `Graded`, or `TopK` with a bitmap.

    Returns:
        The stored tensors.

    Raises:
        ValueError: a layout that no kernel here knows, a device without Triton, or `x` does not fit the layout.
        TypeError: `x` is not floating point.

    Source: arXiv:2511.18936.
    """
    if not torch.compiler.is_compiling():
        check_vectors(x, layout)
    check_device(x)
    numbers = checked_numbers(layout)
    stored = _pack(x, layout.mix(x.dtype, x.device), numbers)
    codes, values, scales, positions = (t if t.shape[3] else None for t in stored)
    return Packed(tuple(t for t in (codes, values) if t is not None), scales, positions, layout, x.dtype)


@custom_op("swan::pack_packed", mutates_args=())
def _pack(x: Tensor, mix: Tensor | None, numbers: list[int]) -> list[Tensor]:
    """Codes, values, scales and positions, of no size where there are none."""
    tensors, form, d = _empty(x, numbers), form_of(*numbers), x.shape[3]
    codes, values, scales, positions = (t if t.shape[3] else None for t in tensors)
    vectors = x.shape[0] * x.shape[1] * x.shape[2]
    if vectors == 0:
        return tensors
    with torch.cuda.device_of(x):
        if numbers[0]:
            keep = numbers[2]
            topk_kernel[vectors,](
                x.contiguous(), values, scales, positions, d, keep, form.sizes[1], form.sizes[3],
                torch.finfo(x.dtype).max / 128, form.widths[3], power_of_two(form.sizes[1]), form.bits, num_warps=WARPS,
            )  # fmt: skip
        else:
            table = table_of(tuple(numbers), x.device)
            graded_kernel[vectors,](
                x.contiguous(), mix, codes, values, scales, table, len(table) - d, d,
                columns_of(d), *form.widths, power_of_two(max(form.sizes[2], 1)), num_warps=WARPS,
            )  # fmt: skip
    return tensors


@_pack.register_fake
def _(x: Tensor, mix: Tensor | None, numbers: list[int]) -> list[Tensor]:
    return _empty(x, numbers)


def _empty(x: Tensor, numbers: list[int]) -> list[Tensor]:
    form = form_of(*numbers)
    value = {16: x.dtype, 8: torch.int8, 4: torch.uint8}[form.bits]
    dtypes = torch.uint8, value, SCALE_DTYPE if form.bits == 8 else torch.uint8, torch.uint8
    return [x.new_zeros(*x.shape[:3], size, dtype=dtype) for size, dtype in zip(form.sizes, dtypes, strict=True)]


@triton.jit(do_not_specialize=["scale_row"])
def graded_kernel(
    x, mix, codes, values, scales, table, scale_row, d,
    D: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr, W1: tl.constexpr, W0: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    vector, n = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    x += vector * d
    if codes is not None:
        y = tl.zeros((D,), tl.float32)
        for start in range(0, d, TILE):
            m = start + tl.arange(0, TILE)
            row = tl.load(mix + m[:, None] * d + n[None, :], mask=(m < d)[:, None] & (n < d)[None, :], other=0)
            y += tl.sum(tl.load(x + m, mask=m < d, other=0).to(tl.float32)[:, None] * row.to(tl.float32), 0)
        group = tl.arange(0, G)[:, None]
        own = tl.load(table + scale_row + n, mask=n < d, other=-1)[None, :] == group
        byte = _scale_byte(tl.max(tl.where(own, tl.abs(y)[None, :], 0.0), 1))
        count = tl.load(table + 2)
        tl.store(scales + vector * count + tl.arange(0, G), byte.to(tl.uint8), mask=tl.arange(0, G) < count)
        scale = tl.sum(tl.where(own, scale_of(byte, 0)[:, None], 0.0), 0)
        u = y / tl.where(scale > 0, scale, 1.0) + 1
        codes += vector * tl.load(table)
        at = table + 5
        if W4:
            _store_fields(codes, u, at, W4, 4)
        at += 5 * W4
        if W2:
            _store_fields(codes, u, at, W2, 2)
        at += 5 * W2
        if W1:
            _store_fields(codes, u, at, W1, 1)
    if values is not None:
        column = tl.arange(0, W0)
        coordinate = tl.load(table + 5 + 5 * (W4 + W2 + W1) + column)
        whole = tl.load(x + coordinate, mask=coordinate >= 0, other=0)
        tl.store(values + vector * tl.load(table + 1) + column, whole, mask=coordinate >= 0)


@triton.jit
def _store_fields(codes, u, table, C: tl.constexpr, P: tl.constexpr):
    """Bytes of the parts with P bits; C and what the table says are those of `gpu.table_of`."""
    N: tl.constexpr = C * P // 8
    column, byte = tl.arange(0, C), tl.arange(0, N)
    coordinate, part = tl.load(table + column), tl.load(table + C + column)
    steps = tl.exp2((P - tl.load(table + 4 * C + part)).to(tl.float32))
    code = tl.minimum(tl.maximum(tl.floor(tl.gather(u, tl.maximum(coordinate, 0), 0) * steps), 0.0), 2 * steps - 1)
    field = tl.where(coordinate >= 0, code.to(tl.int32) & 2**P - 1, 0)
    slot = tl.arange(0, 8 // P)[:, None]
    packed = tl.sum(tl.reshape(field, (8 // P, N)) << P * slot, 0)
    real = tl.load(table + byte) >= 0  # a byte has a field in its first slot
    tl.store(codes + tl.load(table + 2 * C + byte), packed.to(tl.uint8), mask=real)


@triton.jit(do_not_specialize=["keep", "width", "position_width"])
def topk_kernel(
    x, values, scales, positions, d, keep, width, position_width, most,
    D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    vector, n = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    x += vector * d
    value = tl.load(x + n, mask=n < d, other=0)
    y = value.to(tl.float32)
    size = tl.where(n < d, tl.abs(y), -1.0)
    index, kept = n, n < keep
    if positions is not None:
        rank = tl.zeros((D,), tl.int32)
        for start in range(0, d, TILE):
            m = start + tl.arange(0, TILE)[:, None]
            other = tl.abs(tl.load(x + m, mask=m < d, other=0).to(tl.float32))
            first = (other > size[None, :]) | (other == size[None, :]) & (m < n[None, :])
            rank += tl.sum((first & (m < d)).to(tl.int32), 0)
        kept = rank < keep
        bit = kept.to(tl.int32)
        index = tl.cumsum(bit, 0) - bit
        byte = tl.arange(0, D // 8)
        bits = tl.sum(tl.reshape(bit, (D // 8, 8)) << tl.arange(0, 8)[None, :], 1)
        tl.store(positions + vector * position_width + byte, bits.to(tl.uint8), mask=byte < position_width)
    values += vector * width
    peak = tl.max(tl.where(kept, tl.abs(y), 0.0), 0)
    if BITS == 16:
        tl.store(values + index, value, mask=kept)
    elif BITS == 8:
        scale = _as_bfloat16(tl.minimum(peak / 127, most))
        steps = tl.where(scale > 0, y / tl.where(scale > 0, scale, 1.0), 0.0)
        code = tl.minimum(tl.maximum(tl.floor(steps + 0.5), -127.0), 127.0)
        tl.store(scales + vector, scale.to(tl.bfloat16))
        tl.store(values + index, code.to(tl.int8), mask=kept)
    else:
        byte = _scale_byte(peak)
        code = tl.minimum(tl.maximum(tl.floor((y / scale_of(byte, 0) + 1) * 8), 0.0), 15.0).to(tl.int32)
        place = tl.arange(0, W)[:, None]
        low, high = (index[None, :] == 2 * place) & kept[None, :], (index[None, :] == 2 * place + 1) & kept[None, :]
        packed = tl.sum(tl.where(low, code[None, :], 0) + tl.where(high, code[None, :] << 4, 0), 1)
        tl.store(scales + vector, byte.to(tl.uint8))
        tl.store(values + tl.arange(0, W), packed.to(tl.uint8), mask=tl.arange(0, W) < width)


@triton.jit
def _scale_byte(peak):
    """The byte of the smallest scale that is not below a peak, as float."""
    octaves = tl.ceil(tl.log2(tl.maximum(peak, 1e-30)) * OCTAVE_)
    return tl.minimum(tl.maximum(octaves, -OFFSET_), 255 - OFFSET_) + OFFSET_


@triton.jit
def _as_bfloat16(x):
    """A float32 that is not negative, rounded to the nearest bfloat16, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + (bits >> 16 & 1) & -0x10000).to(tl.float32, bitcast=True)
