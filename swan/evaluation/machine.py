"""The machine of a measurement: what it is, and its clocks for time and memory."""

import contextlib
import importlib.metadata
import itertools
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "TooLong", "at_most", "default_device", "last_level_cache", "machine", "memory_bandwidth", "package_version",
    "peak_bytes", "time_calls", "versions",
]  # fmt: skip

T = TypeVar("T")

SYSTEM_CPUS = Path("/sys/devices/system/cpu")
UNKNOWN_CACHE = 32 * 2**20  # bytes, where the system does not tell


def default_device() -> torch.device:
    """Return the device on which to run if nobody chooses one: CUDA where it is there, else the CPU.

    Example:
        >>> default_device().type in ("cuda", "cpu")
        True
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """Describe the machine that this process runs on.

    Returns:
        ``cpu`` (model), ``cores`` (that this process may use), ``memory`` (bytes or None),
        ``gpu`` (name or None), ``gpu_memory`` (bytes or None), ``os``.

    Example:
        >>> sorted(machine())
        ['cores', 'cpu', 'gpu', 'gpu_memory', 'memory', 'os']
    """
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory_bytes(),
        "gpu": None if gpu is None else gpu.name,
        "gpu_memory": None if gpu is None else gpu.total_memory,
        "os": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the versions of python, torch, swan, and of transformers, triton and CUDA where they are there.

    Example:
        >>> set(versions()) >= {"python", "torch", "swan"}
        True
    """
    from swan import __version__  # not at the top: no floor imports the package that shows it

    always = {"python": platform.python_version(), "torch": torch.__version__, "swan": __version__}
    optional = {name: package_version(name) for name in ("transformers", "triton")} | {"cuda": torch.version.cuda}
    return always | {name: version for name, version in optional.items() if version is not None}


def package_version(name: str) -> str | None:
    """Return the version of an installed package, None of one that is not installed.

    Example:
        >>> package_version("no-such-package")
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def last_level_cache(device: torch.device | str) -> int:
    """Return the bytes of the last-level cache: all of a CPU's together, or the L2 of a CUDA device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    caches: dict[tuple[str, str], int] = {}  # (level, cores that share it) -> bytes
    for index in SYSTEM_CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = ((index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            caches[level, shared] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in caches), default="")
    return sum(size for (level, _), size in caches.items() if level == last) or UNKNOWN_CACHE


def memory_bandwidth(device: torch.device | str) -> float:
    """Measure the bytes per second of memory in plain code: a sum (read) or a copy (read and write), the better."""
    device = torch.device(device)
    size = max(2**30 if device.type == "cuda" else 2**28, 4 * last_level_cache(device))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    read = min(time_calls(torch.Tensor.sum, [source], device, repeats=20, seconds=0.5))
    copy = min(time_calls(target.copy_, [source], device, repeats=20, seconds=0.5))
    return source.nbytes / min(read, copy / 2)


def time_calls(
    run: Callable[[T], Any], inputs: Sequence[T], device: torch.device, repeats: int, seconds: float
) -> list[float]:
    """Measure the seconds of each call, after three to warm up.

    Args:
        run: what to time.
        inputs: what it gets, in turn.
        device: where it runs; a CUDA device times it by events.
        repeats: calls, at most.
        seconds: time for all calls; at least 3 are made.
    """
    turns, warm = itertools.cycle(inputs), []
    for _ in range(3):
        start = time.perf_counter()
        run(next(turns))
        synchronize(device)
        warm.append(time.perf_counter() - start)
    count = max(3, min(repeats, int(seconds / min(warm))))
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, stop in events:
            start.record()
            run(next(turns))
            stop.record()
        synchronize(device)
        return [start.elapsed_time(stop) * 1e-3 for start, stop in events]
    times: list[float] = []
    while len(times) < count and (len(times) < 3 or sum(times) < seconds):
        start = time.perf_counter()
        run(next(turns))
        times.append(time.perf_counter() - start)
    return times


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Measure the most bytes that a call adds at once: by CUDA's allocator, or torch.profiler on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def synchronize(device: torch.device) -> None:
    """Wait for what runs on a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TooLong(BaseException):
    """Raised by `at_most`; passes through handlers of Exception, such as the compiler's."""


@contextlib.contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Raise `TooLong` if `what` takes longer, where the system has timers (in the main thread, not on Windows).

    One inside another keeps its own time; that of the outer one goes on when it is done.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TooLong(f"{what} took more than {seconds:.0f} s")

    before, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3))


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Silence the stderr of C++, on which the profiler announces each start and stop."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
