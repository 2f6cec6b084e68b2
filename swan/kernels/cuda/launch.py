"""Loading compiled kernels on GPUs, and launching them on torch's current stream, by the CUDA driver.

The driver is called through cuda-bindings, which CUDA builds of torch bring along. `cuda.core.launch` takes no struct
as an argument, and cuda-core, which loads slowly, is needed only where something is compiled.
"""

import contextlib
import ctypes
import functools
import importlib
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swan.kernels.cuda.build import arch_of, compiled

__all__ = ["Kernel"]

MOST_SHARED = 48 * 1024  # bytes of shared memory that a kernel may use without asking
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class _Loaded(NamedTuple):
    """A kernel on a device."""

    function: Any  # CUfunction
    context: Any  # CUcontext: the device's primary one, which torch uses


class _Argument(threading.local):
    """The struct that a kernel takes, in memory; one for each thread, as others run while the driver copies it."""

    def __init__(self, size: int) -> None:
        self.content = ctypes.create_string_buffer(size)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.content))
        self.address = ctypes.addressof(self.pointers)  # of the array of pointers to arguments: one


class Kernel:
    """A kernel whose only argument is a struct; compiled and loaded on each device when it is first launched there.

    A launch allocates nothing on the GPU and waits for nothing, so CUDA graphs capture it, also the first one.

    Args:
        source: the file, see `swan.kernels.cuda.compiled`.
        name: of the kernel in the file.
        defines: macros and their values.
        arguments: the fields of the struct in the notation of Python's `struct` (such as ``"4Q3if"``), aligned as C
            aligns them; ``0Q`` at the end pads a struct with pointers as C does.
        threads: of a program (block).
        shared: bytes of dynamic shared memory of a program.
    """

    def __init__(
        self, source: Path, name: str, defines: Mapping[str, object], arguments: str, threads: int, shared: int = 0
    ) -> None:
        self.source, self.name, self.defines = source, name, tuple(defines.items())
        self.struct, self.threads, self.shared = struct.Struct(arguments), threads, shared
        self._argument = _Argument(self.struct.size)
        self._loaded: dict[int, _Loaded] = {}

    def launch(self, device: int, grid: tuple[int, int, int], *values: Tensor | float | None) -> None:
        """Launch programs on a device, on torch's current stream there.

        Args:
            device: index of the device.
            grid: programs along x, y and z.
            values: of the struct's fields; tensors for pointers, or None for null.

        Raises:
            RuntimeError: the kernel cannot be built or loaded, or the driver refuses the launch.
        """
        if torch._C._cuda_getDevice() != device:  # the default stream is that of the current device
            with torch.cuda.device(device):
                return self.launch(device, grid, *values)
        loaded = self._loaded.get(device) or self.load(device)
        numbers = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in values]
        self.struct.pack_into(self._argument.content, 0, *numbers)
        stream = torch._C._cuda_getCurrentRawStream(device)
        driver = _driver()
        launch = (loaded.function, *grid, self.threads, 1, 1, self.shared, stream, self._argument.address, 0)
        (result,) = driver.cuLaunchKernel(*launch)
        if result == NO_CONTEXT:  # a thread in which CUDA was not used yet
            _call("cuCtxSetCurrent", loaded.context)
            (result,) = driver.cuLaunchKernel(*launch)
        if result:
            raise RuntimeError(f"the kernel {self.name} was not launched: {result.name}")

    def load(self, device: int) -> _Loaded:
        """Compile the kernel if need be, and load it on a device.

        Raises:
            RuntimeError: it cannot be built or loaded.
        """
        arch = arch_of(device)
        with _loading_on(device) as context:
            library = _library(self.source, self.defines, arch)
            function = _call("cuKernelGetFunction", _call("cuLibraryGetKernel", library, self.name.encode()))
            self._check(function)
            if self.shared > MOST_SHARED:
                attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call("cuFuncSetAttribute", function, attribute, self.shared)
        self._loaded[device] = _Loaded(function, context)
        return self._loaded[device]

    def _check(self, function: Any) -> None:
        """Raise an error if the struct has not the size that the kernel expects: the driver would read past its end."""
        try:
            _, _, size = _driver().cuFuncGetParamInfo(function, 0)
        except RuntimeError:  # drivers before 12.4 do not tell
            return
        if size != self.struct.size:
            raise RuntimeError(f"the kernel {self.name} takes {size} bytes, the struct has {self.struct.size}")


@functools.cache
def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver and return its result.

    Raises:
        RuntimeError: it fails.
    """
    result, *values = getattr(_driver(), name)(*arguments)
    if result:
        raise RuntimeError(f"the CUDA driver's {name} failed: {result.name}")
    return values[0] if values else None


@functools.cache
def _library(source: Path, defines: tuple[tuple[str, object], ...], arch: str) -> Any:
    """Load the cubin of a source, for all devices of an architecture and all kernels in it."""
    return _call("cuLibraryLoadData", compiled(source, dict(defines), arch), [], [], 0, [], [], 0)


@contextlib.contextmanager
def _loading_on(device: int) -> Iterator[Any]:
    """Make the primary context of a device current, and let a stream that is being captured not forbid loading."""
    relaxed = _driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    mode = _call("cuThreadExchangeStreamCaptureMode", relaxed)
    before = _call("cuCtxGetCurrent")
    try:
        context = _call("cuDevicePrimaryCtxRetain", device)
        _call("cuCtxSetCurrent", context)
        yield context
    finally:
        _call("cuCtxSetCurrent", before)
        _call("cuThreadExchangeStreamCaptureMode", mode)
