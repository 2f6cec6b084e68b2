"""Codes of few bits, how they lie in bytes, and the scales whose steps they count."""

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

__all__ = [
    "CLIPS", "EIGHTH", "NOT_A_NUMBER", "OCTAVE", "OFFSET", "PARTS", "SCALE_DTYPE", "as_bfloat16", "code_bytes",
    "dequantize_group", "pack_code", "quantize", "quantize_group", "row_bytes", "scale_of", "unpack_code",
]  # fmt: skip

SCALE_DTYPE = torch.bfloat16  # the range of float32; its rounding is below half a step of int8
# Bits of the parts of a code, high bits first.
PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
# Where codes of so many bits are clipped, over the root mean square of their group: steps about a tenth longer than
# those of the least squared error for normal numbers, no worse for these and better where a few are large.
CLIPS = {1: 1.0, 2: 2.2, 3: 2.6}
OCTAVE, OFFSET = 8, 128  # a scale byte c means 2 ** ((c - OFFSET) / OCTAVE)
EIGHTH = 2 ** (1 / OCTAVE)  # from a scale to the next
NOT_A_NUMBER = 255  # but this one: some number of the group is NaN, infinite, or above all scales


def quantize_group(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Code vectors: scale byte ``[..., 1]`` and codes of `bits` bits.

    With more bits than `CLIPS` has, ``|x - x_hat| <= 2 ** -bits * scale``. With those, steps are shorter, the largest
    numbers take the outermost ones, and the scale is the one of all with which ``x_hat @ x`` is nearest to ``x @ x``,
    by their ratio. Codes under the byte `NOT_A_NUMBER` are 0.
    """
    byte = _byte_of(x.abs().amax(dim=-1, keepdim=True).float())
    scale = scale_of(byte)
    part, half = x.float() / scale, 2 ** (bits - 1)
    if bits not in CLIPS:
        return byte, _codes(part, half)
    square = part.square().sum(dim=-1, keepdim=True)
    clip = CLIPS[bits] * (square / x.shape[-1]).sqrt()
    code = _codes(part / torch.where((clip > 0) & (clip < 1), clip, 1), half)
    along = (part * (code - (half - 0.5))).sum(dim=-1, keepdim=True)
    nearest = _byte_of((scale * half * square / along * EIGHTH**-0.5).nan_to_num(0))  # 0 / 0: all numbers are 0
    return torch.where(byte < NOT_A_NUMBER, nearest.clamp(max=NOT_A_NUMBER - 1), byte), code


def _codes(part: Tensor, half: int) -> Tensor:
    """Count the steps, `half` of them from 0 to 1, below numbers from -1 to 1 and beyond."""
    return ((part * half).floor() + half).clamp(0, 2 * half - 1).nan_to_num(0).to(torch.uint8)


def _byte_of(peak: Tensor) -> Tensor:
    """Return the byte of the smallest scale that is not below a number, float32, or `NOT_A_NUMBER`."""
    byte = (peak.log2() * OCTAVE).ceil() + OFFSET
    return torch.where(byte < NOT_A_NUMBER, byte.clamp(min=0), NOT_A_NUMBER).to(torch.uint8)


def dequantize_group(code: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Decode codes of `bits` bits to the middles of their steps, float32."""
    return (code - (2**bits - 1) / 2) * (scale_of(scale) * 2.0 ** (1 - bits))


def scale_of(byte: Tensor) -> Tensor:
    """Decode scale bytes to scales, float32; `NOT_A_NUMBER` to NaN, and with it all numbers of the group."""
    return torch.where(byte == NOT_A_NUMBER, math.nan, torch.exp2((byte.float() - OFFSET) / OCTAVE))


def code_bytes(size: int, bits: int) -> int:
    """Count the bytes of `size` codes: each part is rounded up."""
    return sum(-(-size * part // 8) for part in PARTS[bits])


def row_bytes(groups: Iterable[tuple[int, int]]) -> int:
    """Count the bytes of a row of codes, of groups (size, bits): a whole number of words of four bytes."""
    return -(-sum(code_bytes(size, bits) for size, bits in groups) // 4) * 4


def pack_code(code: Tensor, bits: int) -> list[Tensor]:
    """Pack each part of codes into a plane: fields of P bits follow each other, coordinate i from bit ``P i`` on."""
    planes, shift = [], bits
    for part in PARTS[bits]:
        shift -= part
        field = (code >> shift) & (2**part - 1)
        slots = 8 // part
        field = torch.nn.functional.pad(field, (0, -field.shape[-1] % slots))
        field = rearrange(field, "... (byte slot) -> ... byte slot", slot=slots)
        weights = (1 << (part * torch.arange(slots, device=code.device))).to(torch.uint8)
        planes.append((field * weights).sum(-1, dtype=torch.uint8))
    return planes


def unpack_code(planes: Tensor, size: int, bits: int) -> Tensor:
    """Return the codes that `pack_code` packed, uint8 ``[..., size]``."""
    code, start, shift = torch.zeros((), dtype=torch.uint8, device=planes.device), 0, bits
    for part in PARTS[bits]:
        shift -= part
        width = -(-size * part // 8)
        shifts = (part * torch.arange(8 // part, device=planes.device)).to(torch.uint8)
        field = (planes[..., start : start + width, None] >> shifts) & (2**part - 1)
        code = code | (rearrange(field, "... byte slot -> ... (byte slot)")[..., :size] << shift)
        start += width
    return code


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round values to int8 with a scale for each vector: ``|values - int8 * scale| <= scale / 2``.

    Within 0.8 % of the dtype's maximum the bound is `scale`, so that 127 steps stay finite. The scale of a vector with
    NaN or infinity is NaN, and with it all its values.
    """
    peak = values.abs().amax(dim=-1, keepdim=True).float()
    largest = min(torch.finfo(values.dtype).max, torch.finfo(torch.float32).max)  # scales are float32 of float64 too
    scales = torch.where(peak < math.inf, as_bfloat16((peak / 127).clamp(max=largest / 128)), math.nan)
    multiples = torch.where(scales > 0, values.float() / scales, 0)
    return multiples.round().clamp(-127, 127).to(torch.int8), scales.to(SCALE_DTYPE)


def as_bfloat16(x: Tensor) -> Tensor:
    """Round float32 numbers, not negative, to the nearest of bfloat16.

    This is done on their bits as integers, because torch.compile drops a cast to bfloat16 and back.
    """
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
