"""`TopK`: each vector keeps its own largest coordinates."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from swan.storage.codes import (
    SCALE_DTYPE,
    code_bytes,
    dequantize_group,
    pack_code,
    quantize,
    quantize_group,
    unpack_code,
)
from swan.storage.layout import check_dim, keep_derived
from swan.storage.packed import Packed

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK:
    r"""The layout in which each vector keeps its own ``keep`` largest coordinates: "winnowing".

    $\hat x_i = x_i$ if $|x_i|$ is among the ``keep`` largest of the vector, else 0; with 8 or 4 bits kept values
    are rounded. With 8 bits NaN and infinity make all values of the vector NaN; with 4, as in `Graded`, what is above
    $2^{15.75}$ too.

    Bytes per vector: ``keep * bits / 8 + positions + scale``, where positions take ``ceil(d / 8)``
    bytes as a bitmap or ``keep`` bytes as an index list (none when ``keep == d``), and the scale
    takes 2 bytes when values have 8 bits and 1 when they have 4.

    Args:
        d: head dimension, up to 256.
        keep: coordinates kept, 1 to ``d``.
        bits: 16 stores values in the dtype of the cache (4 bytes in a float32 cache); 8 stores
            ``round(x / scale)`` with ``scale = max|x| / 127`` for each vector; 4 stores them on the grid
            of `Graded`, unmixed.
        positions: ``"bitmap"`` (one bit per coordinate) or ``"index"`` (one byte per kept value,
            the paper's format).

    Raises:
        ValueError: a setting outside its range.

    Example:
        >>> TopK(d=64, keep=32).vector_bytes()
        42

    Source: arXiv:2511.18936; the bitmap follows Mustafar, arXiv:2505.22913.
    """

    form: ClassVar[str] = "topk"

    d: int
    keep: int
    bits: Literal[4, 8, 16] = 8
    positions: Literal["bitmap", "index"] = "bitmap"

    # Derived from the fields once for each instance. A ClassVar is no field of a dataclass: equality ignores these.
    position_bytes: ClassVar[int]  # of one vector
    numbers: ClassVar[list[int]]  # the layout as kernels take it, where positions are a bitmap: 1, d, keep, bits

    def __post_init__(self) -> None:
        check_dim(self.d)
        if not 1 <= self.keep <= self.d:
            raise ValueError(f"keep must be between 1 and d = {self.d}, got {self.keep}")
        if self.bits not in (4, 8, 16):
            raise ValueError(f"bits of top-k values must be 4, 8 or 16, got {self.bits}")
        if self.positions not in ("bitmap", "index"):
            raise ValueError(f"positions must be 'bitmap' or 'index', got {self.positions!r}")
        bitmap = self.positions == "bitmap"
        position_bytes = 0 if self.keep == self.d else -(-self.d // 8) if bitmap else self.keep
        keep_derived(self, position_bytes=position_bytes, numbers=[1, self.d, self.keep, self.bits])

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Count the bytes that one vector takes in a cache whose dtype has `itemsize` bytes."""
        match self.bits:
            case 16:
                values = self.keep * itemsize
            case 8:
                values = self.keep + SCALE_DTYPE.itemsize
            case 4:
                values = code_bytes(self.keep, 4) + 1
        return values + self.position_bytes

    def pack(self, x: Tensor) -> "Packed":
        """Store the largest coordinates of each vector."""
        values, positions = x, None
        if self.keep < self.d:
            index = x.abs().topk(self.keep, dim=-1).indices.sort(dim=-1).values
            values, positions = x.gather(-1, index), pack_positions(index, self)
        match self.bits:
            case 16:
                planes, scales = values.contiguous(), None
            case 8:
                planes, scales = quantize(values)
            case 4:
                scales, code = quantize_group(values, 4)
                planes = torch.cat(pack_code(code, 4), dim=-1)
        return Packed((planes,), scales, positions, self, x.dtype)

    def unpack(self, packed: "Packed") -> Tensor:
        """Return the vectors, pruned coordinates as zeros."""
        values = packed.planes[0]
        if packed.scales is not None and self.bits == 4:
            values = dequantize_group(unpack_code(values, self.keep, 4), packed.scales, 4).to(packed.dtype)
        elif packed.scales is not None:
            values = (values.float() * packed.scales.float()).to(packed.dtype)
        if packed.positions is None:
            return values
        if self.positions == "index":
            zeros = values.new_zeros(*values.shape[:-1], self.d)
            return zeros.scatter(-1, packed.positions.long(), values)
        rank = bitmap_ranks(packed.positions, self)
        return torch.nn.functional.pad(values, (0, 1)).gather(-1, rank)

    def mix(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: nothing is mixed."""


def pack_positions(index: Tensor, layout: TopK) -> Tensor:
    """Store ascending coordinate indices as an index list or a bitmap (bit ``i % 8`` of byte ``i // 8``)."""
    if layout.positions == "index":
        return index.to(torch.uint8)
    width = 8 * layout.position_bytes
    present = index.new_zeros(*index.shape[:-1], width, dtype=torch.uint8).scatter(-1, index, 1)
    weights = 1 << torch.arange(8, device=index.device, dtype=torch.uint8)
    octets = rearrange(present, "... (byte bit) -> ... byte bit", bit=8)
    return (octets * weights).sum(-1, dtype=torch.uint8)


def check_positions(positions: Tensor, layout: TopK) -> None:
    """Raise a ValueError if stored positions are not `keep` coordinates of each vector, ascending."""
    if layout.positions == "index":
        index = positions.int()
        valid = bool((index < layout.d).all()) and bool((index.diff(dim=-1) > 0).all())
    else:
        weights = torch.arange(8, device=positions.device, dtype=torch.uint8)
        present = rearrange((positions[..., None] >> weights) & 1, "... byte bit -> ... (byte bit)").int()
        valid = bool((present.sum(-1) == layout.keep).all()) and not bool(present[..., layout.d :].any())
    if not valid:
        raise ValueError(f"stored positions are not {layout.keep} of {layout.d} coordinates of each vector")


def bitmap_ranks(bitmap: Tensor, layout: TopK) -> Tensor:
    """Return for each coordinate its place among the kept values, or ``keep`` where it was pruned."""
    byte = torch.arange(256, device=bitmap.device)
    bits = (byte[:, None] >> torch.arange(8, device=bitmap.device)) & 1
    rank_in_byte = torch.where(bits.bool(), bits.cumsum(-1) - 1, layout.keep)  # [256, 8]
    index = bitmap.int()
    count = torch.nn.functional.embedding(index, bits.sum(-1, keepdim=True)).squeeze(-1)
    before = count.cumsum(-1) - count
    rank = torch.nn.functional.embedding(index, rank_in_byte) + before[..., None]
    return rearrange(rank.clamp(max=layout.keep), "... byte bit -> ... (byte bit)")[..., : layout.d]
