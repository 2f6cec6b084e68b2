"""What groups of few bits may be stored as, by the documentation of `Graded`: an oracle for tests that read bytes."""

import torch
from torch import Tensor

__all__ = ["byte_of", "scale_of", "stored_range"]

U32 = torch.finfo(torch.float32).eps / 2
CLIPS = {1: 1.0, 2: 2.2, 3: 2.6}  # over the root mean square of a group
MOST = 254  # the byte of the largest scale; 255 is for what has none


def scale_of(byte: Tensor) -> Tensor:
    """The scale of a byte, float64."""
    return torch.exp2((byte.double() - 128) / 8)


def byte_of(peak: Tensor, tolerance: float = 0.0) -> Tensor:
    """The byte, float64, of the smallest scale that is not below a number, in eighths of an octave plus a tolerance."""
    byte = (8 * peak.log2() + 128 + tolerance).ceil().clamp(min=0)
    return torch.where(byte > MOST, MOST + 1.0, byte)


def stored_range(x: Tensor, slack: Tensor | float, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The least and the most that numbers of a group, and the byte of its scale, are read back as.

    Args:
        x: mixed coordinates of a group, float64 ``[..., size]``.
        slack: how far those that were packed may be from these, not below 0.
        bits: of the group, below 16.

    Returns:
        Two tensors like `x`, and two ``[..., 1]``.
    """
    half, size = 2.0 ** (bits - 1), x.shape[-1]
    off = (size + 16) * U32  # of sums and quotients in float32
    slack = slack + off * x.abs()
    small, large = (x.abs() - slack).clamp(min=0), x.abs() + slack
    first, last = (byte_of(t.amax(-1, keepdim=True), 1e-5 * sign) for t, sign in ((small, -1), (large, 1)))
    if bits not in CLIPS:
        reach = slack + scale_of(last) * (1 + off) / (2 * half)
        return x - reach, x + reach, first, last
    squares = [t.square().sum(-1, keepdim=True) for t in (small, large)]
    shortest, longest = (
        torch.minimum(scale_of(byte), CLIPS[bits] * (square / size).sqrt() * (1 + sign * off)).clamp(min=1e-300) / half
        for byte, square, sign in zip((first, last), squares, (-1, 1), strict=True)
    )
    low, high = x - slack, x + slack
    least = (low / torch.where(low < 0, shortest, longest)).floor().clamp(-half, half - 1) + 0.5
    most = (high / torch.where(high < 0, longest, shortest)).floor().clamp(-half, half - 1) + 0.5
    outer = torch.maximum(least.abs(), most.abs())
    inner = torch.where(least * most > 0, torch.minimum(least.abs(), most.abs()), -outer)  # the sign is not known
    along = [torch.where(inner > 0, small, large) * inner, large * outer]
    shortest, longest = (t.sum(-1, keepdim=True) for t in along)
    scales = half * squares[0] / longest, half * squares[1] / shortest.clamp(min=0)
    bytes_ = [byte_of(s.nan_to_num(0, posinf=1e9), 1e-5 * sign - 0.5) for s, sign in zip(scales, (-1, 1), strict=True)]
    lowest, highest = (
        torch.where(plain > MOST, plain, nearest.clamp(max=MOST))
        for plain, nearest in zip((first, last), bytes_, strict=True)
    )
    found = torch.stack([u * scale_of(byte) / half for u in (least, most) for byte in (lowest, highest)])
    return found.amin(0) - off * found.abs().amax(0), found.amax(0) + off * found.abs().amax(0), lowest, highest
