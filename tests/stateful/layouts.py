"""A small model of the layouts in float64: what stored bytes say, and how far that may be from what was stored.

Written from the documentation of `Graded` and `TopK` alone: a layout is read by its fields, bytes by their places.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

from swan import ByHead, Graded, Layout, Packed, TopK
from tests.coding import scale_of, stored_range

__all__ = ["U32", "assert_stored", "is_mixed", "mixed", "plain", "read", "unit"]

U32 = 2.0**-24
PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}  # bits of a code, high ones first


def unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number, in the precision in which swan computes at most."""
    return max(torch.finfo(dtype).eps / 2, U32)


def is_mixed(layout: Layout) -> bool:
    """Tell if coordinates are mixed before they are stored."""
    if isinstance(layout, ByHead):
        return any(map(is_mixed, layout.layouts))
    return isinstance(layout, Graded) and any(bits in PARTS for _, bits in layout.groups)


@functools.cache
def hadamard(size: int) -> Tensor:
    """Build the orthonormal matrix of a group: Hadamard for the power of two, a cosine transform for the odd factor."""
    odd = size // (size & -size)
    n = torch.arange(odd, dtype=torch.float64)
    matrix = (math.pi / odd * (n[:, None] + 0.5) * n).cos() * ((1 + n.clamp(max=1)) / odd).sqrt()
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix


@functools.cache
def mix(layout: Graded) -> Tensor:
    """Build the matrix that mixes vectors."""
    blocks = [hadamard(n) if bits in PARTS else torch.eye(n, dtype=torch.float64) for n, bits in layout.groups]
    return torch.block_diag(*blocks)


@functools.cache
def fields(layout: Graded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Say where the coordinates are: the worth of each bit of a row for each of them; their bits, groups and places.

    A group's place is that of its scale, a coordinate's place is that in the plane of 16 bits; -1 for none.
    """
    bits = torch.tensor([bits for size, bits in layout.groups for _ in range(size)])
    group, place = torch.full_like(bits, -1), torch.full_like(bits, -1)
    width = sum(-(-n * part // 8) for n, b in layout.groups for part in PARTS.get(b, ()))
    worth = torch.zeros(8 * -(-width // 4) * 4, len(bits), dtype=torch.float64)
    start = byte = scale = whole = 0
    for size, b in layout.groups:
        coordinates = torch.arange(start, start + size)
        start += size
        if b == 16:
            place[coordinates] = torch.arange(whole, whole + size)
            whole += size
        elif b:
            group[coordinates] = scale
            scale += 1
        shift = b
        for part in PARTS.get(b, ()):
            shift -= part
            for bit in range(part):
                worth[8 * byte + part * torch.arange(size) + bit, coordinates] = 2.0 ** (shift + bit)
            byte += -(-size * part // 8)
    return worth, bits, group, place


def read(packed: Packed) -> tuple[Tensor, Tensor]:
    """Read stored vectors; return them in the coordinates in which they are stored, and half a step of each of those.

    Half a step is 0 where numbers are stored as they are, and infinite where they are pruned.
    """
    layout = packed.format
    if isinstance(layout, ByHead):
        values, half = zip(*map(read, heads_of(packed)), strict=True)
        return torch.cat(values, dim=1), torch.cat(half, dim=1)
    if isinstance(layout, Graded):
        return read_graded(packed, layout)
    assert isinstance(layout, TopK)
    return read_topk(packed, layout)


def heads_of(packed: Packed) -> list[Packed]:
    """Return what each KV head stores: neighbours of one layout share their tensors, codes, 16 bits and scales."""
    assert isinstance(packed.format, ByHead)
    left, heads = iter(packed.planes), []
    for layout, group in itertools.groupby(packed.format.layouts):
        few = any(bits in PARTS for _, bits in layout.groups)
        planes = [next(left) for there in (few, any(bits == 16 for _, bits in layout.groups)) if there]
        scales = next(left) if few else None
        for head in range(len(list(group))):
            mine = slice(head, head + 1)
            own = None if scales is None else scales[:, mine]
            heads.append(Packed(tuple(t[:, mine] for t in planes), own, None, layout, packed.dtype))
    assert next(left, None) is None, "every tensor belongs to a head"
    return heads


def by_head(fn, x: Tensor, layout: ByHead) -> Tensor:
    """Do something to each head with its layout."""
    return torch.cat([fn(x[:, h : h + 1], each) for h, each in enumerate(layout.layouts)], dim=1)


def read_graded(packed: Packed, layout: Graded) -> tuple[Tensor, Tensor]:
    worth, bits, group, place = fields(layout)
    values = torch.zeros(*packed.shape[:3], layout.d, dtype=torch.float64)
    half = torch.full_like(values, math.inf)
    coded, whole = group >= 0, place >= 0
    if coded.any():
        assert packed.scales is not None
        steps = 2.0 ** (1 - bits[coded])
        scale = scale_of(packed.scales)[..., group[coded]]
        code = bits_of(packed.planes[0]) @ worth[:, coded]
        values[..., coded] = (code - (2.0 ** bits[coded] - 1) / 2) * steps * scale
        half[..., coded] = steps * scale / 2
    if whole.any():
        values[..., whole] = packed.planes[-1].double()[..., place[whole]]
        half[..., whole] = 0
    return values, half


def read_topk(packed: Packed, layout: TopK) -> tuple[Tensor, Tensor]:
    plane, scales = packed.planes[0], packed.scales
    if layout.bits == 16:
        kept, half = plane.double(), torch.zeros(1, dtype=torch.float64)
    elif layout.bits == 8:
        assert scales is not None
        kept, half = plane.double() * scales.double(), scales.double() / 2
    else:
        assert scales is not None
        nibbles = torch.stack([plane & 15, plane >> 4], dim=-1).flatten(-2)[..., : layout.keep]
        scale = scale_of(scales)
        kept, half = (nibbles.double() - 7.5) / 8 * scale, scale / 16
    if packed.positions is None:
        return kept, half.expand_as(kept)
    if layout.positions == "index":
        index = packed.positions.long()
    else:
        present = bits_of(packed.positions)[..., : layout.d]
        assert (present.sum(-1) == layout.keep).all(), "a bitmap has as many bits as coordinates are kept"
        index = present.argsort(dim=-1, descending=True, stable=True)[..., : layout.keep]
    assert (index.diff(dim=-1) > 0).all(), "positions ascend"
    pruned = torch.zeros(*kept.shape[:3], layout.d, dtype=torch.float64)
    return pruned.scatter(-1, index, kept), (pruned + math.inf).scatter(-1, index, half.expand_as(kept))


def plain(values: Tensor, layout: Layout) -> Tensor:
    """Turn what `read` returned into the coordinates that vectors came in."""
    if isinstance(layout, ByHead):
        return by_head(plain, values, layout)
    return values @ mix(layout).mT if is_mixed(layout) and isinstance(layout, Graded) else values


def mixed(vectors: Tensor, layout: Layout) -> Tensor:
    """Turn vectors into the coordinates in which they are stored."""
    if isinstance(layout, ByHead):
        return by_head(mixed, vectors, layout)
    return vectors @ mix(layout) if is_mixed(layout) and isinstance(layout, Graded) else vectors


def assert_stored(packed: Packed, source: Tensor, uncertain: Tensor | float) -> Tensor:
    """Check that stored vectors are `source` in their layout, and return what they say, in plain coordinates.

    A coded coordinate and its scale are what `stored_range` allows, or of `TopK` within half a step and the smallest
    (of its grid) that covers them; one of 16 bits is itself. `uncertain` is how far the numbers that were stored may be
    from `source`, by coordinate.
    """
    layout, u = packed.format, unit(packed.dtype)
    if isinstance(layout, ByHead):
        known = torch.as_tensor(uncertain, dtype=torch.float64).expand_as(source)
        parts = zip(heads_of(packed), source.split(1, dim=1), known.split(1, dim=1), strict=True)
        return torch.cat([assert_stored(*part) for part in parts], dim=1)
    values, half = read(packed)
    known = torch.as_tensor(uncertain, dtype=torch.float64).expand_as(source)
    if isinstance(layout, Graded) and is_mixed(layout):
        # Mixing is a product in the dtype, with a matrix that is rounded to it.
        _, bits, _, _ = fields(layout)
        loose = source.abs() @ mix(layout).abs()
        rounding = torch.where(bits < 16, 2 * u + (layout.d + 2) * U32, 0) * loose
        known, source = known @ mix(layout).abs() + rounding, source @ mix(layout)
    if isinstance(layout, Graded):
        assert_groups(packed, layout, values, source, known)
        return plain(values, layout)
    # Steps are counted in float32: up to 256 half steps, off by a few units in the last place.
    limit = half * (1 + 2.0**-13) + known
    error = (values - source).abs()
    assert (error <= limit).all(), f"{layout}: off by {(error - limit).max():.3g} more than half a step"
    assert_scales(packed, source, known)
    assert isinstance(layout, TopK)
    if layout.keep < layout.d:
        least = source.abs().add(known).masked_fill(half.isinf(), math.inf).amin(-1)
        most = source.abs().sub(known).masked_fill(half.isfinite(), 0).amax(-1)
        assert (most <= least).all(), f"{layout}: a larger coordinate was pruned"
    return values


def assert_groups(packed: Packed, layout: Graded, values: Tensor, source: Tensor, known: Tensor) -> None:
    """Check numbers that were read, and scales, against what the documentation says of each group."""
    start = scale = 0
    for size, bits in layout.groups:
        here = slice(start, start + size)
        start += size
        if bits == 0:
            assert not values[..., here].any()
            continue
        if bits == 16:
            assert ((values - source)[..., here].abs() <= known[..., here]).all(), f"{layout}: 16 bits are others"
            continue
        assert packed.scales is not None
        least, most, first, last = stored_range(source[..., here], known[..., here], bits)
        number, byte = values[..., here], packed.scales[..., scale : scale + 1]
        off = torch.maximum(least - number, number - most)
        assert (off <= 0).all(), f"{layout}: {size} coordinates of {bits} bits are off by {off.max():.3g} too much"
        assert ((first <= byte) & (byte <= last)).all(), f"{layout}: scale of {size} coordinates of {bits} bits"
        scale += 1


def assert_scales(packed: Packed, source: Tensor, known: Tensor) -> None:
    """Check that the scales of `TopK` are as small as they may be."""
    if packed.scales is None:
        return
    least, most = ((source.abs() + sign * known).amax(-1, keepdim=True) for sign in (-1, 1))
    if packed.scales.dtype == torch.uint8:
        scale = scale_of(packed.scales)
        smallest = (packed.scales == 0) | (scale <= most * 2 ** (1 / 8) * (1 + 1e-6))
        assert ((scale >= least * (1 - 1e-6)) & smallest).all(), f"{packed.format}: scale"
    else:
        scale = packed.scales.double() * 127
        assert ((scale >= least * (1 - 2.0**-8)) & (scale <= most * (1 + 2.0**-8))).all(), f"{packed.format}: scale"


def bits_of(octets: Tensor) -> Tensor:
    """Return the bits of bytes, low ones first, float64 ``[..., 8 * bytes]``."""
    return ((octets[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2).double()
