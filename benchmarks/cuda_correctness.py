"""Every public function and module on an accelerator, eager and compiled, against float64 on the CPU.

    python benchmarks/cuda_correctness.py [--device cuda] [--seconds 200] [--only TEXT] [--json FILE] [--quick]

Prints a table and ends with status 1 if a result is out of its bound. Inputs are rounded to the dtype
first, so the oracle, the plain code of `swan.functional.reference` in float64, sees the same numbers. The
error of an output is its largest deviation over the root mean square of the oracle. Its bound is 4 times
the error of the same plain code run in the dtype, plus 8 of the dtype's epsilon; for what only selects
and moves numbers it is 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from cuda_cases import Case, Compile, cases
from torch import Tensor
from torch.utils import _pytree as pytree

from swan import Packed, unpack
from swan.evaluation.machine import TooLong, at_most, machine, versions

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=200, help="time; compiled cases beyond it are skipped")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--quick", action="store_true", help="compile with aot_eager instead of inductor")
    parser.add_argument("--only", default="", help="cases with this in their name")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.error_on_recompile = True  # every case, steps of a static cache too, compiles once
    deadline = time.monotonic() + args.seconds
    inductor = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    compilers: dict[str, Compile] = {
        "eager": lambda fn: fn,
        "compiled": functools.partial(inductor, backend="aot_eager") if args.quick else inductor,
    }
    rows: list[dict[str, Any]] = []
    print(f"{'case':44} {'dtype':9} {'mode':9} {'error':>9} {'bound':>9}")
    for mode, compiler in compilers.items():
        for dtype in DTYPES:
            for case in cases(dtype, torch.device(args.device)):
                if args.only not in case.name:
                    continue
                left = deadline - time.monotonic() if mode == "compiled" else 60
                row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
                row |= check(case, dtype, args.device, compiler, left)
                rows.append(row)
                print("{case:44} {dtype:9} {mode:9}".format(**row), verdict(row), flush=True)
    failed, skipped = ([row for row in rows if row["result"] == result] for result in ("failed", "skipped"))
    print(f"{len(rows) - len(failed) - len(skipped)} passed, {len(failed)} failed, {len(skipped)} skipped for time")
    for row in failed:
        print("FAILED: {case}, {dtype}, {mode}:".format(**row), verdict(row))
    if args.json:
        settings = {"device": args.device, "quick": args.quick, "seconds": args.seconds}
        command = "python " + " ".join(sys.argv)
        about = {"command": command, "date": date.today().isoformat(), "versions": versions(), "machine": machine()}
        result = about | {"settings": settings, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


def verdict(row: dict[str, Any]) -> str:
    if row["error"] is None:
        return f"{row['result']}: {row['reason']}"
    return f"{row['error']:9.2e} {row['bound']:9.2e} {'' if row['result'] == 'passed' else 'OUT OF BOUND'}"


def check(case: Case, dtype: torch.dtype, device: str, compiler: Compile, seconds: float) -> dict[str, Any]:
    if seconds <= 0:
        return {"error": None, "bound": None, "result": "skipped", "reason": "the time is over"}
    torch.compiler.reset()
    try:
        expected = tensors(case.oracle(*pytree.tree_map(wide, case.inputs, is_leaf=is_packed)))
        plain = tensors(case.oracle(*pytree.tree_map(dense, case.inputs, is_leaf=is_packed)))
        with at_most(seconds, "the case"), torch.no_grad():
            out = tensors(case.run(compiler, *pytree.tree_map_only(Tensor, lambda t: t.to(device), case.inputs)))
            error = deviation([t.cpu() for t in out], expected)
    except TooLong as late:
        return {"error": None, "bound": None, "result": "skipped", "reason": str(late)}
    except Exception as failure:
        reason = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"[:300]
        return {"error": None, "bound": None, "result": "failed", "reason": reason}
    bound = 0.0 if case.exact else 4 * deviation(plain, expected) + 8 * torch.finfo(dtype).eps + case.slack
    return {"error": error, "bound": bound, "result": "passed" if error <= bound else "failed", "reason": None}


def deviation(out: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compute the worst output's largest deviation over the oracle's root mean square."""
    worst = 0.0
    for a, b in zip(out, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shape {list(a.shape)}, expected {list(b.shape)}")
        a, b, finite = a.double(), b.double(), b.isfinite()
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


if __name__ == "__main__":
    sys.exit(main())
