"""The CUDA operators on tensors of the CPU: all of the library's own code, with launches that the emulator runs."""

import collections
import ctypes
import re

import pytest
import torch
from torch import Tensor

from swan.kernels import calls, cuda
from swan.kernels.cuda import attend
from swan.kernels.cuda.device import Limits
from swan.kernels.cuda.launch import Kernel
from tests.kernels.cuda_on_cpu import Buffer, Inside, build, struct

TYPES = {"Q": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
# Pointers of each struct, by their number, that kernels may write.
WRITTEN = {
    "attend": range(-6, -1), "merge": range(-6, -1), "pack": (1, 2, 3), "unpack": (4,),
    "pack_pages": (2, 3, 4, 6, 7, 8), "take_in": (1, 2, 3, 4, 7, 8, 9, 10), "take_in_many": (1, 2, 3, 4, 7, 8, 9, 10),
}  # fmt: skip
H100 = Limits(132, 228 * 1024)


class Launches:
    """Runs launches on the emulator; remembers the name and the grid of each."""

    def __init__(self) -> None:
        self.done: list[tuple[str, tuple[int, int, int]]] = []
        self.kernels: list[Kernel] = []

    def launch(self, kernel: Kernel, index: int, grid: tuple[int, int, int], *values: Tensor | float | None) -> None:
        letters = "".join(
            letter * int(count or 1) for count, letter in re.findall(r"(\d*)([Qqif])", kernel.struct.format)
        )
        letters = letters if len(letters) == len(values) else letters[: len(values)]
        fields = [(f"f{i}", TYPES[letter]) for i, letter in enumerate(letters)]
        kind = type("Arguments", (ctypes.Structure,), {"_fields_": fields})
        assert ctypes.sizeof(kind) == kernel.struct.size
        pointers = [i for i, letter in enumerate(letters) if letter == "Q"]
        written = {pointers[i] for i in WRITTEN[kernel.name]}
        shared = _shared([values[i] for i in written])
        given = {f"f{i}": _memory(x, i in written, shared) for i, x in enumerate(values)}
        self.done.append((kernel.name, grid))
        self.kernels.append(kernel)
        library = build(kernel.source, dict(kernel.defines))
        library.launch(kernel.name, grid, kernel.threads, kernel.shared, struct(kind, **given))


def _shared(written: list[Tensor | float | None]) -> dict[int, Buffer]:
    """By its address each memory that several tensors are views of, such as the planes of pages."""
    storages = [x.untyped_storage() for x in written if isinstance(x, Tensor) and x.numel()]
    counts = collections.Counter(storage.data_ptr() for storage in storages)
    wholes = {storage.data_ptr(): storage for storage in storages if counts[storage.data_ptr()] > 1}
    return {place: Buffer(torch.empty(0, dtype=torch.uint8).set_(storage)) for place, storage in wholes.items()}


def _memory(
    x: Tensor | float | None, written: bool, shared: dict[int, Buffer]
) -> Buffer | Inside | Tensor | float | None:
    """A tensor as a GPU has it: what is read may go on to the end of its memory."""
    if not isinstance(x, Tensor):
        return x
    if not x.numel():
        return None  # as its address is
    if written:
        start = x.untyped_storage().data_ptr()
        return Inside(shared[start], x.data_ptr() - start) if start in shared else Buffer(x)
    start = x.storage_offset() * x.element_size()
    left = x.untyped_storage().nbytes() - start
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage(), start, (left,))


@pytest.fixture
def emulated(monkeypatch):
    """Let tensors of the CPU take the kernels for GPUs; returns the launches."""
    launches = Launches()
    monkeypatch.setitem(calls.KERNELS, "cpu", cuda)
    monkeypatch.setattr(Kernel, "launch", lambda kernel, *a: launches.launch(kernel, *a))
    monkeypatch.setattr(cuda, "missing", lambda device=None: None)
    monkeypatch.setattr(attend, "limits", lambda index: H100)
    counters = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(attend, "arrivals", lambda index, count: counters)
    cuda._built_once.cache_clear()
    attend.pair_of.cache_clear()
    cuda.require(torch.device("cpu"))
    with torch.library._scoped_library("swan", "IMPL") as library:
        from swan.kernels.cuda.operators import OPERATORS

        for name, function in OPERATORS.items():
            library.impl(f"{name}_cuda", function, "CPU")
        yield launches
    cuda._built_once.cache_clear()
    attend.pair_of.cache_clear()
    assert not counters.any()
