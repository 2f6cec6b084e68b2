#!/usr/bin/env bash
# Correctness, then timings, on the GPU of this machine, in under 5 minutes. Nothing is installed.
#
#   benchmarks/gpu.sh                         needs CUDA; says so and ends well where there is none
#   benchmarks/gpu.sh --device cpu --quick    the same code in small shapes, anywhere
#   benchmarks/gpu.sh --only correctness      one part of environment, correctness, speed, model
#
# PYTHON picks the interpreter (python3), OUT the folder of the JSON files (benchmarks/results).
# Status: 1 if a result is out of its bound or a package is missing, else 0. The work is done in benchmarks/gpu/.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-$root/benchmarks/results}")
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

"$python" - "$@" <<'END' || exit $(($? == 9 ? 0 : 1))
import importlib.util
import sys

needed = ("torch", "transformers", "numpy", "einops", "safetensors")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    sys.exit(f"gpu.sh: swan and this script need {', '.join(missing)} (pip install {' '.join(missing)})")
if "cpu" not in sys.argv:
    import torch

    if not torch.cuda.is_available():
        print("gpu.sh: skipped, torch sees no CUDA device here")
        sys.exit(9)
END

exec "$python" -m benchmarks.gpu --out "$out" "$@"
