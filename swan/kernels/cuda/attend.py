"""The operator that attends on an NVIDIA GPU: what its kernels are compiled for, and how they are launched."""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swan.kernels.cuda.device import arrivals, limits
from swan.kernels.cuda.launch import Kernel
from swan.kernels.cuda.layouts import ALIGNMENT, Groups, coded, dim_of, groups_of, in_room, macros, vector_bytes

__all__ = ["attend", "attend_pages", "pair_of", "shared_bytes"]

SOURCE = Path(__file__).parent / "attend.cu"
TILE, ROWS = 32, 8  # tokens of a tile, which a warp reads at a time, and query rows of a program: as in the source
SHAPES = ((4, 3), (4, 2), (2, 3), (2, 2), (1, 2))  # warps of a program, and tiles of each in shared memory
# The struct AttendArguments of arguments.cuh, in the notation of `struct`.
PLANE, DENSE, MASK = "Q2q", "Q3q", "Q4q"
ARGUMENTS = f"Q3q2Q{PLANE * 6}{DENSE * 2}{MASK * 2}2Q2q5Q6ifQ2qi0Q"
NO_PLANE, NO_DENSE, NO_MASK = (None, 0, 0), (None, 0, 0, 0), (None, 0, 0, 0, 0)


class Where(NamedTuple):
    """Where packed tokens are, and which of them queries see: the fields of the struct."""

    tokens: int  # of a sequence, or all that its pages have room for
    first: Tensor | None = None
    end: Tensor | None = None
    end_query: int = 0  # stride
    origin: int = 0
    page: int = 0  # tokens of a page
    pages: tuple[Tensor | None, int, int, int] = (None, 0, 0, 0)  # the struct Pages


class Pair(NamedTuple):
    """The kernels of a pair of layouts on a GPU."""

    attend: Kernel
    merge: Kernel
    warps: int
    programs: int  # that run on the GPU at the same time


def attend(
    q: Tensor,
    k: list[Tensor],
    k_layout: list[int],
    v: list[Tensor],
    v_layout: list[int],
    tokens: int,
    mask: Tensor | None,
    scale: float,
    mixes: list[Tensor],
    recent: list[Tensor],
    recent_mask: Tensor | None,
    first: Tensor | None,
    end: Tensor | None,
    start: int,
    *,
    one_launch: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend as `swan.kernels.calls.attend` says, on torch's current stream.

    With `one_launch`, outside of CUDA graphs, the last program merges what all have found; else a second kernel does.
    """
    k, v = ([plane if plane.ndim == 1 else in_room(plane, tokens) for plane in planes] for planes in (k, v))
    if first is not None:
        first = first.reshape(-1).expand(q.shape[0]).contiguous()
    if end is not None:
        end = end.reshape(-1)
    where = Where(tokens, first, end, 0 if end is None or len(end) == 1 else end.stride(0), start)
    return _launch(q, k, k_layout, v, v_layout, where, mask, scale, mixes, recent, recent_mask, one_launch)


def attend_pages(
    q: Tensor,
    k: list[Tensor],
    k_layout: list[int],
    v: list[Tensor],
    v_layout: list[int],
    table: Tensor,
    first: int,
    ends: Tensor,
    scale: float,
    mixes: list[Tensor],
    recent: list[Tensor],
    recent_mask: Tensor | None,
    *,
    one_launch: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend as `swan.kernels.calls.attend_pages` says, on torch's current stream, as `attend` does.

    Raises:
        ValueError: pages are not as a kernel reads them, or a tensor is of another shape or dtype.
    """
    page = _tokens_of_pages([plane for plane in (*k, *v) if plane.ndim == 4])
    fit = table.ndim == 2 and len(table) == len(q) and ends.shape == (q.shape[0], q.shape[2])
    if not fit or table.dtype != torch.long or ends.dtype != torch.long:
        raise ValueError("expected table [batch, pages] and ends [batch, queries] of int64")
    table = table if table.stride(1) == 1 else table.contiguous()
    pages = table, table.stride(0), ends.stride(0), first
    where = Where(table.shape[1] * page, None, ends, ends.stride(1), page=page, pages=pages)
    return _launch(q, k, k_layout, v, v_layout, where, None, scale, mixes, recent, recent_mask, one_launch)


def _launch(
    q: Tensor,
    k: list[Tensor],
    k_layout: list[int],
    v: list[Tensor],
    v_layout: list[int],
    where: Where,
    mask: Tensor | None,
    scale: float,
    mixes: list[Tensor],
    recent: list[Tensor],
    recent_mask: Tensor | None,
    one_launch: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    kv_heads = next(plane for plane in k if plane.ndim == 4).shape[1]
    keys, values = groups_of(k_layout), groups_of(v_layout)
    dv, groups, workers = dim_of(values), heads // kv_heads, batch * kv_heads
    out, lse = q.new_empty(batch, heads, queries, dv), q.new_empty(batch, heads, queries, dtype=torch.float32)
    tokens, beside = where.tokens, recent[0].shape[2] if recent else 0
    if not tokens and not beside:
        return out.zero_(), lse.fill_(-math.inf)

    index, rows = q.get_device(), groups * queries
    eighths = -(-rows // ROWS)
    pair = pair_of(keys, values, q.dtype, index, where.page)
    splits = _splits(tokens, pair.warps, pair.programs // (workers * eighths))
    parts = splits + (beside > 0)
    partial = q.new_empty(workers * parts * rows, dv, dtype=torch.float32)
    partial_lse = q.new_empty(workers * parts * rows, dtype=torch.float32)
    arrived = arrivals(index, workers * eighths) if one_launch else None
    if not _in_pairs(q):
        q = q.clone(memory_format=torch.contiguous_format)
    recent = [_with_rows(x) for x in recent] if beside else []
    arguments: tuple[Any, ...] = (
        q, *q.stride()[:3], *mixes, *_planes(k), *_planes(v),
        *((*_dense(recent[0]), *_dense(recent[1])) if beside else NO_DENSE * 2), *_mask(mask), *_mask(recent_mask),
        where.first, where.end, where.end_query, where.origin,
        partial, partial_lse, out, lse, arrived, tokens, beside, splits, kv_heads, groups, queries, scale, *where.pages,
    )  # fmt: skip
    pair.attend.launch(index, (parts, workers, eighths), *arguments)
    if arrived is None:
        pair.merge.launch(index, (workers, rows, 1), *arguments)
    return out, lse


@functools.cache
def pair_of(keys: Groups, values: Groups, dtype: torch.dtype, index: int, page: int = 0) -> Pair:
    """Choose the shape of programs for layouts on a GPU: the first of which two fit on a processor, or else one.

    `page`: tokens of a page; 0 where those of a sequence lie in one piece.
    """
    d, dv = dim_of(keys), dim_of(values)
    found, most = limits(index), 2 if d + dv > 256 else 4  # programs on a processor: what registers allow
    sizes = [shared_bytes(keys, values, dtype.itemsize, *shape) for shape in SHAPES]
    fits = [found.programs(size) for size in sizes]
    chosen = next(i for least in (2, 1) for i, count in enumerate(fits) if count >= least)
    warps, stages = SHAPES[chosen]
    defines = macros(keys, values, dtype) | {"WARPS": warps, "STAGES": stages, "PROGRAMS": most, "PAGE": page}
    attend = Kernel(SOURCE, "attend", defines, ARGUMENTS, warps * 32, sizes[chosen])
    merge = Kernel(SOURCE, "merge", defines, ARGUMENTS, -(-dv // 32) * 32, dv * 4)
    return Pair(attend, merge, warps, found.processors * min(most, fits[chosen]))


def shared_bytes(keys: Groups, values: Groups, itemsize: int, warps: int, stages: int) -> int:
    """Count the shared memory of a program: tiles, their scales, numbers of each query row; or sums to merge.

    Queries stand in the last stage of tiles, and behind it, before it is filled.
    """
    d, dv = dim_of(keys), dim_of(values)
    stage = warps * TILE * sum(vector_bytes(groups, itemsize) for groups in (keys, values))
    scales = warps * TILE * len(coded(keys) + coded(values)) * 4
    tiles = stages * stage + scales + (1 + 2 * len(coded(keys))) * ROWS * 4
    queries = (stages - 1) * stage + ROWS * (d + 4) * 4
    recent = ROWS * (d + 4 + 1) * 4
    sums = warps * ROWS * (2 + dv) * 4
    return max(tiles, queries, recent, sums)


def _splits(tokens: int, warps: int, programs: int) -> int:
    """Split a history so that programs fill the GPU, as long as each of their warps has a tile."""
    return min(max(programs, 1), -(-tokens // (warps * TILE)))


def _tokens_of_pages(planes: list[Tensor]) -> int:
    """Return the tokens of a page, where all planes have pages as a kernel reads them."""
    tokens = planes[0].shape[2]
    for x in planes:
        size, (page, head, token, one) = x.element_size(), x.stride()
        aligned = not (x.data_ptr() | page * size | head * size) % ALIGNMENT
        if tokens % TILE or x.shape[2] != tokens or token != x.shape[3] or one != 1:
            raise ValueError(f"pages hold a multiple of {TILE} tokens, which follow each other in each plane")
        if not aligned or page * size >= 2**31:
            raise ValueError(f"pages and their planes begin at multiples of {ALIGNMENT} bytes, less than 2 GiB apart")
    return tokens


def _in_pairs(q: Tensor) -> bool:
    """Tell if pairs of numbers lie at multiples of their size."""
    batch, head, query, one = q.stride()
    return one == 1 and not (batch | head | query) % 2 and not q.data_ptr() % (2 * q.element_size())


def _with_rows(x: Tensor) -> Tensor:
    """Return dense tokens whose rows lie at multiples of 16 bytes, where a kernel reads them; or a copy of them."""
    batch, head, token, one = x.stride()
    places = x.data_ptr() | (batch | head | token) * x.element_size()
    return x if one == 1 and not places % 16 else x.clone(memory_format=torch.contiguous_format)


def _planes(planes: list[Tensor]) -> tuple[Any, ...]:
    codes, whole, scales, _ = planes
    return (*_plane(codes), *_plane(scales), *_plane(whole))


def _plane(x: Tensor) -> tuple[Any, ...]:
    if x.ndim == 1:
        return NO_PLANE
    size, (batch, head, _, _) = x.element_size(), x.stride()
    return x, batch * size, head * size


def _dense(x: Tensor) -> tuple[Any, ...]:
    size, (batch, head, token, _) = x.element_size(), x.stride()
    return x, batch * size, head * size, token * size


def _mask(mask: Tensor | None) -> tuple[Any, ...]:
    if mask is None:
        return NO_MASK
    return mask, *(0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))
