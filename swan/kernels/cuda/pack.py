"""The operators that pack vectors and take tokens into a cache on an NVIDIA GPU, and how kernels are launched."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swan.kernels.cuda.launch import Kernel
from swan.kernels.cuda.layouts import Groups, coded, dim_of, empty_planes, groups_of, macros

__all__ = ["kernels_of", "pack", "pack_pages", "take_in", "unpack"]

SOURCE = Path(__file__).parent / "pack.cu"
MANY = 8  # vectors that a program packs where there are many: as in the source
# The structs PackArguments, PackPagesArguments, ... of the source, in the notation of `struct`.
PLANE = "Q3q"
PACKED = f"{PLANE * 3}Qq"
PACK, PACK_PAGES = f"{PLANE}{PACKED}2i", f"{PLANE * 2}{PACKED * 2}Q2i"
UNPACK, TAKE_IN = f"{PACKED}{PLANE}2i", f"{(PLANE * 2 + PACKED) * 2}2Q2qQq3i0Q"
NO_PLANE = (None, 0, 0, 0)


class Kernels(NamedTuple):
    """The kernels of a pair of layouts."""

    pack: Kernel
    pack_pages: Kernel
    unpack: Kernel
    take_in: Kernel
    take_in_many: Kernel


def pack(x: Tensor, layout: list[int], matrix: Tensor) -> list[Tensor]:
    """Pack vectors on torch's current stream; return codes, numbers of 16 bits and scales, those that there are."""
    groups, tokens = groups_of(layout), x.shape[2]
    planes = empty_planes(x, groups)
    if x.numel():
        x = _with_rows(x)
        grid, arguments = (-(-tokens // MANY), x.shape[1], x.shape[0]), (*_plane(x), *_packed(planes, groups, matrix))
        found, values = _that_know(groups, x.dtype)
        found.pack.launch(x.get_device(), grid, *arguments, tokens, values)
    return planes


def pack_pages(
    k: Tensor,
    v: Tensor,
    k_pages: list[Tensor],
    v_pages: list[Tensor],
    k_layout: list[int],
    v_layout: list[int],
    mixes: list[Tensor],
    slots: Tensor,
    page: int,
) -> None:
    """Pack keys and values into pages, as `swan.kernels.calls.store_in_pages` says, on torch's current stream.

    Raises:
        ValueError: slots are of another shape or dtype.
    """
    _, heads, tokens, _ = k.shape
    if slots.dtype != torch.long or slots.shape != (tokens,):
        raise ValueError(f"expected slots [{tokens}] of int64, got {[*slots.shape]} of {slots.dtype}")
    if not k.numel():
        return
    keys, values = groups_of(k_layout), groups_of(v_layout)
    k, v = _with_rows(k), _with_rows(v)
    kernels_of(keys, values, k.dtype).pack_pages.launch(
        k.get_device(), (-(-tokens // MANY), heads, 2),
        *_plane(k), *_plane(v), *_packed(k_pages, keys, mixes[0]), *_packed(v_pages, values, mixes[1]),
        slots.contiguous(), tokens, page,
    )  # fmt: skip


def unpack(planes: list[Tensor], layout: list[int], tokens: int, like: Tensor) -> Tensor:
    """Unpack the first `tokens` vectors on torch's current stream, in the coordinates in which they are stored."""
    groups, there = groups_of(layout), [plane for plane in planes if plane.ndim == 4]
    batch, heads = there[0].shape[:2]
    out = like.new_empty(batch, heads, tokens, dim_of(groups))
    if out.numel():
        codes, whole, scales = (_plane(plane) if plane.ndim == 4 else NO_PLANE for plane in planes[:3])
        found, values = _that_know(groups, like.dtype)
        grid = -(-tokens // (found.unpack.threads // 32)), heads, batch
        found.unpack.launch(like.get_device(), grid, *codes, *whole, *scales, None, 0, *_plane(out), tokens, values)
    return out


def take_in(
    k: Tensor,
    v: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_history: list[Tensor],
    v_history: list[Tensor],
    k_layout: list[int],
    v_layout: list[int],
    mixes: list[Tensor],
    counters: Sequence[Tensor | int],
    padding: Tensor | None,
    sinks: int,
    start: int,
) -> None:
    """Take new tokens into a cache, in place, as `swan.kernels.calls.take_in` says, on torch's current stream."""
    batch, heads, tokens, _ = k.shape
    if not k.numel():
        return
    keys, values = groups_of(k_layout), groups_of(v_layout)
    k, v = _with_rows(k), _with_rows(v)
    on_device = [isinstance(n, Tensor) and n.device == k.device for n in counters]
    at = [n if there else None for n, there in zip(counters, on_device, strict=True)]
    numbers = [0 if there else int(n) for n, there in zip(counters, on_device, strict=True)]
    found, many = kernels_of(keys, values, k.dtype), tokens > 1
    (found.take_in_many if many else found.take_in).launch(
        k.get_device(), (-(-tokens // MANY) if many else 1, heads, 2 * batch),
        *_plane(k), *_plane(k_recent), *_packed(k_history, keys, mixes[0]),
        *_plane(v), *_plane(v_recent), *_packed(v_history, values, mixes[1]),
        *at, *numbers, padding, start,
        tokens, k_recent.shape[2] - sinks, sinks,
    )  # fmt: skip


@functools.cache
def kernels_of(keys: Groups, values: Groups, dtype: torch.dtype) -> Kernels:
    """Return the kernels for a pair of layouts, which are compiled when they are launched."""
    defines, widest = macros(keys, values, dtype), max(dim_of(keys), dim_of(values))
    threads = -(-2 * widest // 32) * 32

    def kernel(name: str, arguments: str, vectors: int) -> Kernel:
        return Kernel(SOURCE, name, defines, arguments, threads, 37 * vectors * widest)

    found = Kernels(
        kernel("pack", PACK, MANY), kernel("pack_pages", PACK_PAGES, MANY), kernel("unpack", UNPACK, 0),
        kernel("take_in", TAKE_IN, 1), kernel("take_in_many", TAKE_IN, MANY),
    )  # fmt: skip
    for place, groups in enumerate((keys, values)):
        _KNOWN.setdefault((groups, dtype), (found, place))
    return found


# Kernels of some pair by each of its layouts, and whether that is the layout of values: a dial that moves a history to
# other layouts compiles nothing that new tokens do not need.
_KNOWN: dict[tuple[Groups, torch.dtype], tuple[Kernels, int]] = {}


def _that_know(groups: Groups, dtype: torch.dtype) -> tuple[Kernels, int]:
    if (groups, dtype) not in _KNOWN:
        kernels_of(groups, groups, dtype)
    return _KNOWN[groups, dtype]


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _plane(x: Tensor) -> tuple[Any, ...]:
    return x, *x.stride()[:3]


def _packed(planes: list[Tensor], groups: Groups, matrix: Tensor) -> tuple[Any, ...]:
    """Return the struct of what a layout stores: its planes, its mix, and the tokens that there is room for."""
    left = iter(planes)
    few, whole = len(coded(groups)) > 0, any(bits == 16 for _, bits in groups)
    codes, numbers, scales = (_plane(next(left)) if there else NO_PLANE for there in (few, whole, few))
    return *codes, *numbers, *scales, matrix, planes[0].shape[2]
