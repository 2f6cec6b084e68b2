"""Kernels of .cu files on a CPU: built by g++ with cuda_on_cpu.h, run thread by thread, each access checked.

    kernels = build(Path("attend.cu"), {"D": 128})
    out = torch.empty(4, 128)
    kernels.launch("attend", (splits, heads), 128, 4096, struct(Params, q=q, out=unwritten(out), tokens=300))

What a kernel does wrong is raised as an AssertionError whose text begins with its kind: out of bounds, misaligned,
unwritten, in flight, read-only, race or barrier.
"""

import ctypes
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
INSIDE, WRITTEN, WRITABLE = 1, 2, 4  # of a byte, as in memory.h
ALIGNMENT = 256  # of memory that CUDA gives
CXX = os.environ.get("CXX", "c++")
# Several accesses must not become one: -O1 joins none. Checks of alignment, and calls beside each access, are the
# compiler's; the library that would answer them is not linked. Addr2line confuses the files of DWARF 5.
KERNEL_FLAGS = (
    "-O1 -g1 -gdwarf-4 -fsanitize=thread,alignment --param=tsan-instrument-func-entry-exit=0 -fno-strict-aliasing"
)
KERNEL_FLAGS += " -fno-builtin-memcpy -fno-builtin-memmove -fno-builtin-memset -Wno-unknown-pragmas"
# The name of a kernel follows its return type and, in any order, what else is said of it.
KERNEL = re.compile(r"__global__\s+(?:(?:void|static|inline|__launch_bounds__\s*\([^)]*\))\s+)+(\w+)\s*\(")


@dataclasses.dataclass(eq=False)
class Buffer:
    """A tensor that kernels may write."""

    tensor: Tensor
    written: Tensor | None = None  # bytes of the memory that it spans: whether a kernel wrote them; None: all are


@dataclasses.dataclass(eq=False)
class Inside:
    """A pointer to some byte of a buffer that several pointers share."""

    buffer: Buffer
    byte: int


def writable(tensor: Tensor) -> Buffer:
    """A tensor that kernels may read and write; those given without this are read only."""
    return Buffer(tensor)


def unwritten(tensor: Tensor) -> Buffer:
    """One that they may write, and read where they wrote, in this launch or in an earlier one with the same Buffer."""
    return Buffer(tensor, torch.zeros(_span(tensor), dtype=torch.uint8))


@dataclasses.dataclass
class Struct:
    kind: type[ctypes.Structure]
    fields: Mapping[str, Any]


def struct(kind: type[ctypes.Structure], **fields: Any) -> Struct:
    """One argument by value; fields of type c_void_p take tensors, structures take mappings, and arrays sequences."""
    return Struct(kind, fields)


def build(source: Path | str, defines: Mapping[str, Any] | None = None, kernels: Sequence[str] = ()) -> "Library":
    """The kernels of a .cu file, or of its text, once for each set of macros.

    Args:
        source: the file or the text.
        defines: macros.
        kernels: names of kernels, or template instances such as "attend<128, 4>"; else those that the source defines.
    """
    text = source.read_text() if isinstance(source, Path) else source
    names = tuple(kernels) or tuple(KERNEL.findall(text))
    flags = [f"-D{name}={value}" for name, value in {"CUDA_ON_CPU": 1, **(defines or {})}.items()]
    return _build(source, names, tuple(flags))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cuda_on_cpu")


@functools.cache
def _machine() -> Path:
    file = Path(_folder().name) / "machine.o"
    _compile("-O3", "-march=native", "-g1", "-c", HERE / "cuda_on_cpu" / "machine.cpp", "-o", file)
    return file


@functools.cache
def _build(source: Path | str, names: tuple[str, ...], flags: tuple[str, ...]) -> "Library":
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    if isinstance(source, str):
        (folder / "kernel.cu").write_text(source)
        source = folder / "kernel.cu"
    text = f'#include "{HERE / "cuda_on_cpu.h"}"\n#include "{source.resolve()}"\n'
    text += "".join(f'extern "C" void run_{i}() {{ cuda_on_cpu::call({name}); }}\n' for i, name in enumerate(names))
    (folder / "calls.cpp").write_text(text)
    _compile(*KERNEL_FLAGS.split(), *flags, "-c", folder / "calls.cpp", "-o", folder / "kernel.o")
    _compile("-shared", "-Wl,-Bsymbolic,-z,defs", folder / "kernel.o", _machine(), "-o", folder / "kernel.so")
    return Library(folder / "kernel.so", names)


def _compile(*arguments: Any) -> None:
    done = subprocess.run([CXX, "-std=c++17", "-fPIC", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


class Library:
    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self.file, self.names = file, tuple(names)
        self._library = ctypes.CDLL(str(file))
        self._library.launch.restype = ctypes.c_char_p

    def launch(self, kernel: str, grid: Any, block: Any, shared: int, *arguments: Any, in_turns: bool = False) -> None:
        """Runs a kernel.

        Args:
            kernel: its name.
            grid, block: numbers of programs and of threads, in one to three dimensions.
            shared: bytes of shared memory.
            arguments: tensors of the CPU and Buffers for pointers, None for a null pointer, numbers, and Structs.
            in_turns: programs take turns, rather than run one after the other.
        """
        memory = _Memory()
        for x in arguments:
            memory.find(x)
        regions = memory.place(self._library)
        packed = (_Argument * len(arguments))(*map(memory.argument, arguments))
        grid, block = ((ctypes.c_uint * 3)(*(*(x if isinstance(x, tuple) else (x,)), 1, 1)[:3]) for x in (grid, block))
        run = self._library[f"run_{self.names.index(kernel)}"]
        size = ctypes.c_uint64(shared)
        report = self._library.launch(run, grid, block, size, in_turns, packed, len(arguments))
        memory.take_back(regions)
        if report is not None:
            raise AssertionError(re.sub(r"\[0x(\w+)\]", self._line, report.decode()))

    def _line(self, site: re.Match) -> str:
        """The line of the kernel that called, or was, what stands before an address."""
        address = hex(int(site[1], 16) - 1)
        command = ["addr2line", "-i", "-e", str(self.file), address]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        lines = [line.split(" ")[0] for line in lines if "cuda_on_cpu" not in Path(line).name] or ["an unknown line"]
        return Path(lines[0]).name


class _Region(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("bytes", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("address", ctypes.c_uint64),
    ]


class _Argument(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char),
        ("integer", ctypes.c_int64),
        ("number", ctypes.c_double),
        ("bytes", ctypes.c_void_p),
        ("size", ctypes.c_int64),
    ]


class _Memory:
    """The tensors of a launch, and where kernels see them."""

    def __init__(self) -> None:
        self.buffers: dict[int, tuple[str, Buffer, bool]] = {}  # by the id of what was given
        self.states: list[Tensor] = []
        self.addresses: dict[int, int] = {}
        self.alive: list[Any] = []

    def find(self, x: Any, name: str = "") -> None:
        if isinstance(x, Inside):
            self.find(x.buffer, name)
        elif isinstance(x, Tensor | Buffer):
            name = name or f"argument {len(self.buffers)}"
            self.buffers[id(x)] = (name, x if isinstance(x, Buffer) else Buffer(x), isinstance(x, Buffer))
        elif isinstance(x, Struct | Mapping):
            for key, value in (x.fields if isinstance(x, Struct) else x).items():
                self.find(value, f"{name}.{key}" if name else key)
        elif isinstance(x, list | tuple):
            for i, value in enumerate(x):
                self.find(value, f"{name}[{i}]")

    def place(self, library: ctypes.CDLL) -> Any:
        regions = (_Region * len(self.buffers))()
        ends: list[tuple[int, int, bool]] = []
        for region, (name, buffer, write) in zip(regions, self.buffers.values(), strict=True):
            x = buffer.tensor
            if x.device.type != "cpu":
                raise ValueError(f"{name} is on {x.device}")
            state = _inside(x) * (INSIDE | (WRITABLE if write else 0))
            state |= state.bool() * (WRITTEN if buffer.written is None else buffer.written * WRITTEN)
            self.states.append(state)
            region.name, region.bytes, region.state = name.encode(), x.data_ptr(), state.data_ptr()
            region.size, region.offset = len(state), x.storage_offset() * x.element_size() % ALIGNMENT
            ends.append((x.data_ptr(), x.data_ptr() + len(state), write))
        ends.sort()
        for (_, end, write), (begin, _, also) in itertools.pairwise(ends):
            if begin < end and (write or also):
                raise ValueError("a tensor that may be written overlaps another; copies of both would differ")
        library.place_buffers(regions, len(regions))
        self.addresses = {key: region.address for key, region in zip(self.buffers, regions, strict=True)}
        return regions

    def take_back(self, regions: Any) -> None:
        for (_, buffer, _), state in zip(self.buffers.values(), self.states, strict=True):
            if buffer.written is not None:
                buffer.written |= (state & WRITTEN).bool()

    def argument(self, x: Any) -> _Argument:
        if x is None or isinstance(x, Tensor | Buffer):
            return _Argument(kind=b"p", integer=self.addresses[id(x)] if x is not None else 0)
        if isinstance(x, Struct):
            value = self.fill(x.kind, x.fields)
            self.alive.append(value)
            return _Argument(kind=b"s", bytes=ctypes.addressof(value), size=ctypes.sizeof(value))
        if isinstance(x, float):
            return _Argument(kind=b"f", number=x)
        return _Argument(kind=b"i", integer=int(x))

    def fill(self, kind: Any, value: Any) -> Any:
        if isinstance(value, Tensor | Buffer):
            return self.addresses[id(value)]
        if isinstance(value, Inside):
            return self.addresses[id(value.buffer)] + value.byte
        if isinstance(value, Mapping):
            return kind(**{name: self.fill(type_, value[name]) for name, type_ in kind._fields_ if name in value})
        if isinstance(value, list | tuple):
            return kind(*(self.fill(kind._type_, v) for v in value))
        return value


def _span(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return (1 + steps) * x.element_size() if x.numel() else 0


def _inside(x: Tensor) -> Tensor:
    """For each byte that a tensor spans, whether it is part of an element."""
    elements = torch.zeros(_span(x) // x.element_size(), dtype=torch.uint8)
    shape = [1 if s == 0 else n for n, s in zip(x.shape, x.stride(), strict=True)]
    if x.numel():
        elements.as_strided(shape, x.stride()).fill_(1)
    return elements.repeat_interleave(x.element_size())
