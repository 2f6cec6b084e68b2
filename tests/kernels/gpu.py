"""The device that Triton kernels run on, and compilation of kernels on machines that cannot run them."""

import os
from typing import Any

import pytest

INTERPRET = "TRITON_INTERPRET"
DEVICE = "cpu" if os.environ.get(INTERPRET) == "1" else "cuda"


def slow(*values: Any) -> Any:
    """A parameter of tests that `make test-all` alone runs: the interpreter takes a while for each."""
    return pytest.param(*values, marks=pytest.mark.slow)


def compile_for_gpu(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, folder, monkeypatch):
    """Compiled, not run: registers that do not fit in the file, or shared memory, would show here.

    Args:
        kernel: a function under `triton.jit`.
        types: dtypes of what its pointers point to; other arguments are 32-bit integers, and `scale` and `most` floats.
        constants: what is compiled in.
        warps: of a program.
        folder: where to keep what is compiled.
        monkeypatch: the fixture.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    kinds = {name: f"*{kind}" for name, kind in types.items()} | {"scale": "fp32", "most": "fp32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): x for name, x in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.metadata.shared < 100 * 1024  # more than one program for each processor
    assert "cubin" in compiled.asm
