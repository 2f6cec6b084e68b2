"""What kernels need to know of the GPU that tensors are on, and of the stream that works there."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Limits", "arrivals", "limits"]

RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself, of each program
LEAST_ARRIVALS = 1024


class Limits(NamedTuple):
    """What a GPU has: processors, and bytes of shared memory in each."""

    processors: int
    shared: int

    def programs(self, shared: int) -> int:
        """Count the programs of so many bytes of shared memory that fit on a processor."""
        return self.shared // (shared + RESERVED)


@functools.cache
def limits(index: int) -> Limits:
    """Return the limits of a GPU."""
    found = torch.cuda.get_device_properties(index)
    return Limits(found.multi_processor_count, found.shared_memory_per_multiprocessor)


def arrivals(index: int, count: int) -> Tensor | None:
    """Return counters, zeros, that a kernel may use on the current stream if it leaves zeros; None in a CUDA graph.

    Kernels of a stream follow each other, so all may use the same counters. Graphs that were captured on one stream
    may run at the same time on others.
    """
    if torch.cuda.is_current_stream_capturing():
        return None
    stream = torch._C._cuda_getCurrentRawStream(index)
    found = _arrivals.get((index, stream))
    if found is None or len(found) < count:
        found = torch.zeros(max(count, LEAST_ARRIVALS), dtype=torch.int32, device=f"cuda:{index}")
        _arrivals[index, stream] = found
    return found


_arrivals: dict[tuple[int, int], Tensor] = {}
