"""Compiling the kernels of many layouts at once, before they are launched one after the other."""

import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from swan.kernels import numbers_of
from swan.kernels.cuda.attend import pair_of
from swan.kernels.cuda.build import arch_of, compiled, file_of
from swan.kernels.cuda.launch import Kernel
from swan.kernels.cuda.layouts import groups_of
from swan.kernels.cuda.pack import kernels_of
from swan.kernels.cuda.runs import pairs_of
from swan.storage import LayerPlan

__all__ = ["compile_all"]


def compile_all(layers: Iterable[LayerPlan], dtype: torch.dtype, index: int, page: int = 0) -> None:
    """Compile what caches of a dtype need on a GPU, as far as that was not done before, several files at a time.

    Says on stderr that it compiles, and how long it took.

    Args:
        layers: layouts to which the kernels attend.
        dtype: of the caches.
        index: of the GPU.
        page: tokens of a page, or 0.

    Raises:
        RuntimeError: something cannot be compiled.
    """
    arch, jobs = arch_of(index), dict[str, Kernel]()  # by file
    for layer in layers:
        for pair in pairs_of(*(numbers_of(layout) or [] for layout in (layer.keys, layer.values))):
            keys, values = map(groups_of, pair)
            for kernel in (pair_of(keys, values, dtype, index, page).attend, kernels_of(keys, values, dtype).take_in):
                file = file_of(kernel.source, dict(kernel.defines), arch)
                if not file.exists():
                    jobs[str(file)] = kernel
    if not jobs:
        return
    start = time.perf_counter()
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda kernel: compiled(kernel.source, dict(kernel.defines), arch), jobs.values()))
    print(f"swan: compiled {len(jobs)} files in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
