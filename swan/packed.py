"""What a winnowed cache stores: layouts, `Packed`, `pack` and `unpack`.

A *layout* says how one vector of ``d`` coordinates is stored. There are two forms:

- `TopK`: every vector keeps its own ``keep`` largest coordinates (the paper, arXiv:2511.18936);
- `Graded`: every vector keeps the same coordinates, group by group of the sorted basis.

Whatever has the methods of `Layout` is one too.

Every stored tensor has the axes ``[batch, heads, tokens, bytes or values]``, so one index
selects tokens in all of them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.utils import _pytree as pytree

from swan.compiling import constant_result, keep_in_place_if_compiling

__all__ = ["Graded", "Layout", "Packed", "PlanLayer", "TopK", "pack", "unpack"]

SCALE_DTYPE = torch.bfloat16  # the range of float32; its rounding is below half a step of int8
MAX_DIM = 256
PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}  # of a code, high bits first
OCTAVE, OFFSET = 8, 128  # a scale byte c stands for 2 ** ((c - OFFSET) / OCTAVE)


class Layout(Protocol):
    """How one vector is stored; `TopK` and `Graded` are layouts. Instances are immutable and hashable.

    Another way to store vectors is a class with these members, and works wherever a layout is asked for:

    Example:
        >>> @dataclass(frozen=True)
        ... class Half:
        ...     d: int
        ...     form = "half"
        ...
        ...     def vector_bytes(self, itemsize=2):
        ...         return 2 * self.d
        ...
        ...     def pack(self, x):
        ...         return Packed((x.half(),), None, None, self, x.dtype)
        ...
        ...     def unpack(self, packed):
        ...         return packed.planes[0].to(packed.dtype)
        ...
        ...     def mix(self, dtype, device):
        ...         return None
        >>> unpack(pack(torch.ones(1, 1, 1, 4), Half(4)))
        tensor([[[[1., 1., 1., 1.]]]])
    """

    form: ClassVar[str]

    @property
    def d(self) -> int:
        """Head dimension."""
        ...

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Bytes that one vector takes in a cache whose dtype has `itemsize` bytes."""
        ...

    def pack(self, x: Tensor) -> "Packed":
        """Store vectors ``[batch, heads, tokens, d]``: each on its own, whatever comes with it."""
        ...

    def unpack(self, packed: "Packed") -> Tensor:
        """What is stored, in the coordinates of `mix`."""
        ...

    def mix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Orthonormal matrix ``[d, d]`` of the coordinates in which vectors are stored; None for their own."""
        ...


@dataclass(frozen=True)
class TopK:
    r"""Each vector keeps its own ``keep`` largest coordinates: "winnowing".

    $\hat x_i = x_i$ if $|x_i|$ is among the ``keep`` largest of the vector, else 0; with 8 or 4 bits what is kept is
    rounded.

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

    def __post_init__(self) -> None:
        check_dim(self.d)
        if not 1 <= self.keep <= self.d:
            raise ValueError(f"keep must be between 1 and d = {self.d}, got {self.keep}")
        if self.bits not in (4, 8, 16):
            raise ValueError(f"bits of top-k values must be 4, 8 or 16, got {self.bits}")
        if self.positions not in ("bitmap", "index"):
            raise ValueError(f"positions must be 'bitmap' or 'index', got {self.positions!r}")

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Bytes that one vector takes in a cache whose dtype has `itemsize` bytes."""
        match self.bits:
            case 16:
                values = self.keep * itemsize
            case 8:
                values = self.keep + SCALE_DTYPE.itemsize
            case 4:
                values = code_bytes(self.keep, 4) + 1
        return values + self.position_bytes

    @property
    def position_bytes(self) -> int:
        """Bytes of positions per vector."""
        if self.keep == self.d:
            return 0
        return -(-self.d // 8) if self.positions == "bitmap" else self.keep

    def pack(self, x: Tensor) -> "Packed":
        """The largest coordinates of each vector."""
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
        """The vectors, pruned coordinates as zeros."""
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
        """None: vectors are stored in their own coordinates."""


@dataclass(frozen=True)
class Graded:
    r"""Each vector keeps the same coordinates: groups of the sorted basis with their own bits.

    Inside a group coordinates are mixed by an orthonormal Hadamard matrix, so that they have equal
    variance, and share one scale per vector, $s = 2^{c/8 - 16}$ with a byte $c$, the smallest that is not
    below $\max|x|$. With $b$ bits a coordinate is stored as the nearest of $2^b$ steps,
    $\hat x = (n - (2^b - 1)/2)\, 2^{1-b} s$. The steps are nested: the code of fewer bits
    is the leading bits of the code of more.

    Bytes per vector: ``ceil(size * bits / 8)`` for each group (each part of 4, 2 and 1 bits rounded up),
    and a byte for its scale; at 16 bits the dtype of the cache, no scale and no mix.

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

    Source: this library; mixing by a Hadamard matrix before rounding is known from QuaRot, arXiv:2404.00456.
    """

    form: ClassVar[str] = "graded"

    groups: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple((int(size), int(bits)) for size, bits in self.groups))
        if not self.groups or any(size < 1 for size, _ in self.groups):
            raise ValueError(f"groups need at least one (size, bits) with size >= 1, got {self.groups}")
        if any(bits not in PARTS and bits not in (0, 16) for _, bits in self.groups):
            allowed = ", ".join(map(str, (0, *PARTS, 16)))
            raise ValueError(f"bits of a graded group must be one of {allowed}, got {self.groups}")
        if not any(bits for _, bits in self.groups):
            raise ValueError("a layout must keep something; a cache without history has None as its plan layer")
        check_dim(self.d)

    @classmethod
    def leading(cls, d: int, keep: int) -> "Graded":
        """The first `keep` of `d` coordinates at 16 bits, the rest pruned."""
        if not 1 <= keep <= d:
            raise ValueError(f"keep must be between 1 and d = {d}, got {keep}")
        return cls(tuple(group for group in ((keep, 16), (d - keep, 0)) if group[0]))

    @property
    def d(self) -> int:
        """Head dimension."""
        return sum(size for size, _ in self.groups)

    @property
    def stored(self) -> tuple[tuple[int, int, int], ...]:
        """``(start, stop, bits)`` of each group that is not pruned."""
        stops = [sum(size for size, _ in self.groups[: i + 1]) for i in range(len(self.groups))]
        spans = zip(self.groups, stops, strict=True)
        return tuple((stop - size, stop, bits) for (size, bits), stop in spans if bits)

    @property
    def mixed(self) -> bool:
        """Whether some group is stored in mixed coordinates."""
        return any(bits in PARTS for _, bits in self.groups)

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Bytes that one vector takes in a cache whose dtype has `itemsize` bytes."""
        return sum(
            (stop - start) * itemsize if bits == 16 else 1 + code_bytes(stop - start, bits)
            for start, stop, bits in self.stored
        )

    def pack(self, x: Tensor) -> "Packed":
        """Groups of few bits as one uint8 plane with a scale byte each, groups of 16 bits as one plane in the dtype."""
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
        return Packed(planes, torch.cat(scales, dim=-1) if scales else None, None, self, x.dtype)

    def unpack(self, packed: "Packed") -> Tensor:
        """The vectors in mixed coordinates."""
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
        """The matrix that mixes the coordinates inside each group with fewer than 16 bits."""
        if not self.mixed:
            return None
        numbers = tuple((len(range(size)), len(range(bits))) for size, bits in self.groups)  # no longer symbols
        return getattr(MIXES, mix_name(numbers, dtype, device))


@dataclass(frozen=True)
class PlanLayer:
    r"""The layouts of one layer of a plan, for keys and values apart.

    A history token takes the share $\frac{\text{bytes(key)} + \text{bytes(value)}}{2\,(d_k + d_v)}$, its `retention`,
    of its bfloat16 bytes.

    Args:
        keys: layout of the keys.
        values: layout of the values, of the same or another head dimension.

    Example:
        >>> PlanLayer(TopK(64, 40), TopK(64, 24)).retention
        0.328125

    Source: arXiv:2511.18936 for `TopK`, this library for `Graded`.
    """

    keys: Layout
    values: Layout

    @property
    def retention(self) -> float:
        """Bytes stored per history token over the bf16 bytes of the same key and value."""
        stored = self.keys.vector_bytes() + self.values.vector_bytes()
        return stored / (2 * (self.keys.d + self.values.d))


@dataclass(frozen=True)
class Packed:
    """Vectors ``[batch, heads, tokens, d]`` as a layout stores them; a registered pytree.

    Args:
        planes: values; for `TopK` one tensor ``[batch, heads, tokens, keep]`` in the order of the
            coordinates (at 4 bits packed in bytes), for `Graded` one uint8 tensor of all groups below 16 bits
            and one of the groups of 16 bits, as far as there are any.
        scales: ``[batch, heads, tokens, 1]``, for `Graded` uint8 with one for each group below 16 bits; or None.
        positions: uint8 ``[batch, heads, tokens, position_bytes]`` or None.
        layout: how to read them.
        dtype: dtype of the vectors.

    Example:
        >>> packed = pack(torch.randn(1, 2, 100, 64), TopK(64, keep=32))
        >>> packed.shape, packed.nbytes, packed.tokens(0, 10).shape
        ((1, 2, 100, 64), 8400, (1, 2, 10, 64))

    Source: the formats are those of `TopK` and `Graded`.
    """

    planes: tuple[Tensor, ...]
    scales: Tensor | None
    positions: Tensor | None
    layout: Layout
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All stored tensors."""
        return tuple(t for t in (*self.planes, self.scales, self.positions) if t is not None)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, tokens, d)``."""
        batch, heads, tokens = self.tensors[0].shape[:3]
        return batch, heads, tokens, self.layout.d

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors (not of storage that they share with others)."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Packed":
        """A `Packed` with `fn` applied to each stored tensor."""
        return dataclasses.replace(
            self,
            planes=tuple(fn(plane) for plane in self.planes),
            scales=None if self.scales is None else fn(self.scales),
            positions=None if self.positions is None else fn(self.positions),
        )

    def tokens(self, start: int, stop: int) -> "Packed":
        """A view of tokens `start` to `stop`."""
        return self.map(lambda t: t[:, :, start:stop])


pytree.register_pytree_node(
    Packed,
    lambda p: ([p.planes, p.scales, p.positions], (p.layout, p.dtype)),
    lambda children, context: Packed(*children, *context),
    serialized_type_name="swan.Packed",
)


def pack(x: Tensor, layout: Layout) -> Packed:
    """Store vectors in a layout: ``unpack(pack(x, layout))`` is the pruned `x`.

    Args:
        x: ``[batch, heads, tokens, d]``, float32, bfloat16 or float16.
        layout: a `TopK`, `Graded` or other `Layout` of the same ``d``.

    Returns:
        The stored tensors.

    Raises:
        ValueError: `x` does not have 4 axes or its last one is not the layout's ``d``.
        TypeError: `x` is not floating point.

    Example:
        >>> packed = pack(torch.tensor([[[[3.0, -1.0, 0.5, 2.0] * 4]]]), TopK(16, keep=8, bits=16))
        >>> unpack(packed)[0, 0, 0, :4]
        tensor([3., 0., 0., 2.])

    Source: arXiv:2511.18936.
    """
    if not torch.compiler.is_compiling():
        check_vectors(x, layout)
    return layout.pack(x)


def unpack(packed: Packed) -> Tensor:
    r"""The vectors that a `Packed` stores, pruned coordinates as zeros: $\hat x$ of `TopK` and `Graded`.

    Args:
        packed: what `pack` returned, or some of its tokens.

    Returns:
        ``[batch, heads, tokens, d]`` in ``packed.dtype``.

    Example:
        >>> x = torch.randn(1, 2, 5, 64)
        >>> torch.equal(unpack(pack(x, TopK(64, keep=64, bits=16))), x)
        True

    Source: arXiv:2511.18936.
    """
    values, matrix = unpack_mixed(packed), mixing(packed)
    return values if matrix is None else values @ matrix.mT


def mixing(packed: Packed) -> Tensor | None:
    """The orthonormal matrix ``[d, d]`` of the coordinates in which a tensor is stored, or None.

    ``unpack(p) == unpack_mixed(p) @ mixing(p).mT``: attention applies it to queries and outputs, not to tokens.
    """
    return packed.layout.mix(packed.dtype, packed.tensors[0].device)


def unpack_mixed(packed: Packed) -> Tensor:
    """`unpack` in the coordinates of `mixing`."""
    return packed.layout.unpack(packed)


class Mixes:
    """Mixing matrices by `mix_name`. As attributes of an object they are inputs of compiled code, not built in it.

    Tensors returned by a `constant_result` function would not do: two in a graph have the same name in torch 2.13.
    """


MIXES = Mixes()


@constant_result
def mix_name(groups: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> str:
    """The attribute of `MIXES` with a matrix; built at the first call, also while torch.compile traces."""
    name = _mix_name(groups, dtype, device)
    keep_in_place_if_compiling(getattr(MIXES, name))
    return name


@functools.cache
@torch.inference_mode(False)  # the matrix may be used under autograd later
def _mix_name(groups: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> str:
    name = re.sub(r"\W+", "_", f"mix {groups} {dtype} {device}")
    setattr(MIXES, name, build_mix(groups, dtype, device))
    return name


def build_mix(groups: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    blocks = [
        hadamard(size, device) if bits in PARTS else torch.eye(size, dtype=torch.float64, device=device)
        for size, bits in groups
    ]
    return torch.block_diag(*blocks).to(dtype)


def hadamard(size: int, device: torch.device) -> Tensor:
    """An orthonormal matrix of entries of like magnitude: Hadamard, times a cosine transform for an odd factor."""
    odd = size // (size & -size)
    n = torch.arange(odd, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi / odd * (n[:, None] + 0.5) * n) * math.sqrt(2 / odd)
    matrix = torch.cat([matrix[:, :1] / math.sqrt(2), matrix[:, 1:]], dim=1)
    butterfly = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device) / math.sqrt(2)
    while matrix.shape[0] < size:
        matrix = torch.kron(butterfly, matrix)
    return matrix


def quantize_group(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale byte ``[..., 1]`` and codes of `bits` bits: ``|x - x_hat| <= 2 ** -bits * scale``."""
    scale = scale_byte(x)
    steps = x.float() / scale_of(scale) * 2 ** (bits - 1)
    return scale, (steps.floor() + 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8)


def scale_byte(x: Tensor) -> Tensor:
    """The byte ``[..., 1]`` of the smallest scale that is not below any coordinate."""
    peak = x.abs().amax(dim=-1, keepdim=True).float()
    return ((peak.log2() * OCTAVE).ceil().clamp(-OFFSET, 255 - OFFSET) + OFFSET).to(torch.uint8)


def dequantize_group(code: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (code - (2**bits - 1) / 2) * (scale_of(scale) * 2.0 ** (1 - bits))


def scale_of(byte: Tensor) -> Tensor:
    return torch.exp2((byte.float() - OFFSET) / OCTAVE)


def code_bytes(size: int, bits: int) -> int:
    return sum(-(-size * part // 8) for part in PARTS[bits])


def pack_code(code: Tensor, bits: int) -> list[Tensor]:
    """The parts of codes as planes of bytes: byte ``i`` holds coordinates ``i``, ``i + n``, ... of ``n`` bytes."""
    planes, shift = [], bits
    for part in PARTS[bits]:
        shift -= part
        field = (code >> shift) & (2**part - 1)
        slots = 8 // part
        field = torch.nn.functional.pad(field, (0, -field.shape[-1] % slots))
        field = rearrange(field, "... (slot byte) -> ... slot byte", slot=slots)
        weights = (1 << (part * torch.arange(slots, device=code.device))).to(torch.uint8)
        planes.append((field * weights[:, None]).sum(-2, dtype=torch.uint8))
    return planes


def unpack_code(planes: Tensor, size: int, bits: int) -> Tensor:
    code, start, shift = torch.zeros((), dtype=torch.uint8, device=planes.device), 0, bits
    for part in PARTS[bits]:
        shift -= part
        width = -(-size * part // 8)
        shifts = (part * torch.arange(8 // part, device=planes.device)).to(torch.uint8)
        field = (planes[..., None, start : start + width] >> shifts[:, None]) & (2**part - 1)
        code = code | (rearrange(field, "... slot byte -> ... (slot byte)")[..., :size] << shift)
        start += width
    return code


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and a scale for each vector: ``|values - int8 * scale| <= scale / 2``.

    Within 0.8 % of the dtype's maximum the bound is `scale`, so that 127 steps stay finite.
    """
    peak = values.abs().amax(dim=-1, keepdim=True).float()
    scales = as_bfloat16((peak / 127).clamp(max=torch.finfo(values.dtype).max / 128))
    multiples = torch.where(scales > 0, values.float() / scales, 0)
    return multiples.round().clamp(-127, 127).to(torch.int8), scales.to(SCALE_DTYPE)


def as_bfloat16(x: Tensor) -> Tensor:
    """Numbers of float32, not negative, rounded to those of bfloat16.

    As integers: torch.compile drops a cast to bfloat16 and back.
    """
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def pack_positions(index: Tensor, layout: TopK) -> Tensor:
    """Ascending coordinate indices as an index list or a bitmap (bit ``i % 8`` of byte ``i // 8``)."""
    if layout.positions == "index":
        return index.to(torch.uint8)
    width = 8 * layout.position_bytes
    present = index.new_zeros(*index.shape[:-1], width, dtype=torch.uint8).scatter(-1, index, 1)
    weights = 1 << torch.arange(8, device=index.device, dtype=torch.uint8)
    octets = rearrange(present, "... (byte bit) -> ... byte bit", bit=8)
    return (octets * weights).sum(-1, dtype=torch.uint8)


def bitmap_ranks(bitmap: Tensor, layout: TopK) -> Tensor:
    """For each coordinate its place among the kept values, or ``keep`` where it was pruned."""
    byte = torch.arange(256, device=bitmap.device)
    bits = (byte[:, None] >> torch.arange(8, device=bitmap.device)) & 1
    rank_in_byte = torch.where(bits.bool(), bits.cumsum(-1) - 1, layout.keep)  # [256, 8]
    index = bitmap.int()
    count = torch.nn.functional.embedding(index, bits.sum(-1, keepdim=True)).squeeze(-1)
    before = count.cumsum(-1) - count
    rank = torch.nn.functional.embedding(index, rank_in_byte) + before[..., None]
    return rearrange(rank.clamp(max=layout.keep), "... byte bit -> ... (byte bit)")[..., : layout.d]


def check_dim(d: int) -> None:
    if not 1 <= d <= MAX_DIM:
        raise ValueError(f"the head dimension must be between 1 and {MAX_DIM}, got {d}")


def check_vectors(x: Any, layout: Layout) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected a floating-point tensor, got {got}")
    if x.ndim != 4 or x.shape[-1] != layout.d:
        raise ValueError(f"expected vectors [batch, heads, tokens, {layout.d}] for {layout}, got {list(x.shape)}")
