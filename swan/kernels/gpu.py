"""What the Triton kernels share: layouts as numbers, and the tables that kernels read them from."""

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from swan.kernels import numbers_of
from swan.storage import Graded, Layout, TopK
from swan.storage.codes import OCTAVE, OFFSET, PARTS, code_bytes, row_bytes

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("impl='triton' needs Triton: pip install triton") from error

__all__ = [
    "INTERPRETED", "MOST_PARTS", "OCTAVE_", "OFFSET_", "Form", "check_device", "checked_numbers", "columns_of",
    "form_of", "power_of_two", "scale_of", "table_of", "tl", "triton",
]  # fmt: skip

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
OCTAVE_, OFFSET_ = tl.constexpr(OCTAVE), tl.constexpr(OFFSET)
MOST_PARTS = 64  # of one width


def check_device(x: Tensor) -> None:
    """Raise a ValueError if no kernel runs where a tensor is."""
    if x.device.type != "cuda" and not INTERPRETED.value:
        raise ValueError(
            f"impl='triton' runs on a GPU, got tensors on {x.device.type}; use impl='auto' (or set TRITON_INTERPRET=1 "
            "before Triton is imported, to debug)"
        )


def checked_numbers(layout: Layout) -> list[int]:
    """`numbers_of` a layout.

    Raises:
        ValueError: no kernel here reads it.
    """
    if (numbers := numbers_of(layout)) is None:
        raise ValueError(
            f"impl='triton' reads Graded layouts, and TopK with positions='bitmap', got {layout}; use impl='compiled'"
        )
    return numbers


class Form(NamedTuple):
    """What kernels are compiled for, and which tensors there are."""

    d: int
    widths: tuple[int, int, int, int]  # columns of the fields of 4, 2 and 1 bits and of values
    bits: int  # of a value
    sparse: bool  # whether a bitmap says which coordinates have values
    parts: int  # of one width, at most, rounded up to a power of two
    sizes: tuple[int, int, int, int]  # of codes, values, scales and positions of a vector; 0 where there are none


class _Part(NamedTuple):
    """Fields of some bits: `width` bytes from byte `first`, which stand for ``2**exponent * scale * (y - c)``."""

    bits: int
    first: int
    width: int
    coordinates: range
    scale: int
    exponent: int


def _layout(form: int, *numbers: int) -> Graded | TopK:
    return TopK(*numbers) if form else Graded(tuple(zip(numbers[::2], numbers[1::2], strict=True)))  # pyright: ignore


def _parts(layout: Graded, bits: int) -> list[_Part]:
    """The parts with fields of so many bits."""
    parts, first, scale = [], 0, 0
    for start, stop, code in layout.stored:
        below = code
        for part in PARTS.get(code, ()):
            below -= part
            width = -(-(stop - start) * part // 8)
            parts.append(_Part(part, first, width, range(start, stop), scale, below - code + part + 1))
            first += width
        scale += code in PARTS
    return [part for part in parts if part.bits == bits]


def _whole(layout: Graded) -> list[int]:
    """The coordinates of 16 bits."""
    return [n for start, stop, bits in layout.stored if bits == 16 for n in range(start, stop)]


@functools.lru_cache(maxsize=1024)
def form_of(*numbers: int) -> Form:
    """The `Form` of a layout, given as `numbers_of` returns it.

    Raises:
        ValueError: more groups than kernels read.
    """
    layout = _layout(*numbers)
    if isinstance(layout, TopK):
        values = code_bytes(layout.keep, 4) if layout.bits == 4 else layout.keep
        sizes = 0, values, int(layout.bits < 16), layout.position_bytes
        return Form(layout.d, (0, 0, 0, columns_of(layout.d)), layout.bits, sizes[3] > 0, 1, sizes)
    parts = [_parts(layout, bits) for bits in (4, 2, 1)]
    counts = [sum(part.width * 8 // part.bits for part in alike) for alike in parts] + [len(_whole(layout))]
    least = max(power_of_two(layout.d) // 2, 16)
    w4, w2, w1, w0 = (max(power_of_two(count), least) if count else 0 for count in counts)
    most = power_of_two(max(1, *map(len, parts)))
    if most > MOST_PARTS:
        raise ValueError(f"impl='triton' reads layouts of up to {MOST_PARTS} groups, got {layout}; join some")
    coded = [(stop - start, bits) for start, stop, bits in layout.stored if bits < 16]
    sizes = row_bytes(coded), counts[3], len(coded), 0
    return Form(layout.d, (w4, w2, w1, w0), 16, False, most, sizes)


@functools.lru_cache(maxsize=1024)
def table_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Where a layout keeps what: all that the kernels know of it besides its `Form`, int32; -1 stands for none.

    First the sizes of its `Form`, and how many value columns there are. Then for fields of 4, 2 and 1 bits five rows
    of one length: coordinate and part of each column, place of each byte, scale and exponent of each part; and for
    values the first two of these. Last three rows for the coordinates: the two columns that add up to each, and its
    scale.
    """
    layout, form = _layout(*numbers), form_of(*numbers)
    widths = form.widths
    sums: list[list[int]] = [[] for _ in range(layout.d)]
    scales = [-1] * layout.d
    whole = list(range(layout.d)) if isinstance(layout, TopK) else _whole(layout)
    table = [*form.sizes, len(whole)]
    base = 0
    for bits, columns in zip((4, 2, 1), widths[:3], strict=True):
        coordinate, owner, place, scale, exponent = [-1] * columns, *([0] * columns for _ in range(4))
        slot_width, byte = columns * bits // 8, 0
        for index, part in enumerate(_parts(layout, bits) if columns and isinstance(layout, Graded) else []):
            scale[index], exponent[index] = part.scale, part.exponent
            scales[part.coordinates.start : part.coordinates.stop] = [part.scale] * len(part.coordinates)
            for i in range(part.width):
                place[byte] = part.first + i
                for slot, n in enumerate(part.coordinates[i * 8 // bits : (i + 1) * 8 // bits]):
                    column = slot * slot_width + byte
                    coordinate[column], owner[column] = n, index
                    sums[n].append(base + column)
                byte += 1
        table += [*coordinate, *owner, *place, *scale, *exponent]
        base += columns
    for column, n in enumerate(whole):
        sums[n].append(base + column)
    table += [*whole, *[-1] * (widths[3] - len(whole)), *[0] * widths[3]]
    table += [[*columns, -1, -1][i] for i in range(2) for columns in sums] + scales
    return torch.tensor(table, dtype=torch.int32, device=device)


def power_of_two(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def columns_of(d: int) -> int:
    """Columns of a vector with `d` coordinates: `tl.dot` needs 16."""
    return max(power_of_two(d), 16)


@triton.jit
def scale_of(byte, exponent):
    """``2**exponent`` times what scale bytes stand for."""
    return tl.exp2((byte.to(tl.float32) - OFFSET_) / OCTAVE_ + exponent)
