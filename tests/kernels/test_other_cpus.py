"""The inner loops of the CPU kernels on a CPU that is not this one: compiled for aarch64, and run in an emulator."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

from swan import Graded, LayerPlan
from swan.functional import reference
from swan.kernels import cpu
from swan.storage.packed import unpack_mixed
from tests.compilers import needs_cxx
from tests.strategies import assert_lse_within, assert_within, attention_bound, normal

PLANS = [
    LayerPlan(Graded(((32, 6), (32, 5), (64, 3))), Graded(((128, 4),))),
    LayerPlan(Graded(((16, 8), (16, 2), (32, 1))), Graded(((24, 3), (8, 0)))),
    LayerPlan(Graded(((5, 6), (11, 4))), Graded(((7, 2), (20, 1), (13, 5)))),
    LayerPlan(Graded(((8, 1),)), Graded(((8, 4),))),  # rows of a word, behind which a unit reads on
]
TARGETS = {
    "aarch64": ("aarch64-linux-gnu-g++", ("-static",), ("qemu-aarch64",)),
    "here": ("c++", (), ()),
    "here, avx2": ("c++", ("-march=x86-64-v3",), ()),
    "here, avx2, memory checked": ("c++", ("-march=x86-64-v3", "-O1", "-fsanitize=address,undefined"), ()),
}


def marks(target: str) -> list:
    compiler, flags, emulator = TARGETS[target]
    if not emulator:
        can = "x86" not in str(flags) or "avx2" in cpu.variants()
        return [needs_cxx, pytest.mark.skipif(not can, reason="this CPU has no AVX2")]
    missing = [name for name in (compiler, *emulator) if shutil.which(name) is None]
    return [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")]


@pytest.fixture(scope="module", params=[pytest.param(target, marks=marks(target)) for target in TARGETS])
def program(request, tmp_path_factory):
    compiler, flags, emulator = TARGETS[request.param]
    binary = tmp_path_factory.mktemp("inner") / "loops"
    headers = [f"-I{path}" for path in (cpu.FOLDER, *include_paths())]
    source = Path(__file__).with_name("inner_loops.cpp")
    options = ["-O2", "-std=c++20", "-ffunction-sections", "-fno-math-errno", *flags]
    subprocess.run([compiler, *options, *headers, str(source), "-o", str(binary)], check=True)
    return [*emulator, str(binary)]


@pytest.mark.parametrize("plan_layer", PLANS, ids=lambda p: f"{p.keys.groups}")
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("tokens", [65, 150])
def test_inner_loops(program, plan_layer, rows, tokens):
    d, dv = plan_layer.keys.d, plan_layer.values.d
    q = normal(0, 1, rows, 1, d) * d**-0.5
    packed = [
        layout.pack(normal(i, 1, 1, tokens, layout.d)) for i, layout in enumerate((plan_layer.keys, plan_layer.values))
    ]
    given = [np.array([tokens, rows]).tobytes()]
    for vectors in packed:
        codes, scales, numbers = vectors.planes[0], vectors.scales, vectors.format.numbers
        given.append(np.array([len(numbers), codes.shape[-1], scales.shape[-1], *numbers]).tobytes())
        given += [codes.numpy().tobytes(), scales.numpy().tobytes()]
    given.append(q.numpy().tobytes())
    answer = subprocess.run(program, input=b"".join(given), capture_output=True, check=True).stdout
    out, peak, total = torch.frombuffer(bytearray(answer), dtype=torch.float32).split([rows * dv, rows, rows])
    keys, values = (unpack_mixed(vectors) for vectors in packed)
    expected, expected_lse = reference.dense_attention(q.double(), keys.double(), values.double(), scale=1.0)
    rounding = float(q.abs().max()) * 2.0**-15 * float(keys.abs().sum(-1).max())  # of queries of two bytes
    limit = attention_bound(q, keys, values, 1.0) + (2 * rounding + 64 * 2.0**-15) * float(values.abs().max())
    assert_within(out.view(1, rows, 1, dv) / total.view(1, rows, 1, 1), expected, limit)
    assert_lse_within((peak + total.log()).view(1, rows, 1), expected_lse, rounding + 1e-5)
