"""The kernels for CPUs: C++ sources, compiled on the machine that uses them."""

import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from swan.packed import code_bytes

__all__ = ["build", "built"]

SOURCES = [Path(__file__).with_name(name) for name in ("attend_cpu.cpp", "pack_cpu.cpp")]
HEADERS = [Path(__file__).with_name(name) for name in ("attend_cpu_avx512.h", "cpu_common.h")]
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
NAME = "swan_cpu"


@torch.compiler.assume_constant_result
def built() -> bool:
    """Whether the kernels are there; builds them at the first call, also while torch.compile traces."""
    return _built_once()


@functools.cache
def _built_once() -> bool:
    try:
        build()
    except (RuntimeError, OSError):
        return False
    return True


def build() -> None:
    """Compile the kernels with the C++ compiler of the machine, and keep them beside torch's other extensions.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    try:
        from torch.utils import cpp_extension
    except (ImportError, AssertionError) as error:  # setuptools asserts that pip was not imported before it
        raise RuntimeError(f"torch cannot build swan's CPU kernels: setuptools does not load ({error!r})") from error
    if hasattr(torch.ops.swan, "attend_cpu"):
        return
    text = [path.read_text() for path in (*SOURCES, *HEADERS)]
    about = [*text, *FLAGS, torch.__version__, sys.version, platform.machine(), _cpu()]
    digest = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    library = Path(cpp_extension.get_default_build_root()) / f"{NAME}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # of its own: no lock is left by a killed build
            settings = {"extra_cflags": FLAGS, "extra_ldflags": ["-fopenmp"], "is_python_module": False}
            try:
                cpp_extension.load(NAME, [str(path) for path in SOURCES], build_directory=folder, **settings)
            except (RuntimeError, OSError) as error:
                raise RuntimeError(
                    "swan's CPU kernels need a C++ compiler and ninja (pip install 'swan-attention[cpp]'), or use "
                    f"impl='compiled': {error}"
                ) from error
            shutil.copy(Path(folder) / f"{NAME}.so", f"{folder}/copy")
            os.replace(f"{folder}/copy", library)
    else:
        torch.ops.load_library(str(library))

    @torch.library.register_fake("swan::attend_cpu")
    def _(q, k, k_layout, v, v_layout, tokens, mask, scale, mixes, recent, recent_mask):  # pyright: ignore
        dv = v_layout[1] if v_layout[0] else sum(v_layout[1::2])
        return q.new_empty(*q.shape[:3], dv, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)

    @torch.library.register_fake("swan::pack_cpu")
    def _(x, groups):  # pyright: ignore
        coded = [(size, bits) for size, bits in zip(groups[::2], groups[1::2], strict=True) if 1 <= bits <= 8]
        width = sum(code_bytes(size, bits) for size, bits in coded)
        codes, scales = (x.new_empty(*x.shape[:3], n, dtype=torch.uint8) for n in (width, len(coded)))
        return codes, scales


def _cpu() -> str:
    """What the compiler sees of the CPU: a folder may be shared by several machines."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.machine()
    return next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
