"""Processes for the tests of Triton kernels.

The interpreter is chosen when Triton is imported, so functions named `check_...` run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.gpu import INTERPRET

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "interpret",
    ["1", pytest.param("0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
    ids=["interpreter", "gpu"],
)
def test_checks(interpret, marker):
    options = ["-q", "--durations=5", "-m", marker, "-o", "python_functions=check_*"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, FOLDER.glob("test_*_triton.py"))],
        cwd=FOLDER.parents[1],
        env=os.environ | {INTERPRET: interpret},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_swan_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import swan; print('swan'); import swan.kernels.attend_triton"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.stdout == "swan\n"
    assert "ImportError: impl='triton' needs Triton: pip install triton" in done.stderr
