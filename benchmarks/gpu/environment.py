"""The machine: card, driver, versions, and the bandwidth of its memory."""

from collections.abc import Iterator
from pathlib import Path

import torch

from swan.evaluation.machine import last_level_cache, machine, memory_bandwidth, versions

from .rows import Job, Row, emit, outcome

DRIVER = Path("/proc/driver/nvidia/version")


def jobs(device: torch.device, quick: bool) -> list[Job]:
    return [("the machine", lambda: described(device)), ("the kernels can be built", lambda: buildable(device))]


def described(device: torch.device) -> Iterator[Row]:
    bandwidth = memory_bandwidth(device)
    about = {"machine": machine() | {"driver": driver(), "last_level_cache": last_level_cache(device)}}
    emit("about", about | {"versions": versions(), "bandwidth": bandwidth, "gpu": gpu_name(device)})
    yield {}


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def driver() -> str | None:
    """Return the first line in which the driver names its version, or None."""
    return DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else None


def buildable(device: torch.device) -> Iterator[Row]:
    """Fail where the kernels for GPUs cannot serve: else tensor code would pass in their place."""
    if device.type == "cuda":
        from swan.kernels.cuda import missing

        reason = missing(torch.cuda.current_device())
        yield outcome("swan's CUDA kernels", "passed" if reason is None else "failed", reason or "nothing is missing")
