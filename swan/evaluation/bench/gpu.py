"""Clocks of a GPU: calls replayed from a CUDA graph, the time that Python takes for a call, and its launches."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from swan.evaluation.machine import synchronize

__all__ = ["host_us", "launches", "replayed", "turns_of"]

T = TypeVar("T")
LEAST_CALLS = 8  # in one graph: the start of a graph takes a microsecond or two
HOST_CALLS = 20  # few enough for the queue of launches, which makes Python wait when it is full
PROFILED_CALLS = 4


def replayed(run: Callable[[T], Any], inputs: Sequence[T], repeats: int, seconds: float) -> list[float]:
    """Measure the seconds of a call on a GPU: replay a CUDA graph of calls with the inputs in turn.

    Args:
        run: what to time; it must not wait for the GPU.
        inputs: what it gets, each at least once in a graph.
        repeats: replays, at most.
        seconds: time for all replays; at least 3 are made.

    Returns:
        For each replay its time over the number of calls in the graph.
    """
    turns = turns_of(inputs)
    for each in inputs:  # compiles, loads kernels and takes memory: a graph must not
        run(each)
    torch.cuda.synchronize()
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for each in turns:
                run(each)
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream
    first = _event_times(graph.replay, 1)[0]
    count = max(3, min(repeats, int(seconds / first)))
    return [each / len(turns) for each in _event_times(graph.replay, count)]


def turns_of(inputs: Sequence[T]) -> list[T]:
    """List the inputs in turn, all of them equally often, for at least 8 calls."""
    return [*inputs] * -(-LEAST_CALLS // len(inputs))


def _event_times(run: Callable[[], Any], count: int) -> list[float]:
    """Measure the seconds between events around each call."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e-3 for start, stop in events]


def host_us(run: Callable[[T], Any], inputs: Sequence[T], device: torch.device) -> float:
    """Measure the microseconds that Python takes for a call, without waiting for the GPU: the median."""
    synchronize(device)
    times: list[float] = []
    for each in itertools.islice(itertools.cycle(inputs), HOST_CALLS):
        start = time.perf_counter()
        run(each)
        times.append(time.perf_counter() - start)
    synchronize(device)
    return 1e6 * statistics.median(times)


def launches(run: Callable[[T], Any], inputs: Sequence[T], device: torch.device) -> float | None:
    """Count kernels, copies and fills that a call launches on a GPU; None on a CPU, or if the profiler sees none."""
    if device.type != "cuda":
        return None
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for each in itertools.islice(itertools.cycle(inputs), PROFILED_CALLS):
            run(each)
        synchronize(device)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return counted(profiler.profiler.kineto_results.events(), PROFILED_CALLS)


def counted(events: Sequence[Any], calls: int) -> float | None:
    """Count the events of a GPU for a call, without ranges that a user named."""
    count = sum(event.device_type() == DeviceType.CUDA and not event.is_user_annotation() for event in events)
    return count / calls if count else None
