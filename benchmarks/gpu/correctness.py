"""Every public function and module on a device, eager and compiled, against float64 there.

Inputs are rounded to the dtype first, so the oracle, the plain code of `swan.functional.reference` in float64, sees
the same numbers. The error of an output is its largest deviation over the root mean square of the oracle. Its bound is
4 times the error of the same plain code run in the dtype, plus 8 of the dtype's epsilon, plus what a kernel or a code
may round; for what only selects and moves numbers it is 0.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.utils import _pytree as pytree

from swan import Packed, unpack

from . import kernels
from .functions import Case, cases
from .rows import Job, Row

COMPILED = (
    "rotate", "pack, unpack: graded", "packed_attention: graded", "packed_attention: leading",
    "swan_attention: leading", "KVCache: leading static", "SwanAttention: cache",
)  # fmt: skip

SLOW = ("flex", "topk ")  # FlexAttention compiles, and the oracle of top-k goes number by number


def jobs(device: torch.device, quick: bool) -> list[Job]:
    """List the jobs: the kernels in full, then each function, eager in every dtype and some compiled in bfloat16."""
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.error_on_recompile = True  # every case, steps of a static cache too, compiles once
    found = kernels.jobs(device, quick)
    if quick:
        few = [case for case in cases(torch.bfloat16, device) if not any(word in case.name for word in SLOW)]
        return found + [job(case, torch.bfloat16, device) for case in few]
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        found += [job(case, dtype, device) for case in cases(dtype, device)]
    chosen = [case for case in cases(torch.bfloat16, device) if case.name in COMPILED]
    return found + [job(case, torch.bfloat16, device, compiled=True) for case in chosen]


def job(case: Case, dtype: torch.dtype, device: torch.device, compiled: bool = False) -> Job:
    mode = "compiled" if compiled else "eager"
    about = {"case": case.name, "dtype": f"{dtype}".removeprefix("torch."), "mode": mode}

    def run() -> Iterator[Row]:
        yield about | check(case, dtype, device, compiled)

    return f"{case.name} {about['dtype']} {mode}", run


def check(case: Case, dtype: torch.dtype, device: torch.device, compiled: bool) -> Row:
    """Run a case and its oracle."""
    inputs = pytree.tree_map_only(Tensor, lambda t: t.to(device), case.inputs)
    with torch.device(device):  # where plain code makes masks
        expected = tensors(case.oracle(*pytree.tree_map(wide, inputs, is_leaf=is_packed)))
        plain = tensors(case.oracle(*pytree.tree_map(dense, inputs, is_leaf=is_packed)))
    if compiled or "flex" in case.name:
        torch.compiler.reset()
    inductor: Any = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    error = deviation(tensors(case.run(inductor if compiled else lambda fn: fn, *inputs)), expected)
    bound = 0.0 if case.exact else 4 * deviation(plain, expected) + 8 * torch.finfo(dtype).eps + case.slack
    return {"error": error, "bound": bound, "result": "passed" if error <= bound else "failed"}


def deviation(out: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compute the worst output's largest deviation over the oracle's root mean square."""
    worst = 0.0
    for a, b in zip(out, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shape {list(a.shape)}, expected {list(b.shape)}")
        a, b = a.double(), b.double().to(a.device)
        finite = b.isfinite()
        if not torch.equal(a[~finite], b[~finite]) or not a.isfinite().equal(finite):
            raise ValueError("infinite or NaN where the oracle is not, or the other way round")
        scale = b[finite].square().mean().sqrt().clamp(min=1e-30)
        worst = max(worst, ((a - b)[finite].abs().max() / scale).item())
    return worst


def tensors(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def wide(x: Any) -> Any:
    """Widen an input for the oracle: float64, packed vectors dense and without the rounding of the dtype."""
    if isinstance(x, Packed):
        return unpack(dataclasses.replace(x, dtype=torch.float64)).double()
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def dense(x: Any) -> Any:
    return unpack(x) if isinstance(x, Packed) else x
