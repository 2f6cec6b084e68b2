"""The choice and the build of the kernels for CPUs, and work without them; nothing here compiles them for long."""

import os
import shutil
import stat
import subprocess
import sys
import threading
import time

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

# A compiler that takes the kernels of this process for what it would have made.
COPIES = """#!/bin/sh
case "$*" in
*-shared*) while [ "$1" != -o ]; do shift; done; sleep 1; cp "$REAL" "$2" ;;
*.cpp*) ;;
*) exec c++ "$@" ;;
esac
"""


# A compiler in whose midst the process that builds is killed, with no moment to tidy up.
KILLS = """#!/bin/sh
case "$*" in
*.cpp*) kill -9 "$(cat "$BUILDER")"; sleep 2 ;;
*) exec c++ "$@" ;;
esac
"""


def script(file, text):
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IEXEC)
    return str(file)


def environment_of(tmp_path, **environment):
    return os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "built")} | environment


def decode(tmp_path, **environment):
    """A process that decodes on packed tokens where nothing is built yet."""
    environment = environment_of(tmp_path, **environment)
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
    found = decode(tmp_path, CXX=script(tmp_path / "c++", FAILS), SWAN_CPU="generic")
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


# Several that build, and folders in which nothing can be built ------------------------------------


@needs_cxx
def test_two_processes_build_at_once(tmp_path):
    """Beside what is left of a build that was killed."""
    cpu.build()
    environment = environment_of(tmp_path, CXX=script(tmp_path / "c++", COPIES), REAL=str(cpu.library()))
    left = tmp_path / "built" / f"{cpu.BUILD}killed"
    left.mkdir(parents=True)
    (left / "lock").write_text("")
    command = [sys.executable, "-c", DECODE]
    both = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [out.strip() for out, _ in said] == ["", ""]
    assert any("swan: compiled in" in err for _, err in said)
    assert sorted(file.name for file in (tmp_path / "built").iterdir()) == [left.name, cpu.library().name]


@needs_cxx
def test_a_build_that_is_killed_does_not_hinder_the_next(tmp_path):
    cpu.build()
    pid = tmp_path / "pid"
    killed = environment_of(tmp_path, CXX=script(tmp_path / "c++", KILLS), BUILDER=str(pid))
    program = f"import os, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n" + DECODE
    assert (
        subprocess.run([sys.executable, "-c", program], env=killed, capture_output=True, check=False).returncode == -9
    )
    (left,) = (tmp_path / "built").iterdir()
    assert left.name.startswith(cpu.BUILD) and (left / "lock").exists()
    found = decode(tmp_path, CXX=script(tmp_path / "c++", COPIES), REAL=str(cpu.library()))
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr
    assert sorted(file.name for file in (tmp_path / "built").iterdir()) == [left.name, cpu.library().name]


def test_what_killed_builds_left_is_removed_in_time(tmp_path):
    old, new, other = (tmp_path / name for name in (f"{cpu.BUILD}old", f"{cpu.BUILD}new", "torch"))
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "lock").write_text("")
    for folder in (old, other):
        os.utime(folder, (0, time.time() - cpu.FORGOTTEN - 60))
    with cpu._folder_to_build_in(tmp_path) as folder:
        assert os.path.basename(folder).startswith(cpu.BUILD)
        assert not old.exists() and new.exists() and other.exists()
    assert sorted(tmp_path.iterdir()) == sorted([new, other])


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(60)], ids=["empty", "cut"])
def test_a_file_that_does_not_load_is_compiled_anew(content, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(cpu, "_compile", lambda *given: compiled.append(given))
    file = tmp_path / "damaged.so"
    file.write_bytes(content)
    cpu._load("generic", file)
    assert compiled == [("generic", file)]


def unwritable(*_, **__):
    raise PermissionError(30, "Read-only file system")  # as root is told of one


@needs_cxx
@pytest.mark.parametrize("where", ["below a file", "no such home", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_named(where, tmp_path, monkeypatch):
    """`_built_once` makes one warning of it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(
        "TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "built" if where == "below a file" else tmp_path)
    )
    if where == "no such home":
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "file" / "nobody"))
    if where == "read-only":
        monkeypatch.setattr(cpu.tempfile, "TemporaryDirectory", unwritable)
    file = cpu.library()
    with pytest.raises(
        RuntimeError, match=r"not built: .* cannot be written to \((Not a dir|Read-only).*\); set TORCH_EXT"
    ) as caught:
        cpu._compile("generic", file)
    assert str(file.parent) in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_home_nothing_is_made_here(monkeypatch):
    """Python leaves the ~ of a user without a home as it is, and torch would make a folder of that name."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(RuntimeError, match="not built: this user has no home folder; set TORCH_EXTENSIONS_DIR"):
        cpu.library()


def test_threads_build_once(monkeypatch):
    """Each waits for the first, and all learn that the kernels are there."""
    loaded, start = [], threading.Barrier(4)

    def load(name, _):
        time.sleep(0.05)
        loaded.append(name)

    def work():
        start.wait()
        found.append(cpu.built())

    found = []
    monkeypatch.setattr(cpu, "variant", lambda: "of_this_test")
    monkeypatch.setattr(cpu, "library", lambda name: name)
    monkeypatch.setattr(cpu, "_load", load)
    monkeypatch.setattr(cpu, "_register_fakes", lambda name: None)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (loaded, found) == (["of_this_test"], [True] * 4)


FIRST_USE = """
import sys, threading, warnings
import torch
from swan import Graded, pack, packed_attention
layout, start, errors = Graded(((32, 4),)), threading.Barrier(8), []
sys.setswitchinterval(1e-6)
warnings.simplefilter("error")

def work():
    start.wait()
    try:
        k = pack(torch.randn(1, 2, 9, 32), layout)
        packed_attention(torch.randn(1, 4, 1, 32), k, k)
    except Exception as error:
        errors.append(error)

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*errors)
"""


@needs_cxx
@pytest.mark.slow
def test_threads_use_the_kernels_for_the_first_time_at_once(tmp_path):
    cpu.build()
    (tmp_path / "built").mkdir()
    shutil.copy(cpu.library(), tmp_path / "built")
    environment = environment_of(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", FIRST_USE], env=environment, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr
