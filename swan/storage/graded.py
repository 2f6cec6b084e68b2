"""`Graded`: every vector keeps the same coordinates, in groups with their own bits."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from swan.storage.codes import PARTS, code_bytes, dequantize_group, pack_code, quantize_group, row_bytes, unpack_code
from swan.storage.layout import check_dim, keep_derived
from swan.storage.mixing import mix_of
from swan.storage.packed import Packed

__all__ = ["Graded"]


@dataclass(frozen=True)
class Graded:
    r"""The layout in which each vector keeps the same coordinates: groups of the sorted basis with their own bits.

    Inside a group coordinates are mixed by an orthonormal Hadamard matrix, so that they have equal variance, and share
    one scale per vector, $s = 2^{c/8 - 16}$ with a byte $c$. With $b$ bits a coordinate is read as
    $\hat x = (n - (2^b - 1)/2)\, 2^{1-b} s$ with its code $0 \le n < 2^b$.

    - From 4 bits on, $s$ is the smallest scale that is not below $\max|x|$ of the group, and $n$ the nearest step:
      $|\hat x - x| \le 2^{-b} s$.
    - Of 3 bits and fewer, steps that reach to the largest coordinate would be too long for all others. Codes count
      steps of $2^{1-b} \min(s, c_b\, \mathrm{rms}(x))$ with that $s$, $c_2 = 2.2$ and $c_3 = 2.6$ (the sign alone at 1
      bit); larger coordinates take the outermost. The scale that is stored is the one with which $\hat x \cdot x$ is
      nearest to $x \cdot x$: what is lost of a group is at right angles to it, and averages out over tokens.

    A group some number of which, mixed, is NaN, infinite or above $2^{15.75} \approx 55109$ has $c = 255$ and is read
    as NaN.

    Bytes per vector: ``ceil(size * bits / 8)`` for each group (each part of 4, 2 and 1 bits rounded up), together a
    whole number of words of four bytes, and a byte for each scale; at 16 bits the dtype of the cache, no scale and no
    mix. A code is stored in parts of 4, 2 and 1 bits, high bits first: the parts of a group follow each other, and
    the fields of a part stand in the order of the coordinates.

    Args:
        groups: pairs ``(size, bits)`` in the order of the basis; sizes sum to the head dimension;
            bits from {0, 1, 2, 3, 4, 5, 6, 8, 16}, 0 = pruned.

    Raises:
        ValueError: no groups, a size below 1, other bits, or nothing kept.

    Example:
        >>> Graded.leading(d=64, keep=32)
        Graded(groups=((32, 16), (32, 0)))
        >>> Graded(((16, 5), (48, 3))).vector_bytes()
        30

    Source: this library; mixing by a Hadamard matrix before rounding is known from QuaRot, arXiv:2404.00456, a length
    that keeps products right on average from RaBitQ, arXiv:2405.12497.
    """

    form: ClassVar[str] = "graded"

    groups: tuple[tuple[int, int], ...]

    # Derived from the groups once for each instance. A ClassVar is no field of a dataclass: equality ignores these.
    spans: ClassVar[tuple[tuple[int, int, int], ...]]  # (start, stop, bits) of each group
    stored: ClassVar[tuple[tuple[int, int, int], ...]]  # the spans that are not pruned
    mixed: ClassVar[bool]  # some group is stored in mixed coordinates
    row_bytes: ClassVar[int]  # of the codes of a vector, padded to words of four bytes
    whole: ClassVar[bool]  # some group has 16 bits, and is stored in the dtype of the cache
    numbers: ClassVar[list[int]]  # the layout as kernels take it: 0, then size and bits of each group
    if TYPE_CHECKING:

        @property
        def d(self) -> int:
            """Head dimension."""
            ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple((int(size), int(bits)) for size, bits in self.groups))
        if not self.groups or any(size < 1 for size, _ in self.groups):
            raise ValueError(f"groups need at least one (size, bits) with size >= 1, got {self.groups}")
        if any(bits not in PARTS and bits not in (0, 16) for _, bits in self.groups):
            allowed = ", ".join(map(str, (0, *PARTS, 16)))
            raise ValueError(f"bits of a graded group must be one of {allowed}, got {self.groups}")
        if not any(bits for _, bits in self.groups):
            raise ValueError("a layout must keep something; a cache without history has None as its plan layer")
        stops = itertools.accumulate(size for size, _ in self.groups)
        spans = tuple((stop - size, stop, bits) for stop, (size, bits) in zip(stops, self.groups, strict=True))
        check_dim(spans[-1][1])
        keep_derived(
            self,
            d=spans[-1][1],
            spans=spans,
            stored=tuple(span for span in spans if span[2]),
            mixed=any(bits in PARTS for _, _, bits in spans),
            row_bytes=row_bytes([(stop - start, bits) for start, stop, bits in spans if bits in PARTS]),
            whole=any(bits == 16 for _, _, bits in spans),
            numbers=[0, *itertools.chain(*self.groups)],
        )

    @classmethod
    def leading(cls, d: int, keep: int) -> "Graded":
        """Make the layout of the first `keep` of `d` coordinates at 16 bits, the rest pruned."""
        if not 1 <= keep <= d:
            raise ValueError(f"keep must be between 1 and d = {d}, got {keep}")
        return cls(tuple(group for group in ((keep, 16), (d - keep, 0)) if group[0]))

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Count the bytes that one vector takes in a cache whose dtype has `itemsize` bytes."""
        scales = sum(bits != 16 for _, _, bits in self.stored)
        whole = sum(stop - start for start, stop, bits in self.stored if bits == 16)
        return self.row_bytes + scales + whole * itemsize

    def pack(self, x: Tensor) -> "Packed":
        """Store groups of few bits in one uint8 plane, with a scale byte each, and those of 16 bits in another."""
        matrix = self.mix(x.dtype, x.device)
        mixed = x if matrix is None else x @ matrix
        codes, scales, whole = [], [], []
        for start, stop, bits in self.stored:
            group = mixed[..., start:stop]
            if bits == 16:
                whole.append(group)
                continue
            scale, code = quantize_group(group, bits)
            scales.append(scale)
            codes += pack_code(code, bits)
        planes = tuple(torch.cat(plane, dim=-1) for plane in (codes, whole) if plane)
        if codes:
            padding = self.row_bytes - planes[0].shape[-1]
            planes = (torch.nn.functional.pad(planes[0], (0, padding)), *planes[1:])
        return Packed(planes, torch.cat(scales, dim=-1) if scales else None, None, self, x.dtype)

    def unpack(self, packed: "Packed") -> Tensor:
        """Return the vectors in mixed coordinates."""
        batch, heads, tokens, d = packed.shape
        out = torch.zeros(batch, heads, tokens, d, dtype=packed.dtype, device=packed.planes[0].device)
        byte = scale = value = 0
        for start, stop, bits in self.stored:
            size = stop - start
            if bits == 16:
                out[..., start:stop] = packed.planes[-1][..., value : value + size]
                value += size
                continue
            assert packed.scales is not None
            width = code_bytes(size, bits)
            code = unpack_code(packed.planes[0][..., byte : byte + width], size, bits)
            out[..., start:stop] = dequantize_group(code, packed.scales[..., scale : scale + 1], bits)
            byte, scale = byte + width, scale + 1
        return out

    def mix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the matrix that mixes the coordinates inside each group with fewer than 16 bits."""
        if not self.mixed:
            return None
        return mix_of(self.groups, dtype, device)
