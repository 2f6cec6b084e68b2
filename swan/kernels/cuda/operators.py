"""The kernels as operators of torch: `torch.ops.swan.attend_cuda` and the others, once this module is imported."""

# ruff: noqa: E501
# pyright: reportUnknownMemberType=false

import functools

import torch

from swan.kernels import dim_of
from swan.kernels.cuda.attend import attend, attend_pages
from swan.kernels.cuda.layouts import empty_planes, groups_of
from swan.kernels.cuda.pack import pack, pack_pages, take_in, unpack
from swan.kernels.cuda.runs import take_in_runs

__all__ = ["FUNCTIONS", "LIBRARY", "OPERATORS"]

FUNCTIONS = {function.__name__: function for function in (attend, attend_pages, pack, pack_pages, unpack)}
FUNCTIONS["take_in"] = take_in_runs(take_in)

LIBRARY = torch.library.Library("swan", "FRAGMENT")
LIBRARY.define(
    "attend_cuda(Tensor q, Tensor[] k, int[] k_layout, Tensor[] v, int[] v_layout, SymInt tokens, Tensor? mask, float scale, "
    "Tensor[] mixes, Tensor[] recent, Tensor? recent_mask, Tensor? first, Tensor? end, SymInt start) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attend_pages_cuda(Tensor q, Tensor[] k, int[] k_layout, Tensor[] v, int[] v_layout, Tensor table, SymInt first, Tensor ends, "
    "float scale, Tensor[] mixes, Tensor[] recent, Tensor? recent_mask) -> (Tensor, Tensor)"
)
LIBRARY.define("pack_cuda(Tensor x, int[] layout, Tensor matrix) -> Tensor[]")
LIBRARY.define(
    "pack_pages_cuda(Tensor k, Tensor v, Tensor(a!)[] k_pages, Tensor(b!)[] v_pages, int[] k_layout, int[] v_layout, "
    "Tensor[] mixes, Tensor slots, SymInt page) -> ()"
)
LIBRARY.define(
    "take_in_cuda(Tensor k, Tensor v, Tensor(a!) k_recent, Tensor(b!) v_recent, Tensor(c!)[] k_history, Tensor(d!)[] v_history, "
    "int[] k_layout, int[] v_layout, Tensor[] mixes, Tensor[] counters, Tensor? padding, SymInt sinks, SymInt start) -> ()"
)
LIBRARY.define("unpack_cuda(Tensor[] planes, int[] layout, SymInt tokens, Tensor like) -> Tensor")
# Memory that is kept must not come from compiled code: torch takes what it allocates for a part of its CUDA graph.
OPERATORS = FUNCTIONS | {
    name: functools.partial(FUNCTIONS[name], one_launch=False) for name in ("attend", "attend_pages")
}
for name, function in OPERATORS.items():
    LIBRARY.impl(f"{name}_cuda", function, "CUDA")


@torch.library.register_fake("swan::attend_cuda", lib=LIBRARY)
@torch.library.register_fake("swan::attend_pages_cuda", lib=LIBRARY)
def _(q, k, k_layout, v, v_layout, *_):  # pyright: ignore
    return q.new_empty(*q.shape[:3], dim_of(v_layout)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("swan::pack_cuda", lib=LIBRARY)
def _(x, layout, matrix):  # pyright: ignore
    return empty_planes(x, groups_of(layout))


@torch.library.register_fake("swan::pack_pages_cuda", lib=LIBRARY)
@torch.library.register_fake("swan::take_in_cuda", lib=LIBRARY)
def _(*_):  # pyright: ignore
    return None


@torch.library.register_fake("swan::unpack_cuda", lib=LIBRARY)
def _(planes, layout, tokens, like):  # pyright: ignore
    stored = next(plane for plane in planes if plane.ndim == 4)
    return like.new_empty(*stored.shape[:2], tokens, sum(layout[1::2]))
