"""Compiling CUDA sources without a GPU, the folder of cubins, and launches on a driver that only prints."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from swan.kernels.cuda import build
from swan.kernels.cuda.build import compile_now, compiled, file_of, missing
from tests.kernels import cubin as cubins

pytest.importorskip("cuda.core")
needs_nvrtc = pytest.mark.skipif(missing() is not None, reason=f"{missing()}")
needs_nvdisasm = pytest.mark.skipif(cubins.disassembler() is None, reason="needs nvdisasm (in Triton's package)")

HEADER = "struct Arguments { float *x, *y; int n; float scale; };\n"
SOURCE = """
#include "arguments.cuh"
extern "C" __global__ void add(Arguments a) {
  __shared__ float rows[32];
  for (int i = threadIdx.x; i < a.n; i += THREADS) a.y[i] += a.scale * a.x[i];
  rows[threadIdx.x % 32] = a.y[0];
  __syncthreads();
  if (threadIdx.x == 0) a.x[0] = rows[31];
}
"""
DEFINES = {"THREADS": 64}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source and a header beside it; cubins are kept in a folder of the test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "arguments.cuh").write_text(HEADER)
    file = tmp_path / "sources" / "add.cu"
    file.write_text(SOURCE)
    build._announce.cache_clear()
    return file


@pytest.fixture
def compilations(monkeypatch):
    """The architectures that were compiled for: those that were read from the folder are not in it."""
    done = []

    def counted(source, defines, arch):
        done.append(arch)
        return compile_now(source, defines, arch)

    monkeypatch.setattr(build, "compile_now", counted)
    return done


@needs_nvrtc
def test_a_cubin_is_compiled_once_and_kept(source, compilations, capfd):
    first = compiled(source, DEFINES, "sm_90")
    assert first.startswith(b"\x7fELF") and b"add" in first
    assert compiled(source, DEFINES, "sm_90") == first
    assert compilations == ["sm_90"]
    kept = file_of(source, DEFINES, "sm_90")
    assert list(kept.parent.iterdir()) == [kept]
    compiled(source, DEFINES, "sm_80")
    printed = capfd.readouterr()
    assert printed.err.count("swan: compiling") == 1 and str(kept.parent) in printed.err and not printed.out


@needs_nvrtc
@pytest.mark.parametrize("change", ["header", "macro", "order of macros", "arch", "nvrtc"])
def test_the_file_changes_with_all_that_a_cubin_depends_on(source, change, monkeypatch):
    before = file_of(source, DEFINES | {"D": 128}, "sm_90")
    assert before == file_of(source, {"THREADS": "64", "D": 128}, "sm_90")
    defines, arch = DEFINES | {"D": 128}, "sm_90"
    match change:
        case "header":
            (source.parent / "arguments.cuh").write_text(HEADER + "// more\n")
        case "macro":
            defines["D"] = 64
        case "order of macros":  # one may be made of another
            defines = dict(reversed(defines.items()))
        case "arch":
            arch = "sm_80"
        case "nvrtc":
            monkeypatch.setattr(build, "nvrtc_version", lambda: "99.9")
    assert file_of(source, defines, arch) != before


@needs_nvrtc
@pytest.mark.parametrize("fault", ["cut", "one bit", "empty", "of another name", "a folder"])
def test_a_file_that_is_not_whole_is_not_trusted(source, compilations, fault):
    first = compiled(source, DEFINES, "sm_90")
    kept = file_of(source, DEFINES, "sm_90")
    content = kept.read_bytes()
    match fault:
        case "cut":
            kept.write_bytes(content[:-9])
        case "one bit":
            kept.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        case "empty":
            kept.write_bytes(b"")
        case "of another name":
            compiled(source, DEFINES, "sm_80")
            shutil.copy(file_of(source, DEFINES, "sm_80"), kept)
        case "a folder":
            kept.unlink()
            kept.mkdir()
    compilations.clear()
    assert compiled(source, DEFINES, "sm_90") == first
    assert compilations == ["sm_90"]
    assert fault == "a folder" or kept.read_bytes() == content


@needs_nvrtc
@pytest.mark.parametrize("where", ["a file", "no home", "read-only"])
def test_without_a_folder_cubins_are_compiled_each_time(source, compilations, where, monkeypatch, tmp_path):
    if where == "a file":
        build.folder().write_text("")
    elif where == "no home":  # Python leaves its ~ as it is
        monkeypatch.chdir(tmp_path)
        for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:  # what a file system says then: this process may be allowed everything

        def refuse(*_, **__):
            raise PermissionError(30, "Read-only file system")

        monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
    assert compiled(source, DEFINES, "sm_90") == compiled(source, DEFINES, "sm_90")
    assert compilations == ["sm_90", "sm_90"]
    assert not (tmp_path / "~").exists()


@needs_nvrtc
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("a.n;", "a.m;", r'not built: add\.cu\(5\): error: .*"m"'),
        ("arguments.cuh", "none.cuh", r'not built: add\.cu\(2\): .*error: .*"none\.cuh"'),
        ("#include", "#include <cuda_bf16.h>\n#include", r"not built: add\.cu\(2\): .*error: .*cuda_bf16"),
    ],
    ids=["a wrong name", "a missing header", "a header of CUDA"],
)
def test_errors_name_the_first_wrong_line(source, before, after, message):
    source.write_text(SOURCE.replace(before, after, 1))
    with pytest.raises(RuntimeError, match=message) as caught:
        compiled(source, DEFINES, "sm_90")
    assert "\n" not in str(caught.value)
    assert not build.folder().exists()


@needs_nvrtc
def test_an_unknown_architecture_is_an_error(source):
    with pytest.raises(RuntimeError, match="not built: nvrtc: error: invalid value for --gpu-architecture"):
        compiled(source, DEFINES, "sm_12")


@pytest.mark.parametrize("package", ["cuda.core", "cuda.bindings.nvrtc"])
def test_missing_packages_are_said_with_what_to_install(source, package, monkeypatch):
    build.nvrtc_version.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    try:
        with pytest.raises(
            RuntimeError, match=r"not built: cuda-\w+ does not load .*\(pip install 'swan-attention\[cuda\]'\)"
        ):
            compiled(source, DEFINES, "sm_90")
    finally:
        build.nvrtc_version.cache_clear()


def test_a_missing_nvrtc_is_said(source, monkeypatch):
    def fail():
        raise RuntimeError('Failure finding "libnvrtc.so"')

    monkeypatch.setattr(build, "nvrtc_version", fail)
    with pytest.raises(RuntimeError, match="not built: there is no NVRTC, which CUDA builds of torch bring along"):
        compiled(source, DEFINES, "sm_90")


@needs_nvrtc
def test_gpus_that_kernels_cannot_run_on_are_said(monkeypatch):
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert missing(0) == "the GPU has compute capability 7.5, the kernels need 8.0"
    capability = (99, 0)
    assert f"99.0, which NVRTC {build.nvrtc_version()} does not know" in (missing(0) or "")
    with pytest.raises(RuntimeError, match=r"99\.0, which NVRTC"):
        build.arch_of(0)
    capability = (8, 6)
    assert missing(0) is None and build.arch_of(0) == "sm_86"
    capability = (9, 9)
    assert build.arch_of(0) == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in (missing(0) or "")


def test_importing_swan_imports_nothing_of_cuda():
    """Torch itself imports cuda.bindings where that is installed."""
    code = """
import sys, torch
before = set(sys.modules)
import swan, swan.kernels.cuda
print(*[name for name in set(sys.modules) - before if name.split(".")[0] in ("cuda", "setuptools")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Costs --------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_costs_are_what_the_compiler_prints(source, arch):
    found, cubin = cubins.costs(source, DEFINES, arch)
    cost = found["add"]
    assert 8 <= cost.registers <= 40 and cost.shared >= 128
    assert cost.stack == cost.spill_stores == cost.spill_loads == 0
    assert cubin.startswith(b"\x7fELF")


SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float *x, const float *y, int n) {
  float sums[64];
  #pragma unroll
  for (int j = 0; j < 64; j++) sums[j] = y[j * 1024 + threadIdx.x];
  for (int i = 0; i < n; i++) {
    const float first = sums[0];
    #pragma unroll
    for (int j = 0; j < 63; j++) sums[j] = sums[j] * sums[j + 1] + y[i];
    sums[63] *= first;
  }
  #pragma unroll
  for (int j = 0; j < 64; j++) x[j * 1024 + threadIdx.x] = sums[j];
}
"""


@needs_nvrtc
@needs_nvdisasm
def test_spills_and_loops_are_seen(source):
    source.write_text(SPILLS)
    found, cubin = cubins.costs(source, {}, "sm_90")
    cost, code = found["spills"], cubins.codes(cubin)["spills"]
    assert cost.registers <= 32 and cost.stack > 0 and cost.spill_stores > 0 and cost.spill_loads > 0
    assert code.count("STL") * 4 >= cost.spill_stores and code.count("LDL") * 4 >= cost.spill_loads
    assert len(code.loops) == 1 and code.hot == code.loops[0]
    assert 64 <= code.loops[0].instructions <= len(code.instructions)
    assert not code.instructions[-1].startswith("NOP")


def test_the_hot_loop_is_the_shortest_with_all_products():
    text = """
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/              @!P0 STL [R1], R4 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   BRA.U UP0, `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   BRA `(.L_x_3);
        /*0070*/                   NOP;
"""
    code = cubins.code_of(text)
    assert code.loops == [(0, 5, 1), (1, 3, 1)]
    assert code.hot == (1, 3, 1)
    assert len(code.instructions) == 7 and code.count("STL", "LDL") == 1


# Launches -----------------------------------------------------------------------------------------

LAUNCHES = """
import ctypes, sys, threading
from pathlib import Path
import torch
from swan.kernels.cuda.launch import Kernel
device = 0
torch._C._cuda_getDevice = lambda: device
torch._C._cuda_getCurrentRawStream = lambda device: 0x5700 + device
torch.cuda.get_device_capability = lambda device: (9, 0)
source = Path(sys.argv[1])

def kernel(arguments="2Qif", name="add", shared=50000):
    return Kernel(source, name, {"THREADS": 64}, arguments, threads=64, shared=shared)

def attempt(task):
    try:
        task()
    except RuntimeError as error:
        print(error, flush=True)

add = kernel()
add.launch(0, (3, 2, 1), 2**40, 0, -7, 0.5)
add.launch(0, (1, 1, 1), 1, 2, 3, 4.0)
thread = threading.Thread(target=lambda: add.launch(0, (4, 1, 1), 5, 6, 7, 8.0))
thread.start(), thread.join()
attempt(lambda: add.launch(0, (1001, 1, 1), 1, 2, 3, 4.0))
attempt(lambda: kernel(arguments="2Qi").load(0))
attempt(lambda: kernel(name="subtract").load(0))
kernel(shared=1000).load(0)
"cuda.core" in sys.modules and print("cuda.core was loaded")
"""

EXPECTED = """
load ELF
attribute 8 50000
launch 3 2 1 threads 64 1 1 shared 50000 stream 0x5700: 1099511627776 0 -7 0.5
launch 1 1 1 threads 64 1 1 shared 50000 stream 0x5700: 1 2 3 4
launch 4 1 1 threads 64 1 1 shared 50000 stream 0x5700: 5 6 7 8
the kernel add was not launched: CUDA_ERROR_INVALID_VALUE
the kernel add takes 24 bytes, the struct has 20
the CUDA driver's cuLibraryGetKernel failed: CUDA_ERROR_NOT_FOUND
"""


@needs_nvrtc
@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler, on Linux")
def test_the_driver_is_told_what_to_launch(source, tmp_path):
    """Here a library that only prints stands for the driver, below the real cuda-bindings."""
    compiled(source, DEFINES, "sm_90")
    fake = Path(__file__).with_name("fake_libcuda.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", fake, "-ldl"], check=True)
    file = tmp_path / "launches.py"
    file.write_text(textwrap.dedent(LAUNCHES))
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, file, source]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == EXPECTED.strip()
