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
from swan.storage import LayerPlan

__all__ = ["compile_ahead"]


def compile_ahead(layers: Iterable[tuple[LayerPlan, torch.device]], dtype: torch.dtype) -> None:
    """Compile what caches of a dtype with such layers on such GPUs need, as far as it was not compiled before.

    Layers must be ones to which the kernels attend. Says on stderr that it compiles, and how long that took.

    Raises:
        RuntimeError: something cannot be compiled.
    """
    jobs: dict[str, tuple[Kernel, str]] = {}  # by file
    for layer, device in layers:
        keys, values = (groups_of(numbers_of(layout) or []) for layout in (layer.keys, layer.values))
        index = torch.cuda.current_device() if device.index is None else device.index
        arch = arch_of(index)
        for kernel in (pair_of(keys, values, dtype, index).attend, kernels_of(keys, values, dtype).take_in):
            file = file_of(kernel.source, dict(kernel.defines), arch)
            if not file.exists():
                jobs[str(file)] = kernel, arch
    if len(jobs) < 2:  # launching compiles one as fast
        return
    start = time.perf_counter()
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: compiled(job[0].source, dict(job[0].defines), job[1]), jobs.values()))
    print(f"swan: compiled {len(jobs)} files in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
