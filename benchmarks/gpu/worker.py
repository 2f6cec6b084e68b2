"""Runs some jobs of a part in a process of its own: an error of a kernel can end a process, and not the rest.

    python -m benchmarks.gpu.worker PART --device cuda --first 0 --step 8 --begin 0 --deadline SECONDS --locks FOLDER

What it finds goes to stdout, see `rows.emit`: ``job`` when one begins (its index and name), ``row``, and ``about``.
"""

import argparse
import contextlib
import fcntl
import gc
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from swan.evaluation.machine import at_most

from .rows import Job, Row, emit, guarded, outcome

Begun = tuple[int, str, Iterator[Row]]  # index, name and rows of a job
CRASHED = 3  # exit status: the GPU answers nothing more to this process
TIMING = 25.0  # seconds that are left for timings where jobs are prepared first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--quick", action="store_true")
    for name in ("first", "step", "begin"):
        parser.add_argument(f"--{name}", type=int, required=True, help="jobs to run: first, step, least index")
    parser.add_argument("--deadline", type=float, required=True, help="as time.time() counts")
    parser.add_argument("--locks", type=Path, required=True, help="folder that the processes of a run share")
    args = parser.parse_args()
    timing = args.locks / "timing"
    module = importlib.import_module(f".{args.part}", __package__)
    jobs: list[Job | None] = module.jobs(args.device, args.quick)
    mine = [(i, job) for i, job in enumerate(jobs) if job and i % args.step == args.first and i >= args.begin]
    begun = [(index, name, guarded(name, run())) for index, (name, run) in mine]
    with torch.no_grad():
        if getattr(module, "PREPARES", False):
            begun = prepared(begun, args.deadline - TIMING, timing)
        for index, name, rows in begun:
            with locked(timing, fcntl.LOCK_EX) if args.part != "correctness" else contextlib.nullcontext():
                emit("job", [index, name])
                run_until(args.deadline, name, rows)
            stop_if_crashed(args.device)


def prepared(begun: list[Begun], deadline: float, timing: Path) -> list[Begun]:
    """Run each job up to its first yield; as all processes do that at once, none is timed before all are ready."""
    ready = []
    with locked(timing, fcntl.LOCK_SH):
        for index, name, rows in begun:
            emit("prepare", [index, name])
            if run_until(deadline, name, rows, once=True):
                ready.append((index, name, rows))
    return ready


def run_until(deadline: float, name: str, rows: Iterator[Row], once: bool = False) -> bool:
    """Hand on the rows of a job, of which the empty ones say nothing; skip what is too late. True if it went well."""
    left = deadline - time.time()
    if left < 1:
        emit("row", {"job": name} | outcome(name, "skipped", "the time is over"))
        return False
    with at_most(left, name):
        for row in rows:
            if row:
                emit("row", {"job": name} | row)
            if once:
                return not row
    return True


def stop_if_crashed(device: torch.device) -> None:
    """End this process if the GPU answers nothing more; the next one goes on."""
    if device.type != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        os._exit(CRASHED)


@contextlib.contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Hold the lock of a file, shared or alone."""
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield


if __name__ == "__main__":
    sys.exit(main())
