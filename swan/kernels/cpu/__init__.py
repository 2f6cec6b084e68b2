"""The kernels for CPUs: C++ sources, compiled on the machine that uses them, for its widest instruction set."""

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from swan.compiling import constant_result
from swan.kernels import dim_of, first_error, numbers_of
from swan.storage import ByHead, Graded, Layout
from swan.storage.codes import row_bytes

__all__ = [
    "ATTENDS", "ATTENDS_TO_RUNS", "IMPL", "MOST_ROWS", "PACKS", "attends", "attends_dense", "attends_pages", "build",
    "built", "instruction_sets", "library", "missing", "operator", "packs", "packs_pages", "require", "restores",
    "variant", "variants",
]  # fmt: skip

IMPL = "cpp"
ATTENDS_TO_RUNS = True  # of KV heads in other layouts, in one call
MOST_ROWS = 16  # query rows of a KV head up to which the kernel is faster than tiles of tensor code
ATTENDS = "Graded, also by head, and TopK with a bitmap, with queries of float32, bfloat16 or float16 on a CPU"
PACKS = "Graded layouts, also by head, vectors of float32, bfloat16 or float16 on a CPU, without gradients"
FOLDER = Path(__file__).parent
SOURCES, HEADERS = (sorted(FOLDER.glob(pattern)) for pattern in ("*.cpp", "*.h"))
BUILD, FORGOTTEN = "swan-build-", 3600  # name of a folder to build in; seconds after which its build was surely killed
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]

# Held while the kernels are built or loaded: several threads may need them for the first time at once.
_building = threading.RLock()

# Variants of the kernels, the fastest first: capabilities that the CPU must have (names of
# `torch.cpu.get_capabilities`), and flags for the compiler.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512": (
        ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vbmi", "avx512_vnni"),
        ("-march=x86-64-v4", "-mavx512vbmi", "-mavx512vnni", "-mtune=native"),
    ),
    "avx2": (("avx2", "fma3", "f16c", "bmi2"), ("-march=x86-64-v3", "-mtune=native")),
    "generic": ((), ()),
}


def instruction_sets() -> tuple[str, ...]:
    """Name the instruction sets that some variant needs and this CPU has."""
    capabilities = torch.cpu.get_capabilities()
    needed = dict.fromkeys(name for needs, _ in VARIANTS.values() for name in needs)
    return tuple(name for name in needed if capabilities.get(name))


@functools.cache
def variants() -> tuple[str, ...]:
    """Name the variants that this CPU can run, the fastest first."""
    present = instruction_sets()
    return tuple(name for name, (needs, _) in VARIANTS.items() if all(each in present for each in needs))


@constant_result
def variant() -> str:
    """Name the variant in use: the fastest, or the one that the environment variable SWAN_CPU names.

    Raises:
        ValueError: SWAN_CPU names no variant that this CPU can run.
    """
    name = os.environ.get("SWAN_CPU") or variants()[0]
    if name not in variants():
        raise ValueError(f"SWAN_CPU must be one of {', '.join(variants())} on this CPU, got {name!r}")
    return name


def attends(dtype: torch.dtype, *layouts: Layout) -> bool:
    """Tell if the kernel attends to layouts of keys and values, with queries of a dtype: to `ATTENDS`."""
    for layout in layouts:
        if numbers_of(layout) is None:
            return False
    return dtype != torch.float64


def attends_dense(_dtype: torch.dtype) -> bool:
    """Tell if the kernel attends to dense tokens beside a history too, of a dtype to which it attends."""
    return True


def attends_pages(tokens: int) -> bool:
    """Tell if the kernel attends to pages of so many tokens: 64, 128, 256, ..."""
    return tokens % 64 == 0 and tokens & (tokens - 1) == 0


def packs(dtype: torch.dtype, layout: Layout) -> bool:
    """Tell if the kernel packs vectors of a dtype in a layout: in `PACKS`."""
    return dtype != torch.float64 and isinstance(layout, Graded | ByHead)


def packs_pages(_dtype: torch.dtype, *_layouts: Layout) -> bool:
    """Tell if the kernel packs vectors of a dtype into pages: no, tensor code copies what it packed."""
    return False


def restores(dtype: torch.dtype, layout: Layout) -> bool:
    """Tell if the kernel unpacks vectors of a dtype from a layout."""
    return attends(dtype, layout)


def operator(name: str) -> Any:
    """Return the operator of a kernel (such as ``"attend"``) in the variant in use, once it is built."""
    return getattr(torch.ops.swan, f"{name}_cpu_{variant()}")


@constant_result
def built(_device: torch.device | None = None) -> bool:
    """Build the kernels at the first call, also while torch.compile traces; return whether they are there."""
    with _building:
        return _built_once(variant())


def require(device: torch.device) -> None:
    """Have the kernels built.

    Raises:
        RuntimeError: they cannot be built; the message says why.
    """
    if not built(device):  # compiled code reads this once
        build()


@functools.cache
def _built_once(name: str) -> bool:
    try:
        build(name)
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"{error}. Until then swan packs and attends with tensor code, which decodes several times more slowly "
            "over long contexts",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def library(name: str | None = None) -> Path:
    """Return the file of a compiled variant (by default that in use), in TORCH_EXTENSIONS_DIR or torch's own folder.

    Its name changes with the sources, the flags, the CPU and the versions of torch and Python.

    Raises:
        RuntimeError: setuptools, which torch needs for that, does not load, or there is no home folder.
    """
    name = name or variant()
    text = [path.read_text() for path in (*SOURCES, *HEADERS)]
    identity = [*text, *FLAGS, name, *VARIANTS[name][1], torch.__version__, sys.version, platform.machine(), _cpu()]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or _cpp_extension().get_default_build_root()
    if "~" in Path(root).parts:  # torch would make a folder of that name
        raise RuntimeError(_not_kept("this user has no home folder"))
    return Path(root) / f"swan_cpu_{name}-{digest}.so"


def missing() -> str | None:
    """Say what is missing to compile the kernels, or None."""
    compiler = os.environ.get("CXX", "c++")  # the compiler that torch uses
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}"
    return None if _cpp_extension().is_ninja_available() else "there is no ninja"


def _cpp_extension() -> Any:
    try:
        from torch.utils import cpp_extension
    except (ImportError, AssertionError) as error:  # setuptools asserts that pip was not imported before it
        raise RuntimeError(not_built(f"setuptools does not load ({error!r})")) from error
    return cpp_extension


def build(name: str | None = None) -> None:
    """Compile a variant of the kernels, by default that in use, or load it if it was compiled before.

    Compiling says on stderr that it begins, and how long it took.

    Raises:
        RuntimeError: there is no compiler, it fails, or there is no folder to keep them in.
    """
    name = name or variant()
    with _building:
        if not hasattr(torch.ops.swan, f"attend_cpu_{name}"):
            _load(name, library(name))
            _register_fakes(name)


def _load(name: str, file: Path) -> None:
    """Load a variant from its file; compile it where there is none, or one that does not load."""
    if file.exists():
        with contextlib.suppress(OSError):
            return torch.ops.load_library(str(file))
    _compile(name, file)


def _register_fakes(name: str) -> None:
    """Tell torch.compile what the operators of a variant return."""

    @torch.library.register_fake(f"swan::attend_cpu_{name}")
    def _(q, k, k_layout, v, v_layout, *_):  # pyright: ignore
        dv = dim_of(v_layout)
        return q.new_empty(*q.shape[:3], dv, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)

    @torch.library.register_fake(f"swan::attend_pages_cpu_{name}")
    def _(q, k, k_layout, v, v_layout, *_):  # pyright: ignore
        dv = dim_of(v_layout)
        return q.new_empty(*q.shape[:3], dv, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)

    @torch.library.register_fake(f"swan::pack_cpu_{name}")
    def _(x, layout, matrix):  # pyright: ignore
        groups = list(zip(layout[1::2], layout[2::2], strict=True))
        coded = [(size, bits) for size, bits in groups if 1 <= bits <= 8]
        whole = sum(size for size, bits in groups if bits == 16)
        widths = [(row_bytes(coded), torch.uint8), (whole, x.dtype), (len(coded), torch.uint8)]
        return [x.new_empty(*x.shape[:3], width, dtype=dtype) for width, dtype in widths if width]

    @torch.library.register_fake(f"swan::take_in_cpu_{name}")
    def _(*arguments):  # pyright: ignore
        return None

    @torch.library.register_fake(f"swan::unpack_cpu_{name}")
    def _(planes, layout, tokens, like):  # pyright: ignore
        stored = next(plane for plane in planes if plane.ndim == 4)
        return like.new_empty(*stored.shape[:2], tokens, dim_of(layout))


def _compile(name: str, file: Path) -> None:
    """Compile and load a variant, and leave it in a file."""
    if reason := missing():
        raise RuntimeError(not_built(reason))
    try:
        scratch = _folder_to_build_in(file.parent)
    except OSError as error:
        raise RuntimeError(_not_kept(f"{file.parent} cannot be written to ({error.strerror})")) from error
    print(f"swan: compiling its CPU kernels ({name}), once on this machine ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    flags = [*FLAGS, *VARIANTS[name][1], f"-DSWAN_VARIANT={name}"]
    settings = {"extra_cflags": flags, "extra_ldflags": ["-fopenmp"], "is_python_module": False}
    module = f"swan_cpu_{name}"
    with scratch as folder:
        try:
            _cpp_extension().load(module, [str(path) for path in SOURCES], build_directory=folder, **settings)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise RuntimeError(not_built(first_error(error))) from error
        shutil.copy(Path(folder) / f"{module}.so", f"{folder}/copy")
        os.replace(f"{folder}/copy", file)
    print(f"swan: compiled in {time.perf_counter() - start:.0f} s: {file}", file=sys.stderr, flush=True)


def _folder_to_build_in(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a new folder, because killed builds leave locks; remove those that were left long ago."""
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(f"{BUILD}*"):
        with contextlib.suppress(FileNotFoundError):  # another process may be faster
            if time.time() - old.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(old, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=BUILD, dir=parent)


def _not_kept(reason: str) -> str:
    """Say that the kernels were not built because there is no folder to keep them in."""
    return f"swan's CPU kernels were not built: {reason}; set TORCH_EXTENSIONS_DIR to a folder that can be written to"


def not_built(reason: str) -> str:
    """Say that the kernels were not built, why, and what they need."""
    return (
        f"swan's CPU kernels were not built: {reason}; they need a C++ compiler (such as g++) and ninja "
        "(pip install 'swan-attention[cpp]')"
    )


def _cpu() -> str:
    """Describe this CPU: code is tuned for one, and several machines may share a folder."""
    capabilities = torch.cpu.get_capabilities()
    return " ".join(sorted(str(name) for name, value in capabilities.items() if value))
