"""The kernels for NVIDIA GPUs: CUDA sources, compiled at run time by NVRTC for the GPU at hand, without nvcc."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from swan.compiling import constant_result
from swan.kernels.cuda.build import folder, missing, not_built
from swan.storage import ByHead, Graded, LayerPlan, Layout

__all__ = [
    "ATTENDS", "ATTENDS_TO_RUNS", "IMPL", "MOST_ROWS", "PACKS", "attends", "attends_dense", "attends_pages", "built",
    "compile_ahead", "folder", "missing", "operator", "packs", "packs_pages", "require", "restores", "say_slow",
]  # fmt: skip

IMPL = "cuda"
ATTENDS_TO_RUNS = False  # of KV heads in other layouts, in one call: each is a launch
MOST_ROWS = 256  # query rows of a KV head up to which `auto` takes the kernel, which reads tokens anew for each 8
ATTENDS = (
    "Graded layouts of groups of 16, 32, ... coordinates, with queries of bfloat16, float16 or, if no group has 16 "
    "bits, float32 on an NVIDIA GPU"
)
PAGES = "Graded layouts of groups of 16, 32, ... coordinates, with queries of bfloat16 or float16"
PACKS = "Graded layouts, vectors of float32, bfloat16 or float16 on an NVIDIA GPU, without gradients"
FUNCTIONS: dict[str, Callable[..., Any]] = {}  # of operators, once they are `built`
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def attends(dtype: torch.dtype, *layouts: Layout) -> bool:
    """Tell if the kernel attends to layouts of keys and values, with queries of a dtype: to `ATTENDS`."""
    return dtype in DTYPES and all([_reads(dtype, layout) for layout in layouts])


def _reads(dtype: torch.dtype, layout: Layout) -> bool:
    if isinstance(layout, ByHead):
        return all([_reads(dtype, each) for each in layout.layouts])
    if not isinstance(layout, Graded):
        return False
    return all([size % 16 == 0 and (bits < 16 or dtype != torch.float32) for size, bits in layout.groups])


def attends_dense(dtype: torch.dtype) -> bool:
    """Tell if the kernel attends to dense tokens beside a history too, of a dtype to which it attends."""
    return dtype != torch.float32


def attends_pages(tokens: int) -> bool:
    """Tell if the kernel attends to pages of so many tokens: 64, 128, 192, ..."""
    return tokens % 64 == 0


def packs(dtype: torch.dtype, layout: Layout) -> bool:
    """Tell if the kernel packs vectors of a dtype in a layout: in `PACKS`."""
    return dtype in DTYPES and isinstance(layout, Graded | ByHead)


def packs_pages(dtype: torch.dtype, *layouts: Layout) -> bool:
    """Tell if the kernel packs vectors of a dtype into pages, keys and values at once."""
    return all([packs(dtype, layout) for layout in layouts])


def restores(dtype: torch.dtype, layout: Layout) -> bool:
    """Tell if the kernel unpacks vectors of a dtype from a layout."""
    return packs(dtype, layout)


def operator(name: str) -> Any:
    """Return the operator of a kernel (such as ``"attend"``), once they are `built`; for eager code what it calls."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.swan, f"{name}_cuda")
    return FUNCTIONS[name]  # torch takes 20 us to call a function of Python as an operator


def require(device: torch.device) -> None:
    """Have the operators; their kernels are compiled when they are launched.

    Raises:
        RuntimeError: they cannot be compiled here, or not for the GPU.
    """
    if reason := missing(device):
        raise RuntimeError(not_built(reason))
    from swan.kernels.cuda import operators

    FUNCTIONS.update(operators.FUNCTIONS)


@constant_result
def built(device: torch.device) -> bool:
    """Do as `require`, also while torch.compile traces; return whether the operators are there, and warn if not."""
    return _built_once(device)


@functools.cache
def _built_once(device: torch.device) -> bool:
    try:
        require(device)
    except RuntimeError as error:
        _say_slow_once(str(error))
        return False
    return True


def compile_ahead(layers: Iterable[LayerPlan], dtype: torch.dtype, device: torch.device, page: int = 0) -> None:
    """Compile the kernels of many layers at once, where each would be compiled when it is first launched.

    Args:
        layers: layouts of each; those to which the kernels do not attend are left out.
        dtype: of the caches.
        device: the GPU.
        page: tokens of a page of a server; 0: of caches that have none.
    """
    attended = [layer for layer in layers if attends(dtype, layer.keys, layer.values)]
    if attended and built(device):
        from swan.kernels.cuda.ahead import compile_all

        compile_all(attended, dtype, torch.cuda.current_device() if device.index is None else device.index, page)


@constant_result
def say_slow(reason: str) -> None:
    """Warn, once for each reason, that tensor code serves on a GPU; also while torch.compile traces."""
    _say_slow_once(reason)


@functools.cache
def _say_slow_once(reason: str) -> None:
    warnings.warn(
        f"{reason}; so swan uses tensor code on this GPU, which over long contexts takes hundreds of times as "
        "long as dense attention",
        RuntimeWarning,
        stacklevel=2,
    )
