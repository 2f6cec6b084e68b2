"""Rivals that code each token on its own: layouts, so that they share buffer, sinks and attention with swan."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch
from einops import rearrange
from torch import Tensor

from swan.functional import random_rotation
from swan.storage import Packed
from swan.storage.codes import code_bytes, pack_code, unpack_code

__all__ = ["BlockBits", "Float4", "Float8", "LloydMax", "block_bits", "normal_grid", "sphere_grid"]

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of e2m1
FLOAT4_BLOCK = 16  # coordinates that share a scale
MOST_BITS = 8  # of a coordinate of a rotary block


@dataclass(frozen=True)
class Float8:
    """Every coordinate as an 8-bit float (e4m3) without scale: the fp8 cache of most servers. ``d`` bytes.

    Args:
        d: head dimension.

    Source: Micikevicius et al., arXiv:2209.05433.
    """

    form: ClassVar[str] = "fp8"

    d: int

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Return one byte for each coordinate."""
        return self.d

    def pack(self, x: Tensor) -> Packed:
        """Code coordinates as the nearest 8-bit floats."""
        limit = torch.finfo(torch.float8_e4m3fn).max
        codes = x.clamp(-limit, limit).to(torch.float8_e4m3fn).view(torch.uint8)
        return Packed((codes,), None, None, self, x.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the 8-bit floats in the dtype of the cache."""
        return packed.planes[0].view(torch.float8_e4m3fn).to(packed.dtype)

    def mix(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: nothing is mixed."""


@dataclass(frozen=True)
class Float4:
    """Every coordinate as a 4-bit float (e2m1), with an 8-bit float (e4m3) as the scale of every 16: as in NVFP4.

    ``d / 2 + d / 16`` bytes. A scale is the largest magnitude over 6, the largest of e2m1.

    Args:
        d: head dimension, a multiple of 16.
        unit: constant that scales are multiples of; not counted, there is one for a layer.

    Raises:
        ValueError: `d` is no multiple of 16.

    Source: NVFP4, arXiv:2509.25149.
    """

    form: ClassVar[str] = "nvfp4"

    d: int
    unit: float = 1.0

    def __post_init__(self) -> None:
        if self.d % FLOAT4_BLOCK:
            raise ValueError(f"NVFP4 needs a head dimension that is a multiple of {FLOAT4_BLOCK}, got {self.d}")

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Count half a byte for each coordinate, and a byte for each scale."""
        return self.d // 2 + self.d // FLOAT4_BLOCK

    def pack(self, x: Tensor) -> Packed:
        """Code coordinates as the nearest multiples of their scale."""
        blocks = rearrange(x.float() / self.unit, "... (n c) -> ... n c", c=FLOAT4_BLOCK)
        limit = torch.finfo(torch.float8_e4m3fn).max
        scale = (blocks.abs().amax(dim=-1) / FLOAT4[-1]).clamp(max=limit).to(torch.float8_e4m3fn)
        multiple = blocks / scale.float().clamp(min=1e-30)[..., None]
        grid = torch.tensor(FLOAT4, device=x.device)
        magnitude = torch.bucketize(multiple.abs(), (grid[1:] + grid[:-1]) / 2)
        code = rearrange(magnitude + 8 * (multiple < 0), "... n c -> ... (n c)").to(torch.uint8)
        return Packed((torch.cat(pack_code(code, 4), dim=-1),), scale.view(torch.uint8), None, self, x.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Return multiples of the scales."""
        assert packed.scales is not None
        code = unpack_code(packed.planes[0], self.d, 4).int()
        grid = torch.tensor(FLOAT4, device=code.device)
        value = grid[code & 7] * (1 - 2 * (code >> 3))
        scale = packed.scales.view(torch.float8_e4m3fn).float() * self.unit
        return (value * scale.repeat_interleave(FLOAT4_BLOCK, dim=-1)).to(packed.dtype)

    def mix(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: nothing is mixed."""


@dataclass(frozen=True)
class LloydMax:
    r"""Every coordinate on the Lloyd-Max grid of a normal distribution, and the length of the vector in 16 bits.

    After a random rotation the coordinates of a vector, times $\sqrt d / \lVert x \rVert$, are close to
    standard normal; the grid has the least squared error for that. ``ceil(d * bits / 8) + 2`` bytes.

    Args:
        d: head dimension.
        bits: 1 to 6, or 8.

    Source: TurboQuant, arXiv:2504.19874.
    """

    form: ClassVar[str] = "random-rotation"

    d: int
    bits: int

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Count the bytes of the codes and of the length."""
        return code_bytes(self.d, self.bits) + 2

    def pack(self, x: Tensor) -> Packed:
        """Code coordinates as the nearest grid points."""
        length = x.float().norm(dim=-1, keepdim=True).to(torch.float16)
        grid = normal_grid(self.bits).to(x.device)
        unit = x.float() * (math.sqrt(self.d) / length.float().clamp(min=1e-30))
        code = torch.bucketize(unit, (grid[1:] + grid[:-1]) / 2).to(torch.uint8)
        return Packed((torch.cat(pack_code(code, self.bits), dim=-1),), length, None, self, x.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Return grid points times the length."""
        code = unpack_code(packed.planes[0], self.d, self.bits)
        assert packed.scales is not None
        grid = normal_grid(self.bits).to(code.device)
        return (grid[code.int()] * (packed.scales.float() / math.sqrt(self.d))).to(packed.dtype)

    def mix(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: nothing is mixed."""


@functools.cache
def normal_grid(bits: int) -> Tensor:
    """Compute the grid of ``2 ** bits`` points with the least squared error for a standard normal variable, float32.

    Example:
        >>> normal_grid(2)
        tensor([-1.5104, -0.4528,  0.4528,  1.5104])
    """
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    count = 2**bits
    grid = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(2000):
        middle = (grid[1:] + grid[:-1]) / 2
        edges = torch.cat([middle.new_tensor([-torch.inf]), middle, middle.new_tensor([torch.inf])])
        density = torch.where(edges.isinf(), 0, normal.log_prob(edges.clamp(-40, 40)).exp())
        mass = normal.cdf(edges.clamp(-40, 40))
        grid = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return grid.float()


@dataclass(frozen=True)
class BlockBits:
    r"""Every coordinate with bits of its own, the same of a rotary block; those of equal bits are coded together.

    The coordinates of a KV head that have $b$ bits are one vector $x$ of $n$ coordinates. It is rotated at random, and
    stored as its length in 16 bits and the codes of $x / \lVert x \rVert$ on the grid with the least squared error for
    a coordinate of a random unit vector (`sphere_grid`). With the same bits everywhere this is the coder of values.

    ``ceil(sum(bits) / 8)`` bytes, and 2 for each group of the KV head that has the most.

    Args:
        bits: of each coordinate of each KV head, 1 to 8; their sums are equal.

    Raises:
        ValueError: the sums differ.

    Source: Block-GTQ, arXiv:2606.24033; its coder is TurboQuant's, arXiv:2504.19874.
    """

    form: ClassVar[str] = "block-gtq"

    bits: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len({sum(head) for head in self.bits}) > 1:
            raise ValueError(f"expected KV heads of as many bits each, got {[sum(head) for head in self.bits]}")

    @property
    def d(self) -> int:
        """Head dimension."""
        return len(self.bits[0])

    @property
    def about(self) -> dict[str, float]:
        """Return what a table says of the layout: the mean of the bits."""
        return {"d": self.d, "bits": sum(self.bits[0]) / self.d}

    @property
    def lengths(self) -> int:
        """Count the groups of the KV head that has the most."""
        return max(len(set(head)) for head in self.bits)

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Count the bytes of the codes and of the lengths."""
        return -(-sum(self.bits[0]) // 8) + 2 * self.lengths

    def pack(self, x: Tensor) -> Packed:
        """Code the groups of each KV head; all codes are one string of bits."""
        heads = [self._pack_head(x[:, h].float(), h) for h in range(x.shape[1])]
        planes, lengths = (torch.stack(parts, dim=1) for parts in zip(*heads, strict=True))
        return Packed((planes,), lengths, None, self, x.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the groups, rotated back, each at the coordinates it came from."""
        assert packed.scales is not None
        pairs = zip(packed.planes[0].unbind(1), packed.scales.float().unbind(1), strict=True)
        heads = [self._unpack_head(plane, lengths, h) for h, (plane, lengths) in enumerate(pairs)]
        return torch.stack(heads, dim=1).to(packed.dtype)

    def mix(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: groups are rotated back as they are unpacked."""

    def _groups(self, head: int) -> list[tuple[int, list[int]]]:
        """List the groups of a KV head: bits, and the coordinates that have them."""
        own = self.bits[head]
        return [(bits, [i for i, b in enumerate(own) if b == bits]) for bits in sorted(set(own))]

    def _pack_head(self, x: Tensor, head: int) -> tuple[Tensor, Tensor]:
        fields: list[Tensor] = []
        lengths = x.new_zeros(*x.shape[:-1], self.lengths, dtype=torch.float16)
        for place, (bits, coordinates) in enumerate(self._groups(head)):
            group = x[..., coordinates]
            length = group.norm(dim=-1, keepdim=True).to(torch.float16)
            lengths[..., place] = length[..., 0]
            unit = group @ group_rotation(len(coordinates), head, x.device) / length.float().clamp(min=1e-30)
            grid = sphere_grid(bits, len(coordinates)).to(x.device)
            code = torch.bucketize(unit, (grid[1:] + grid[:-1]) / 2)
            fields.append((code[..., None] >> torch.arange(bits, device=x.device) & 1).flatten(-2))
        return pack_code(torch.cat(fields, dim=-1).to(torch.uint8), 1)[0], lengths

    def _unpack_head(self, plane: Tensor, lengths: Tensor, head: int) -> Tensor:
        string = unpack_code(plane, sum(self.bits[head]), 1).int()
        out, start = lengths.new_empty(*plane.shape[:-1], self.d), 0
        for place, (bits, coordinates) in enumerate(self._groups(head)):
            size = len(coordinates)
            fields = string[..., start : start + size * bits].unflatten(-1, (size, bits))
            code = (fields << torch.arange(bits, device=plane.device)).sum(-1)
            unit = sphere_grid(bits, size).to(plane.device)[code]
            out[..., coordinates] = unit @ group_rotation(size, head, plane.device).mT * lengths[..., place, None]
            start += size * bits
        return out


def block_bits(energy: Tensor, mean: float) -> Tensor:
    r"""Give whole numbers of bits to rotary blocks: one each, then one at a time where $s\,4^{-b}$ falls most.

    Args:
        energy: $s$ of each block of each KV head ``[kv_heads, blocks]``: half the mean squares of queries and keys.
        mean: bits of a block on average.

    Returns:
        Bits, int64 ``[kv_heads, blocks]``, at most 8.

    Example:
        >>> block_bits(torch.tensor([[100.0, 10.0, 1.0, 1.0]]), 2)
        tensor([[4, 2, 1, 1]])

    Source: Block-GTQ, arXiv:2606.24033.
    """
    bits = torch.ones_like(energy, dtype=torch.int64)
    for _ in range(round((mean - 1) * energy.shape[1])):
        gain = torch.where(bits < MOST_BITS, energy * 4.0**-bits, -1.0)
        bits.scatter_add_(1, gain.argmax(dim=1, keepdim=True), bits.new_ones(len(bits), 1))
    return bits


@functools.cache
def group_rotation(size: int, seed: int, device: torch.device) -> Tensor:
    """Draw a random rotation ``[size, size]``, always the same of a seed."""
    return random_rotation(1, size, seed=seed, dtype=torch.float32, device=device)[0]


@functools.cache
def sphere_grid(bits: int, n: int) -> Tensor:
    r"""Compute the grid of ``2 ** bits`` points with the least squared error for a coordinate of a random unit vector.

    Of $n$ coordinates. That is $\cos\varphi$, where $\varphi$ has the density $\sin^{n-2}\varphi$; of large $n$ it is
    nearly normal with the variance $1/n$. float32.

    Example:
        >>> sphere_grid(2, 64) * 8
        tensor([-1.5000, -0.4521,  0.4521,  1.5000])
    """
    steps, count = 1 << 14, 2**bits
    angle = torch.pi * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    edge, middle = angle.cos(), ((angle[1:] + angle[:-1]) / 2).cos()
    weight = (1 - middle**2) ** (n / 2 - 1)
    below = [torch.cat([t.new_zeros(1), t.cumsum(0)]) for t in (weight, weight * middle)]  # each edge

    def between(stops: Tensor) -> tuple[Tensor, Tensor]:
        at = [numpy.interp(stops, edge, each) for each in below]
        mass, moment = (torch.from_numpy(each).diff() for each in at)
        return mass, moment

    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    grid = torch.from_numpy(numpy.interp(share * below[0][-1], below[0], edge))
    for _ in range(300):
        mass, moment = between(torch.cat([edge[:1], (grid[1:] + grid[:-1]) / 2, edge[-1:]]))
        grid = torch.where(mass > 0, moment / mass.clamp(min=1e-300), grid)
    return grid.float()
