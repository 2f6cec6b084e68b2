"""The packing kernels for NVIDIA GPUs, run on a CPU thread by thread, against `Graded.pack` and `DenseBuffer`."""

import ctypes
import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import swan.kernels.cuda
from swan import DenseBuffer, Graded
from swan.kernels.cuda import missing
from swan.kernels.cuda.layouts import macros
from swan.storage.codes import PARTS, code_bytes, unpack_code
from tests.compilers import needs_cxx
from tests.kernels import cubin
from tests.kernels.cuda_on_cpu import build, struct, unwritten, writable
from tests.strategies import any_graded, assert_packed, dtypes, normal

SOURCE = Path(swan.kernels.cuda.__file__).parent / "pack.cu"
MANY = 8  # as in the source
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled: a dtype, and layouts of keys and values."""

    dtype: torch.dtype
    keys: Graded
    values: Graded

    @property
    def defines(self):
        return macros(self.keys.groups, self.values.groups, self.dtype)

    @property
    def threads(self):
        return -(-2 * max(self.keys.d, self.values.d) // 32) * 32

    def shared(self, vectors):
        return 37 * vectors * max(self.keys.d, self.values.d)

    def __str__(self):
        names = ("-".join(f"{size}x{bits}" for size, bits in layout.groups) for layout in (self.keys, self.values))
        return " ".join([str(self.dtype).removeprefix("torch."), *names])


CASES = [
    Case(BF16, Graded(((32, 6), (32, 5), (64, 3))), Graded(((128, 4),))),
    Case(F16, Graded(((10, 16), (6, 8), (5, 0), (13, 1), (30, 2))), Graded(((11, 5), (13, 3)))),
    Case(F32, Graded(((3, 3), (4, 6))), Graded(((12, 16), (4, 0)))),
    Case(BF16, Graded(((16, 2),)), Graded(((16, 2),))),
]
SLOW = [
    Case(BF16, Graded(((256, 4),)), Graded(((100, 8), (155, 1)))),
    Case(F32, Graded(((24, 8),)), Graded(((50, 6), (40, 5)))),
    Case(F16, Graded(((64, 3), (64, 16))), Graded(((1, 1), (1, 4), (1, 5)))),
]
cases = pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)], ids=str)


# Arguments ----------------------------------------------------------------------------------------


def c_struct(**fields):
    return type("Arguments", (ctypes.Structure,), {"_fields_": list(fields.items())})


INT, LONG, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
PLANE = c_struct(data=POINTER, batch=LONG, head=LONG, token=LONG)
PACKED = c_struct(codes=PLANE, whole=PLANE, scales=PLANE, matrix=POINTER, room=LONG)
PACK = c_struct(x=PLANE, to=PACKED, tokens=INT, values=INT)
SIDE = c_struct(x=PLANE, recent=PLANE, history=PACKED)
TAKE_IN = c_struct(
    keys=SIDE, values=SIDE, length_at=POINTER, first_at=POINTER, length=LONG, first=LONG, padding=POINTER, start=LONG,
    tokens=INT, size=INT, sinks=INT,
)  # fmt: skip


def plane(buffer):
    strides = (buffer if isinstance(buffer, torch.Tensor) else buffer.tensor).stride()
    return {"data": buffer, "batch": strides[0], "head": strides[1], "token": strides[2]}


def planes(buffers, layout, matrix, room):
    """The struct for what a layout stores, from its tensors in the order of `Packed.tensors`."""
    left, coded = iter(buffers), layout.row_bytes > 0
    there = {"codes": coded, "whole": any(bits == 16 for _, _, bits in layout.stored), "scales": coded}
    fields = {name: plane(next(left)) for name, is_there in there.items() if is_there}
    return fields | {"room": room} | ({} if matrix is None else {"matrix": matrix})


def empty(layout, dtype, batch, heads, tokens):
    """Tensors for what a layout stores, filled with what no test stores."""
    packed = layout.pack(torch.zeros(batch, heads, tokens, layout.d, dtype=dtype))
    return packed.map(lambda t: torch.full_like(t, 171 if t.dtype == torch.uint8 else 1e4))


def packed_by_kernel(case, layout, x, mix=True):
    """Packs vectors by the kernel `pack`."""
    batch, heads, tokens, _ = x.shape
    found = empty(layout, case.dtype, batch, heads, tokens)
    matrix = layout.mix(case.dtype, x.device) if mix else None
    to = planes([unwritten(t) for t in found.tensors], layout, matrix, tokens)
    values = int(layout is not case.keys)
    arguments = struct(PACK, x=plane(x), to=to, tokens=tokens, values=values)
    grid = -(-tokens // MANY), heads, batch
    build(SOURCE, case.defines).launch("pack", grid, case.threads, case.shared(MANY), arguments)
    return found


# Packing ------------------------------------------------------------------------------------------


def check_pack(case, layout, tokens, seed, mix=True):
    x = normal(seed, 2, tokens, 2, layout.d).transpose(1, 2)
    x = (x * 2.0 ** (torch.arange(tokens) % 25 - 12).view(-1, 1)).to(case.dtype)
    found, expected = packed_by_kernel(case, layout, x, mix), layout.pack(x)
    assert [(t.shape, t.dtype) for t in found.tensors] == [(t.shape, t.dtype) for t in expected.tensors]
    matrix = layout.mix(x.dtype, x.device) if mix else None
    mixed = x.double() if matrix is None else x.double() @ matrix.double()
    rounding = 0.0 if matrix is None else layout.d * 2.0**-23 * mixed.abs().amax(-1, keepdim=True)
    assert_packed(found, x, mixed, rounding)
    used = sum(code_bytes(stop - start, bits) for start, stop, bits in layout.stored if bits in PARTS)
    assert not used or (found.planes[0][..., used:] == 0).all()


@needs_cxx
@cases
@pytest.mark.parametrize("mix", [True, False], ids=["mixed", "as it is"])
def test_packs_as_tensor_code_does(case, mix):
    """Up to the roundings of a mix in float32, and at an edge, where neighbouring steps are as good."""
    for seed, layout in enumerate({case.keys, case.values}):
        check_pack(case, layout, MANY + 5, seed, mix)


ANY = st.sampled_from([7, 16, 24, 64, 90, 128, 255, 256]).flatmap(any_graded)


@needs_cxx
@pytest.mark.slow
@settings(max_examples=24)  # each is compiled
@given(dtypes, ANY, ANY)
def test_packs_random_layouts(dtype, keys, values):
    case = Case(dtype, keys, values)
    for seed, layout in enumerate({keys, values}):
        check_pack(case, layout, 3, seed)


@needs_cxx
def test_scale_bytes_at_all_edges():
    """The smallest scale that is not below a number; codes count its steps. The last byte is for what has no scale."""
    layout = Graded(((1, 8),))
    eighths = (2.0 ** (torch.arange(8, dtype=torch.float64) / 8)).float()
    scales = (2.0 ** torch.arange(-16, 16)[:, None] * eighths).flatten()
    edges = [scales, scales.nextafter(torch.tensor(0.0)), scales.nextafter(torch.tensor(torch.inf))]
    x = torch.cat([*edges, torch.tensor([0.0, 1e-45, 1e-38, 3e38, torch.inf, torch.nan])])
    x = torch.cat([x, -x])
    found = packed_by_kernel(Case(F32, layout, layout), layout, x.view(1, 1, -1, 1), mix=False)
    byte = torch.searchsorted(scales, x.abs()).clamp(max=255)
    assert found.scales is not None and torch.equal(found.scales.flatten().long(), byte)
    code = ((x / scales[byte] * 128).floor() + 128).clamp(0, 255).masked_fill(byte == 255, 0)
    assert torch.equal(unpack_code(found.planes[0], 1, 8).flatten().float(), code)


# Taking tokens in ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """New tokens, then what happens before the next ones come."""

    tokens: int
    crop: int = 0
    drop: int = 0


@dataclasses.dataclass
class Run:
    """Slots of the ring, sinks, and what the cache gets.

    Attributes:
        on_device: counters are tensors.
        single: programs take one token each, however many there are.
        before: columns of the sequence that were dropped long ago.
        room: tokens that the history can hold.
    """

    size: int
    sinks: int
    steps: list[Step]
    padding: tuple[int, int] | None = None
    on_device: bool = False
    single: bool = False
    before: int = 0
    room: int = 32


class Cache:
    """A ring of the kernel and a `DenseBuffer`, which are given the same tokens."""

    batch, heads = 2, 2

    def __init__(self, case, run):
        self.case, self.run, self.room, self.size, self.sinks = case, run, run.room, run.size, run.sinks
        self.padding = None if run.padding is None else torch.tensor(run.padding)
        self.buffer, self.dropped = DenseBuffer(run.size, run.sinks), max(run.before - run.sinks, 0)
        self.buffer.state.length = self.buffer.state.first = run.before
        self.sides = [self.Side(self, layout) for layout in (case.keys, case.values)]

    class Side:
        def __init__(self, cache, layout):
            shape = cache.batch, cache.heads
            self.layout, dtype = layout, cache.case.dtype
            self.recent = unwritten(torch.full((*shape, cache.sinks + cache.size, layout.d), 1e4, dtype=dtype))
            self.packed = empty(layout, dtype, *shape, cache.room)
            self.history = [writable(t) for t in self.packed.tensors]
            self.expected = torch.zeros(*shape, cache.room, layout.d, dtype=dtype)
            self.stored = torch.zeros(cache.room, dtype=torch.bool)

        def arguments(self, x, room):
            matrix = self.layout.mix(x.dtype, x.device)
            return {
                "x": plane(x),
                "recent": plane(self.recent),
                "history": planes(self.history, self.layout, matrix, room) if room else {"room": 0},
            }

    def take_in(self, k, v):
        state = self.buffer.state
        length, first = int(state.length), int(state.first)
        keys, values, _ = self.buffer.push(k, v, self.padding if length == self.run.before else None)
        self.launch(k, v, length, first)
        oldest = max(first, self.sinks, length - self.size)  # the column of the first one that was evicted
        place = torch.arange(keys.shape[2]) + oldest - self.sinks - self.dropped
        inside = (place >= 0) & (place < self.room)
        for side, evicted in zip(self.sides, (keys, values), strict=True):
            side.expected[:, :, place[inside]] = evicted[:, :, inside]
            side.stored[place[inside]] = True

    def launch(self, k, v, length, first):
        tokens = k.shape[2]
        counters = {"length": length, "first": first}
        if self.run.on_device:  # where the numbers are not read
            at = {f"{name}_at": torch.tensor(value) for name, value in counters.items()}
            counters = {"length": -99, "first": -99, **at}
        sides = (side.arguments(x, self.room) for side, x in zip(self.sides, (k, v), strict=True))
        fields = dict(zip(("keys", "values"), sides, strict=True)) | counters
        fields |= {"start": self.sinks + self.dropped, "tokens": tokens, "size": self.size, "sinks": self.sinks}
        if self.padding is not None:
            fields["padding"] = self.padding
        vectors = 1 if self.run.single or tokens == 1 else MANY
        build(SOURCE, self.case.defines).launch(
            "take_in" if vectors == 1 else "take_in_many",
            (-(-tokens // vectors), self.heads, 2 * self.batch),
            self.case.threads,
            self.case.shared(vectors),
            struct(TAKE_IN, **fields),
            in_turns=True,
        )

    def crop(self, tokens):
        """The newest tokens are forgotten, and their slots filled with zeros."""
        state = self.buffer.state
        self.buffer.crop(int(state.length) - tokens)
        for side, recent in zip(self.sides, (state.k_recent, state.v_recent), strict=True):
            assert recent is not None
            side.recent.tensor[(recent == 0).all(-1)] = 0

    def drop(self, tokens):
        """The history forgets its oldest tokens, and the others move."""
        self.dropped += tokens
        for side in self.sides:
            blank = empty(side.layout, self.case.dtype, self.batch, self.heads, tokens)
            for tensor, new in zip(side.packed.tensors, blank.tensors, strict=True):
                tensor.copy_(torch.cat([tensor[:, :, tokens:], new], 2))
            side.expected = side.expected.roll(-tokens, 2)
            side.stored = side.stored.roll(-tokens)
            side.stored[-tokens:] = False

    def check_recent(self):
        state = self.buffer.state
        for side, recent in zip(self.sides, (state.k_recent, state.v_recent), strict=True):
            assert recent is not None
            written = side.recent.written.bool().view(*recent.shape[:3], -1).all(-1)
            assert torch.equal(side.recent.tensor[written], recent[written])
            assert (recent[~written] == 0).all()

    def check_history(self):
        for side in self.sides:
            untouched = empty(side.layout, self.case.dtype, self.batch, self.heads, self.room)
            expected = packed_by_kernel(self.case, side.layout, side.expected)
            assert side.stored.any()
            for found, one, other in zip(side.packed.tensors, expected.tensors, untouched.tensors, strict=True):
                assert torch.equal(found, torch.where(side.stored[:, None], one, other))


RUNS = {
    "one by one": Run(4, 2, [Step(1)] * 8, single=True),
    "many": Run(3, 0, [Step(17), Step(3), Step(1)]),
    "padded": Run(5, 3, [Step(2), Step(5), Step(1), Step(12)], padding=(0, 4), on_device=True),
    "cropped": Run(
        4, 1, [Step(9, crop=2), Step(1), Step(3, crop=3), Step(6, crop=1), Step(8)], padding=(3, 0), single=True
    ),
    "dropped": Run(4, 1, [Step(9), Step(5, drop=2), Step(1, drop=9), Step(4), Step(7)], on_device=True),
    "more than there is room for": Run(9, 2, [Step(30), Step(20)], on_device=True),
    "no history": Run(4, 1, [Step(6), Step(1), Step(7)], room=0),
    "late": Run(3, 1, [Step(5), Step(1)], before=2**40 + 1),
}


@needs_cxx
@cases
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_takes_tokens_in_as_buffer_and_history_do(case, run):
    """Ring and sinks to the bit; the history is what `pack` makes of the vectors."""
    cache = Cache(case, run)
    for seed, step in enumerate(run.steps):
        cache.take_in(*(tokens_of(layout, seed, step.tokens, case.dtype) for layout in (case.keys, case.values)))
        cache.check_recent()
        cache.crop(step.crop)
        if step.drop:
            cache.drop(step.drop)
    if run.room:
        cache.check_history()


def tokens_of(layout, seed, tokens, dtype):
    return normal(seed, 2, tokens, 2, layout.d, dtype=dtype).transpose(1, 2)


# Compiled for GPUs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) for c in (dataclasses.replace(CASES[0], dtype=F32), *SLOW)],
    ids=str,
)
@pytest.mark.skipif(missing() is not None, reason=f"{missing()}")
def test_compiles_without_spills(case):
    pytest.importorskip("cuda.core")
    found, _ = cubin.costs(SOURCE, case.defines, "sm_90")
    assert found.keys() == {"pack", "pack_pages", "unpack", "take_in", "take_in_many"}
    for cost in found.values():
        assert cost.stack == cost.spill_stores == cost.spill_loads == 0
        assert cost.registers * case.threads <= 65536
