"""Modules that `import swan` loads, and settings of the command line from before torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import swan


def run(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_swan_imports_neither_the_compiler_nor_an_extra():
    """Nor does eager use: a cache that decodes. torch._dynamo alone takes longer to import than all of swan."""
    code = """
import sys, torch, swan
print(*[name for name in ("torch._dynamo", "sympy", "triton", "transformers", "rich", "typer") if name in sys.modules])
layer = swan.LayerPlan(swan.Graded(((32, 4),)), swan.TopK(32, 8))
cache = swan.KVCache(layer, buffer=4)
for tokens in (9, 1):
    cache(torch.randn(1, 4, tokens, 32), *torch.randn(2, 1, 2, tokens, 32), impl="compiled")
assert cache.history_length == 2
"""
    assert run(code) == ""


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["swan", "demo"], {}, "1000"),
        (["swan.exe", "generate"], {}, "1000"),
        (["swan", "bench", "decode"], {}, "None"),
        (["python"], {}, "None"),
        (["swan", "demo"], {"GOMP_SPINCOUNT": "7"}, "7"),
        (["swan", "demo"], {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_commands_spin_for_a_moment_only(arguments, environment, expected):
    file = Path(swan.__file__).with_name("waiting.py")
    code = f"""
import os, sys
sys.argv = {arguments!r}
exec(open({str(file)!r}).read())
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    assert run(code, **environment) == expected


def test_torch_is_not_loaded_before():
    """OpenMP reads its settings as it loads."""
    lines = Path(swan.__file__).read_text().splitlines()
    ours = [line for line in lines if line.startswith(("import ", "from "))]
    assert ours.index(next(line for line in ours if "swan.waiting" in line)) < ours.index(
        next(line for line in ours if line.startswith("from swan"))
    )
