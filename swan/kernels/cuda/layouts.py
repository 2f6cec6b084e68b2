"""Layouts and their tensors as the CUDA sources take them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swan.storage.codes import PARTS, row_bytes

__all__ = ["Groups", "coded", "dim_of", "empty_planes", "groups_of", "in_room", "macros", "vector_bytes"]

Groups = tuple[tuple[int, int], ...]  # size and bits of each
ROOM = 32  # tokens that a kernel reads at a time, also where there are fewer
ALIGNMENT = 16  # bytes that it reads at a time


def groups_of(numbers: Sequence[int]) -> Groups:
    """Return the groups of a layout that is given as numbers: 0, then size and bits of each group."""
    return tuple(zip(numbers[1::2], numbers[2::2]))  # noqa: B905  # in each step


def dim_of(groups: Groups) -> int:
    """Return the dimension of vectors."""
    return sum([size for size, _ in groups])


def macros(keys: Groups, values: Groups, dtype: torch.dtype) -> dict[str, object]:
    """Return the macros that say what a source is compiled for."""
    names: dict[str, object] = {"DTYPE": str(dtype).removeprefix("torch.")}
    for side, groups in (("K", keys), ("V", values)):
        names[f"{side}_GROUPS"] = "{" + ",".join(f"{{{size},{bits}}}" for size, bits in groups) + "}"
    return names | {"D": dim_of(keys), "DV": dim_of(values)}


def coded(groups: Groups) -> Groups:
    """Return the groups of few bits."""
    return tuple(group for group in groups if group[1] in PARTS)


def vector_bytes(groups: Groups, itemsize: int) -> int:
    """Count the bytes of a vector: codes, scales, and numbers of 16 bits, which take `itemsize` bytes."""
    whole = sum(size for size, bits in groups if bits == 16)
    return row_bytes(coded(groups)) + len(coded(groups)) + whole * itemsize


def empty_planes(x: Tensor, groups: Groups) -> list[Tensor]:
    """Return memory for vectors like `x` ``[batch, heads, tokens, d]``: codes, numbers of 16 bits, scales, if any.

    Heads have room for whole tiles, so that `in_room` need not copy them.
    """
    tokens, whole = x.shape[2], sum(size for size, bits in groups if bits == 16)
    few = coded(groups)
    widths = (row_bytes(few), torch.uint8), (whole, x.dtype), (len(few), torch.uint8)
    shapes = [((*x.shape[:2], -(-tokens // ROOM) * ROOM, width), dtype) for width, dtype in widths if width]
    return [x.new_empty(shape, dtype=dtype)[:, :, :tokens] for shape, dtype in shapes]


def in_room(x: Tensor, tokens: int) -> Tensor:
    """Return a plane whose tokens follow each other, as a kernel reads them: past the last one too; or a copy of it."""
    size, (batch, head, token, one) = x.element_size(), x.stride()
    room = -(-tokens // ROOM) * ROOM
    last = (x.shape[0] - 1) * batch + (x.shape[1] - 1) * head + room * x.shape[3]
    inside = (x.storage_offset() + last) * size <= x.untyped_storage().nbytes()
    aligned = not (x.data_ptr() | batch * size | head * size) % ALIGNMENT
    if inside and aligned and token == x.shape[3] and one == 1:
        return x
    copy = x.new_zeros(*x.shape[:2], room, x.shape[3])
    copy[:, :, :tokens] = x[:, :, :tokens]
    return copy
