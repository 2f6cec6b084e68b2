"""Compiling CUDA sources at run time, by NVRTC through the package cuda-core; cubins are kept in a folder."""

import contextlib
import functools
import hashlib
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._appdirs

from swan.kernels import first_error

__all__ = ["Fresh", "arch_of", "compile_now", "compiled", "file_of", "folder", "missing", "not_built", "nvrtc_version"]

# Sources include each other only, no header of CUDA: user's machines may not have those. Functions are for the GPU
# unless they say otherwise. ptxas is told to print registers and spills, which costs nothing.
OPTIONS = {"std": "c++17", "device_as_default_execution_space": True, "ptxas_options": ["-v"]}
LEAST = (8, 0)  # compute capability: cp.async, and mma.sync with bfloat16


def missing(device: torch.device | int | str | None = None) -> str | None:
    """Say what is missing to compile the kernels, and to run them on a device if one is given, or None."""
    if reason := _no_nvrtc() or (None if device is None else _unfit(device)):
        return reason
    try:
        return None if hasattr(importlib.import_module("cuda.core"), "Program") else "cuda-core is older than 1.0"
    except ImportError as error:
        return f"cuda-core does not load ({error})"


def arch_of(device: torch.device | int) -> str:
    """Name the newest architecture (such as ``"sm_90"``) that a GPU runs and that NVRTC knows.

    Raises:
        RuntimeError: there is none.
    """
    if reason := _no_nvrtc() or _unfit(device):
        raise RuntimeError(not_built(reason))
    return f"sm_{max(_fitting(torch.cuda.get_device_capability(device)))}"


def _no_nvrtc() -> str | None:
    """Say why NVRTC cannot be used, or None."""
    try:
        nvrtc_version()
    except ImportError as error:
        return f"cuda-bindings does not load ({error})"
    except RuntimeError:  # the library is not found
        return "there is no NVRTC, which CUDA builds of torch bring along (else: pip install nvidia-cuda-nvrtc)"


def _unfit(device: torch.device | int | str) -> str | None:
    """Say why nothing can be compiled for a GPU, or None."""
    if torch.version.hip:
        return "this torch is built for ROCm, and the kernels for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    shown = f"the GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST:
        return f"{shown}, the kernels need {LEAST[0]}.{LEAST[1]}"
    return None if _fitting(capability) else f"{shown}, which NVRTC {nvrtc_version()} does not know"


def _fitting(capability: tuple[int, int]) -> list[int]:
    """List the architectures that NVRTC knows and a GPU runs: those of its major version up to its minor version."""
    _, known = importlib.import_module("cuda.bindings.nvrtc").nvrtcGetSupportedArchs()
    return [arch for arch in known if arch // 10 == capability[0] and arch % 10 <= capability[1]]


@functools.cache
def nvrtc_version() -> str:
    """Return the version of NVRTC, such as ``"13.0"``."""
    _, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    return f"{major}.{minor}"


def compiled(source: Path, defines: Mapping[str, object], arch: str) -> bytes:
    """Return the cubin of a source: from the folder of cubins, or compiled and kept there.

    Args:
        source: a file; it may include others of its folder (``.cuh``). Kernels in it are ``extern "C"``.
        defines: macros and their values, such as ``{"D": 128}``.
        arch: such as ``"sm_90"``; no GPU has to be there.

    Raises:
        RuntimeError: something is missing, or the source has an error.
    """
    try:
        file = file_of(source, defines, arch)
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(not_built(missing() or repr(error))) from error
    if (cubin := _read(file)) is None:
        _announce()
        cubin = compile_now(source, defines, arch).cubin
        _write(file, cubin)
    return cubin


class Fresh(NamedTuple):
    """What the compiler returns: the code, and what it printed."""

    cubin: bytes
    log: str


def compile_now(source: Path, defines: Mapping[str, object], arch: str) -> Fresh:
    """Compile a source as `compiled` does, whatever is in the folder of cubins.

    Raises:
        RuntimeError: something is missing, or the source has an error.
    """
    if reason := missing():
        raise RuntimeError(not_built(reason))
    core, log = importlib.import_module("cuda.core"), io.StringIO()
    macros = [(name, str(value)) for name, value in defines.items()] or None  # cuda-core takes no empty list
    options: dict[str, Any] = {**OPTIONS, "name": source.name, "arch": arch, "include_path": [str(source.parent)]}
    try:
        program = core.Program(source.read_text(), "c++", core.ProgramOptions(**options, define_macro=macros))
        return Fresh(bytes(program.compile("cubin", logs=log).code), log.getvalue())
    except Exception as error:  # cuda-core derives its errors from no narrower class
        raise RuntimeError(not_built(first_error(error, r"\berror\b.*:"))) from error


def not_built(reason: str) -> str:
    """Say that the kernels were not built, why, and what they need."""
    return (
        f"swan's CUDA kernels were not built: {reason}; they need a CUDA build of torch and the package cuda-core "
        "(pip install 'swan-attention[cuda]')"
    )


# Cubins that are kept -----------------------------------------------------------------------------


def folder() -> Path:
    """Return the folder of cubins: TORCH_EXTENSIONS_DIR or torch's own, as for the kernels for CPUs."""
    own = torch._appdirs.user_cache_dir(appname="torch_extensions")  # torch.utils.cpp_extension loads setuptools
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.realpath(own))


def file_of(source: Path, defines: Mapping[str, object], arch: str) -> Path:
    """Return the file for a cubin: its name changes with the sources, macros, options, architecture and NVRTC."""
    sources = sorted(path for path in source.parent.iterdir() if path.suffix in (".cu", ".cuh"))
    texts = [(path.name, path.read_text()) for path in sources]
    macros = [(name, str(value)) for name, value in defines.items()]
    identity = repr((source.name, texts, macros, sorted(OPTIONS.items()), arch, nvrtc_version()))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return folder() / f"swan_cuda_{source.stem}_{arch}-{digest}.cubin"


def _sealed(file: Path, cubin: bytes) -> bytes:
    """Return the digest that a file begins with: of its own name too, so that no other file passes for it."""
    return hashlib.sha256(file.name.encode() + cubin).digest()


def _read(file: Path) -> bytes | None:
    """Return the cubin in a file, or None if it is not there or not whole."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    seal, cubin = content[:32], content[32:]
    return cubin if cubin and seal == _sealed(file, cubin) else None


def _write(file: Path, cubin: bytes) -> None:
    """Leave a cubin in a file, which appears at once and whole; where that is not allowed, do nothing."""
    if "~" in file.parts:  # of a user without a home: it would be a folder of that name
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            part = Path(scratch) / file.name
            part.write_bytes(_sealed(file, cubin) + cubin)
            os.replace(part, file)


@functools.cache
def _announce() -> None:
    """Say once in a process that it compiles."""
    print(f"swan: compiling CUDA kernels, kept in {folder()} ...", file=sys.stderr, flush=True)
