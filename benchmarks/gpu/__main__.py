"""Correctness, then timings, on one GPU in at most 5 minutes: starts the processes of each part, and keeps their rows.

    python -m benchmarks.gpu [--device cuda] [--quick] [--out FOLDER] [--only PART ...]

This process never uses the GPU. A process that crashes or hangs is replaced by one that goes on after the job in
which it did. Each row is in its JSON file as soon as it is known. Status 1 if a result is out of its bound.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .processes import Part, run_part
from .results import Results

# Part, file of its rows, processes, seconds from the start until which it runs, and in which a process must say
# something. Compiling a whole model takes a minute.
PARTS = (
    Part("environment", "correctness", 1, 40, 40),
    Part("correctness", "correctness", 8, 115, 75),
    Part("speed", "speed", 1, 185, 75),
    Part("model", "speed", 8, 280, 120),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, and nothing compiles for long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # so that processes are ended
    args.out.mkdir(parents=True, exist_ok=True)
    options = ["--device", args.device, *(["--quick"] if args.quick else [])]
    shown = options if args.device != "cuda" else options[2:]
    command = " ".join(["benchmarks/gpu.sh", *shown])
    settings: dict[str, Any] = {"device": args.device, "quick": args.quick}
    results, start = Results(args.out, command, settings), time.time()
    with tempfile.TemporaryDirectory() as locks:
        for part in PARTS:
            if args.only is None or part.name in args.only:
                print(f"--- {part.name}, {time.time() - start:.0f} s", flush=True)
                run_part(part, [*options, "--locks", locks], results, start)
    return results.conclude(time.time() - start)


if __name__ == "__main__":
    sys.exit(main())
