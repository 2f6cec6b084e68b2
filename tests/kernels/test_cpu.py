"""The choice and the build of the kernels for CPUs, and work without them; nothing here compiles them for long."""

import os
import stat
import subprocess
import sys

import pytest

from swan.kernels import cpu
from tests.compilers import needs_cxx

DECODE = """
import warnings
import torch
from swan import Graded, pack, packed_attention
layout = Graded(((32, 4),))
q = torch.randn(1, 4, 1, 32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        k = pack(torch.randn(1, 2, 9, 32), layout)
        assert packed_attention(q, k, k).shape == q.shape
print(*[warning.message for warning in caught if "swan" in str(warning.message)], sep="\\n")
"""

FAILS = """#!/bin/sh
case "$*" in
*.cpp*) echo 'kernel.cpp:7:1: error: no semicolon' >&2; echo 'kernel.cpp:9:1: error: more' >&2; exit 1 ;;
*) exec c++ "$@" ;;
esac
"""


def decode(tmp_path, **environment):
    """A process that decodes on packed tokens where nothing is built yet."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "built")} | environment
    return subprocess.run([sys.executable, "-c", DECODE], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses_a_variant(monkeypatch):
    monkeypatch.delenv("SWAN_CPU", raising=False)
    assert cpu.variant() == cpu.variants()[0]
    assert cpu.variants()[-1] == "generic"
    monkeypatch.setenv("SWAN_CPU", "generic")
    assert cpu.variant() == "generic"
    monkeypatch.setenv("SWAN_CPU", "abacus")
    with pytest.raises(ValueError, match=r"SWAN_CPU must be one of .*generic on this CPU, got 'abacus'"):
        cpu.variant()


def test_a_variant_that_the_cpu_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(cpu.torch.cpu, "get_capabilities", lambda: {"avx2": True, "architecture": "x86_64"})
    cpu.variants.cache_clear()
    try:
        assert cpu.variants() == ("generic",)  # without fma3
        monkeypatch.setenv("SWAN_CPU", "avx2")
        with pytest.raises(ValueError, match="one of generic on this CPU, got 'avx2'"):
            cpu.variant()
    finally:
        cpu.variants.cache_clear()


def test_files_of_variants_are_where_torch_keeps_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    files = {cpu.library(name) for name in cpu.VARIANTS}
    assert len(files) == len(cpu.VARIANTS)
    assert {file.parent for file in files} == {tmp_path}
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert "torch_extensions" in str(cpu.library())


def test_without_a_compiler_tensor_code_decodes_and_says_so_once(tmp_path):
    found = decode(tmp_path, CXX="no-such-compiler")
    assert found.returncode == 0, found.stderr
    (warning,) = found.stdout.splitlines()
    assert "there is no C++ compiler 'no-such-compiler'" in warning
    assert "pip install 'swan-attention[cpp]'" in warning
    assert "tensor code, which decodes several times more slowly" in warning
    assert not list(tmp_path.iterdir())


@needs_cxx
def test_a_compiler_that_fails_is_quoted(tmp_path):
    """Its first error, and nothing of the failed build stays."""
    compiler = tmp_path / "c++"
    compiler.write_text(FAILS)
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    found = decode(tmp_path, CXX=str(compiler), SWAN_CPU="generic")
    assert found.returncode == 0, found.stderr
    (warning,) = found.stdout.splitlines()
    assert "were not built: kernel.cpp:7:1: error: no semicolon; they need" in warning
    assert "swan: compiling its CPU kernels (generic), once on this machine ..." in found.stderr
    assert not list((tmp_path / "built").iterdir())


@needs_cxx
@pytest.mark.slow
def test_building_says_how_long_it_took(tmp_path):
    found = decode(tmp_path, SWAN_CPU="generic")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == ""
    said = [line for line in found.stderr.splitlines() if line.startswith("swan:")]
    assert len(said) == 2
    (file,) = (tmp_path / "built").iterdir()
    assert said[1].startswith("swan: compiled in ") and said[1].endswith(str(file))
