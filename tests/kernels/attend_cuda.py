"""The kernels of swan/kernels/cuda/attend.cu run on a CPU, as the library will launch them on a GPU."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swan.kernels.cuda
from swan import Graded, Packed
from swan.kernels.cuda import layouts
from swan.kernels.cuda.attend import shared_bytes
from swan.storage.packed import mixing
from tests.kernels.cuda_on_cpu import build, struct, unwritten, writable

SOURCE = Path(swan.kernels.cuda.__file__).parent / "attend.cu"
TILE, ROWS = 32, 8


def fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class Plane(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *fields(ctypes.c_int64, "batch", "head")]


class Planes(ctypes.Structure):
    _fields_ = fields(Plane, "codes", "scales", "whole")


class Dense(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *fields(ctypes.c_int64, "batch", "head", "token")]


class Mask(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *fields(ctypes.c_int64, "batch", "head", "query", "token")]


class Pages(ctypes.Structure):
    _fields_ = [
        ("table", ctypes.c_void_p),
        *fields(ctypes.c_int64, "table_batch", "end_batch"),
        ("begin", ctypes.c_int),
    ]


class AttendArguments(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        *fields(ctypes.c_int64, "q_batch", "q_head", "q_query"),
        *fields(ctypes.c_void_p, "k_mix", "v_mix"),
        *fields(Planes, "k", "v"),
        *fields(Dense, "recent_k", "recent_v"),
        *fields(Mask, "mask", "recent_mask"),
        *fields(ctypes.c_void_p, "first", "end"),
        *fields(ctypes.c_int64, "end_query", "origin"),
        *fields(ctypes.c_void_p, "partial", "lse", "out", "out_lse", "arrived"),
        *fields(ctypes.c_int, "tokens", "recent", "splits", "kv_heads", "groups", "queries"),
        ("scale", ctypes.c_float),
        ("pages", Pages),
    ]


def macros(k: Graded, v: Graded, dtype: torch.dtype, **others: Any) -> dict[str, Any]:
    """The macros of a pair of layouts."""
    return {**layouts.macros(k.groups, v.groups, dtype), **others}


def room_of(x: Tensor) -> Tensor:
    """The same tokens in a tensor with room for a multiple of 64, where the rest is no number."""
    batch, heads, tokens, width = x.shape
    room = torch.empty(batch, heads, max(-(-tokens // 64), 1) * 64, width, dtype=x.dtype)
    room.view(torch.uint8).fill_(255)
    room[:, :, :tokens] = x
    return room


def planes(x: Packed) -> dict[str, Any]:
    tensors = [room_of(t) for t in x.planes]
    codes = tensors[0] if x.scales is not None else None
    whole = tensors[-1] if any(bits == 16 for _, _, bits in x.format.stored) else None
    scales = None if x.scales is None else room_of(x.scales)
    return {name: strided(t, "batch", "head") for name, t in (("codes", codes), ("scales", scales), ("whole", whole))}


def strided(x: Tensor | None, *axes: str) -> Mapping[str, Any]:
    """A tensor and its strides in bytes, 0 where an axis has one element."""
    if x is None:
        return {"data": None}
    sizes = [0 if n == 1 else s * x.element_size() for n, s in zip(x.shape, x.stride(), strict=True)]
    return {"data": x, **dict(zip(axes, sizes, strict=False))}


@dataclass
class Recent:
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


def attend(
    q: Tensor,
    k: Packed,
    v: Packed,
    scale: float,
    splits: int = 1,
    recent: Recent | None = None,
    mask: Tensor | None = None,
    first: Tensor | None = None,
    end: Tensor | None = None,
    origin: int = 0,
    *,
    last_merges: bool = False,
    in_turns: bool = False,
    source: Path = SOURCE,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Run the kernels; returns the output [batch, heads, queries, dv] and the natural log-sum-exp.

    Args:
        q, k, v, scale: queries, keys, values, and the factor of scores.
        splits: of the history.
        recent: tokens that are dense.
        mask: of the packed tokens.
        first, end: columns, see `AttendArguments`; `end` has one element for all queries, or one for each.
        origin: the column of the first packed token.
        last_merges: the last program of some rows merges their parts, rather than a second kernel.
        in_turns: programs take turns.
        source: the file.
        others: macros.
    """
    assert isinstance(k.format, Graded) and isinstance(v.format, Graded)
    batch, heads, queries, _ = q.shape
    kv_heads, tokens, dv = k.shape[1], k.shape[2], v.shape[3]
    splits = splits if tokens else 0
    rows, parts = heads // kv_heads * queries, splits + (recent is not None)
    warps, stages = others.get("WARPS", 4), others.get("STAGES", 3)
    kernels = build(source, macros(k.format, v.format, q.dtype, **others))
    partial = unwritten(torch.empty(batch * kv_heads, parts, rows, dv))
    lse = unwritten(torch.empty(batch * kv_heads, parts, rows))
    out, out_lse = torch.empty(batch, heads, queries, dv, dtype=q.dtype), torch.empty(batch, heads, queries)
    eighths = -(-rows // ROWS)
    arrived = torch.zeros(eighths, batch * kv_heads, dtype=torch.int32)
    arguments = struct(
        AttendArguments,
        q=q,
        q_batch=q.stride(0),
        q_head=q.stride(1),
        q_query=q.stride(2),
        k_mix=mixing(k),
        v_mix=mixing(v),
        k=planes(k),
        v=planes(v),
        recent_k=strided(recent and recent.keys, "batch", "head", "token"),
        recent_v=strided(recent and recent.values, "batch", "head", "token"),
        mask=strided(mask, "batch", "head", "query", "token"),
        recent_mask=strided(recent and recent.mask, "batch", "head", "query", "token"),
        first=first,
        end=end,
        end_query=0 if end is None or len(end) == 1 else end.stride(0),
        origin=origin,
        partial=partial,
        lse=lse,
        out=unwritten(out),
        out_lse=unwritten(out_lse),
        arrived=writable(arrived) if last_merges else None,
        tokens=tokens,
        recent=recent.keys.shape[2] if recent else 0,
        splits=splits,
        kv_heads=kv_heads,
        groups=heads // kv_heads,
        queries=queries,
        scale=scale,
    )
    grid = parts, batch * kv_heads, eighths
    shared = shared_bytes(k.format.groups, v.format.groups, q.element_size(), warps, stages)
    kernels.launch("attend", grid, warps * 32, shared, arguments, in_turns=in_turns)
    if not last_merges:
        kernels.launch("merge", (batch * kv_heads, rows), -(-dv // 32) * 32, dv * 4, arguments)
    assert (arrived == 0).all()
    return out, out_lse
