#!/usr/bin/env bash
# Correctness, then decode timings, on the GPU of this machine, in under 8 minutes. Nothing is installed.
#
#   benchmarks/gpu.sh                         needs CUDA; says so and ends well where there is none
#   benchmarks/gpu.sh --device cpu --quick    the same code in small shapes, anywhere
#
# PYTHON picks the interpreter (python3), OUT the folder of the JSON files (benchmarks/results).
# Status: 1 if a result is out of its bound or swan cannot be imported, 124 if cut off for time, else 0.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
start=$SECONDS

"$python" - <<'EOF' || { echo "gpu.sh: $python cannot import swan; see the line above" >&2; exit 1; }
import sys
try:
    import swan.evaluation.bench
except ModuleNotFoundError as error:
    sys.exit(f"gpu.sh: the module {error.name!r} is missing, and swan imports it (pip install {error.name})")
EOF

if [[ " $* " != *" cpu "* ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: skipped, torch sees no CUDA device here"
    exit 0
fi

mkdir -p "$out"
status=0
timeout --foreground 240 "$python" "$root/benchmarks/cuda_correctness.py" \
    --seconds 170 --json "$out/gpu-correctness.json" "$@" || status=$?

timeout --foreground $((470 - SECONDS + start)) "$python" - "$out/gpu-decode.json" $((450 - SECONDS + start)) "$@" <<'EOF' ||
"""Timings in the shapes of Llama-3.1-8B; the file is written after each shape, so a cut-off run leaves what it has."""

import argparse
import itertools
import json
import time
from datetime import date
from pathlib import Path

import torch

from swan.evaluation.bench import IMPLS, Setup, add_speedups, bench_decode, bench_step
from swan.evaluation.machine import machine, memory_bandwidth, versions

parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path)
parser.add_argument("seconds", type=float)
parser.add_argument("--device", default="cuda")
parser.add_argument("--quick", action="store_true")
args = parser.parse_args()
deadline = time.monotonic() + args.seconds
lengths, batches = ((300, 1100), (1, 2)) if args.quick else ((8192, 32768, 131072), (1, 8))
shape = {"heads": 8, "kv_heads": 2} if args.quick else {"heads": 32, "kv_heads": 8}
shape |= {"head_dim": 64 if args.quick else 128, "buffer": 128}
seconds = 0.2 if args.quick else 1.0
elsewhere = "cpp" if args.device.startswith("cuda") else "triton"
bandwidth = memory_bandwidth(args.device)
settings = {"device": args.device, "seconds_per_row": seconds, "bandwidth": bandwidth, "lengths": lengths}
settings |= {"batches": batches, **shape}
command = "benchmarks/gpu.sh" + (f" --device {args.device}" if args.device != "cuda" else "") + " --quick" * args.quick
about = {"command": command, "date": date.today().isoformat(), "versions": versions(), "machine": machine()}
result = about | {"settings": settings, "rows": []}
columns = "{length:>7} {batch:>2} {form:8} {retention:4} {impl:9} {dtype:9}"
print(f"memory bandwidth {bandwidth / 1e9:.0f} GB/s")

# What compiles slowly comes last: the tiles of a history are unrolled, so its time grows with the length.
rounds = [[impl for impl in IMPLS if impl not in ("compiled", elsewhere)], ["compiled"]]
for impls, length, batch in itertools.product(rounds, lengths, batches):
    left = deadline - time.monotonic()
    if left < 5:
        print(f"out of time: no {', '.join(impls)} at length {length}, batch {batch}")
        continue
    setup = Setup(
        batch=batch, device=torch.device(args.device), seconds=seconds, compile_seconds=min(60, left / 4),
        progress=False, **shape,
    )
    rows = bench_decode([length], setup, impls=impls, bandwidth=bandwidth)
    result["rows"] += rows
    add_speedups(result["rows"])
    args.file.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        measured = "{median_ms:9.3f} ms  spread {spread:.2f}  {bandwidth_fraction:6.1%} of bandwidth  error {error:.1e}"
        speedup = "" if row["speedup"] is None else f"  {row['speedup']:.2f}x"
        text = str(row["error"]) if row["median_ms"] is None else measured.format(**row) + speedup
        print(columns.format(**row), text, flush=True)

# A whole step, and what of it is rotating and packing: by the compiler, and by kernels.
impls = ["compiled", "triton"] if args.device.startswith("cuda") else ["compiled"]
if (left := deadline - time.monotonic()) > 5:
    setup = Setup(
        device=torch.device(args.device), seconds=seconds, compile_seconds=min(60, left / 4), progress=False, **shape
    )
    rows = bench_step(lengths[:1], setup, forms=[("graded", 0.27), ("topk", 0.5)], impls=impls)
    result["rows"] += rows
    args.file.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print("{what:13} {form:8} {impl:9}".format(**row), row["median_ms"], "ms", row["error"] or "", flush=True)
print(f"written to {args.file}")
EOF
    status=$?
exit "$status"
