"""A trellis code: the strongest way we know to spend two or three bits on each coordinate of a normal vector."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from swan.evaluation.baselines.codes import normal_grid
from swan.storage import Packed
from swan.storage.codes import code_bytes, pack_code, unpack_code
from swan.storage.mixing import mix_of

__all__ = ["Trellis"]

STATES = 256
SUBSETS = 4
TAPS = 94, 191  # bits of a state that say which subsets it leads to; the best of 60 drawn, for normal vectors
SHRUNK = 0.85  # the grid over the best one for a coordinate alone, likewise
CHUNK = 2048  # vectors whose paths are searched at a time


@dataclass(frozen=True)
class Trellis:
    r"""Codes on a trellis of 256 states after a Hadamard transform: scored for quality, no fast code reads it.

    The points of a normal grid of one bit more belong to four subsets in turn. Each code of $b$ bits moves the state by
    its lowest bit, $s \to (2s + u) \bmod 256$; state and bit say the subset, and the other $b - 1$ bits the point in
    it. So $b$ bits choose among $2^{b+1}$ points, of which each state allows half; the nearest path is found by the
    Viterbi algorithm. The first state takes a byte, a factor 2 bytes: ``ceil(d * bits / 8) + 3`` bytes.

    Args:
        d: head dimension.
        bits: 1 to 5.

    Source: trellis-coded quantization, Marcellin and Fischer (1990).
    """

    form: ClassVar[str] = "trellis"

    d: int
    bits: int

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Count the bytes of the codes, of the first state and of the factor."""
        return code_bytes(self.d, self.bits) + 3

    def pack(self, x: Tensor) -> Packed:
        """Search the nearest path of each vector, then the factor with the least squared error."""
        mixed = x.float() @ self.mix(torch.float32, x.device)
        length = mixed.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        vectors = (mixed * (math.sqrt(self.d) / length)).reshape(-1, self.d)
        found = [nearest_paths(part, self.bits) for part in vectors.split(CHUNK)]
        first, codes = (torch.cat(parts).unflatten(0, x.shape[:-1]) for parts in zip(*found, strict=True))
        path = self._path(first, codes)
        factor = torch.linalg.vecdot(mixed, path) / path.square().sum(-1)
        planes = torch.cat([first[..., None], *pack_code(codes, self.bits)], dim=-1)
        return Packed((planes,), factor[..., None].to(torch.float16), None, self, x.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the points on the path times the factor, in mixed coordinates."""
        assert packed.scales is not None
        first, codes = packed.planes[0][..., 0], unpack_code(packed.planes[0][..., 1:], self.d, self.bits)
        return (self._path(first, codes) * packed.scales.float()).to(packed.dtype)

    def mix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a Hadamard matrix."""
        return mix_of(((self.d, self.bits),), dtype, device)

    def _path(self, first: Tensor, codes: Tensor) -> Tensor:
        """Return the points that codes stand for, from a first state on."""
        state, points = first.int(), []
        for code in codes.int().unbind(-1):
            bit = code & 1
            points.append(SUBSETS * (code >> 1) + subset(state, bit))
            state = (2 * state + bit) % STATES
        return grid_of(self.bits).to(codes.device)[torch.stack(points, dim=-1)]


def nearest_paths(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Find the path with the least squared error of each vector ``[vectors, d]``.

    Returns:
        Its first state ``[vectors]`` and its codes ``[vectors, d]``, uint8.
    """
    by_subset = grid_of(bits).to(x.device).view(-1, SUBSETS)
    new = torch.arange(STATES, device=x.device, dtype=torch.int32)
    olds = torch.stack([new // 2, new // 2 + STATES // 2])  # the two states before each
    subsets = subset(olds, new & 1).long()
    cost = x.new_zeros(len(x), STATES)
    nearest, from_second = [], []
    for number in x.unbind(1):
        error, point = (number[:, None, None] - by_subset).square().min(dim=1)
        first, second = (cost[:, old] + error[:, into] for old, into in zip(olds, subsets, strict=True))
        nearest.append(point)
        from_second.append(second < first)
        cost = torch.minimum(first, second)
    state, codes = cost.argmin(dim=1), []
    for point, second in zip(reversed(nearest), reversed(from_second), strict=True):
        choice = second.gather(1, state[:, None]).long()
        old = olds.long()[choice[:, 0], state]
        into = subsets[choice[:, 0], state]
        codes.append(2 * point.gather(1, into[:, None])[:, 0] + (state & 1))
        state = old
    return state.to(torch.uint8), torch.stack(codes[::-1], dim=1).to(torch.uint8)


def subset(state: Tensor, bit: Tensor) -> Tensor:
    """Return the subset that a state and the bit that moves it lead to: the bit chooses between two that lie apart."""
    high, low = (parity(state & taps) for taps in TAPS)
    return 2 * (bit ^ high) + low


def parity(x: Tensor) -> Tensor:
    """Return the parity of the 8 low bits."""
    for shift in (4, 2, 1):
        x = x ^ (x >> shift)
    return x & 1


@functools.cache
def grid_of(bits: int) -> Tensor:
    """Return the points of all subsets in ascending order, float32: point ``i`` belongs to subset ``i % 4``."""
    return normal_grid(bits + 1) * SHRUNK
