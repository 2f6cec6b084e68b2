"""What runs CUDA kernels on a CPU: each instruction against a plain computation, and a fault of each kind."""

import ctypes
from pathlib import Path

import pytest
import torch

from tests.compilers import needs_cxx
from tests.kernels.cuda_on_cpu import build, struct, unwritten, writable

pytestmark = needs_cxx

NAMES = ["product_bf16", "product_half", "transposed", "shuffles", "bits", "roundings", "copies", "atomics"]
NAMES += ["sum", "relay", "places", "by_struct"]
NAMES += [f"matrices<{n}, {way}>" for n in (1, 2, 4) for way in ("false", "true")]


@pytest.fixture(scope="module")
def kernels():
    return build(Path(__file__).parent / "cuda_on_cpu" / "instructions.cu", kernels=NAMES)


def words(x):
    """Pairs of numbers of two bytes."""
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize(("name", "dtype"), [("product_bf16", torch.bfloat16), ("product_half", torch.float16)])
def test_products(kernels, name, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    expected = c.double() + a.double() @ b.double().T
    kernels.launch(name, 1, 32, 0, words(a), words(b), writable(c))
    assert torch.equal(c, expected.float())


@pytest.mark.parametrize("way", ["false", "true"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrices(kernels, n, way):
    x, y = torch.randint(0, 1 << 15, (n, 8, 8), dtype=torch.int16), torch.empty(n, 32, dtype=torch.int32)
    kernels.launch(f"matrices<{n}, {way}>", 1, 32, n * 8 * 48, x, unwritten(y))
    assert torch.equal(y.view(torch.int16).view(n, 8, 8), x.mT if way == "true" else x)


def test_transposed(kernels):
    x, y = torch.randint(0, 1 << 15, (8, 8), dtype=torch.int16), torch.empty(32, dtype=torch.int32)
    kernels.launch("transposed", 1, 32, 0, words(x), unwritten(y))
    assert torch.equal(y.view(torch.int16).view(8, 8), x.T)


def test_shuffles_and_votes(kernels):
    x, y = torch.randint(-100, 100, (64,), dtype=torch.int32), torch.empty(9, 64, dtype=torch.int32)
    kernels.launch("shuffles", 1, 64, 0, x, unwritten(y))
    i = torch.arange(64)
    lane, warp = i % 32, i // 32 * 32
    sources = [warp + 5, i ^ 9, torch.where(lane < 29, i + 3, i), torch.where(lane > 2, i - 3, i), i // 8 * 8 + 1]
    for row, source in zip(y, sources, strict=False):
        assert torch.equal(row, x[source])
    assert (y[5] == 0).all() and (y[6] == (x[warp[:, None] + torch.arange(32)] > -100).all(1)).all()
    votes = ((x > 0).view(2, 32).long() << torch.arange(32)).sum(1)
    assert torch.equal(y[7].long() & 0xFFFFFFFF, votes.repeat_interleave(32))
    assert torch.equal(y[8], x[i ^ 1])


def test_bits(kernels):
    x, y = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32), torch.empty(6, 32, dtype=torch.int32)
    x[0] = 0
    kernels.launch("bits", 1, 32, 0, x, unwritten(y))
    found = (y.long() & 0xFFFFFFFF).tolist()
    for i, v in enumerate(v & 0xFFFFFFFF for v in x.tolist()):
        both = (v | (~v & 0xFFFFFFFF) << 32).to_bytes(8, "little")
        permuted = int.from_bytes([both[1], both[5], both[3], both[6]], "little")
        ffs, clz = (v & -v).bit_length(), 32 - v.bit_length()
        expected = [permuted, v.bit_count(), ffs, clz, (7 << 32 | v) >> 4 & 0xFFFFFFFF, v & 0xFF00 | 3]
        assert [row[i] for row in found] == expected


def test_roundings(kernels):
    special = [0.0, -0.0, 1e-8, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 65519.0, 65520.0, 1e30, float("inf"), -float("inf")]
    x = torch.cat([torch.tensor(special), torch.randn(4000) * torch.exp2(torch.randint(-30, 20, (4000,)).float())])
    x = torch.cat([x, torch.arange(2048) / 1024 + 2**-11, torch.arange(256) / 128 + 2**-8])  # ties
    bf16, half, back = (torch.empty(len(x), dtype=t) for t in (torch.int32, torch.int32, torch.float32))
    kernels.launch("roundings", 1, 128, 0, x, unwritten(bf16), unwritten(half), unwritten(back), len(x))
    assert torch.equal(bf16.short(), x.bfloat16().view(torch.int16))
    assert torch.equal(half.short(), x.half().view(torch.int16))
    assert torch.equal(back, x.half().float())


def test_copies(kernels):
    x = torch.randint(0, 256, (64, 64), dtype=torch.uint8)
    y = torch.full_like(x, 77)
    kernels.launch("copies", 1, 64, 64 * 64, x, writable(y))
    expected = torch.full_like(x, 77)
    expected[:, :24], expected[:, 32:36], expected[:, 48:53], expected[:, 53:] = x[:, :24], x[:, 32:36], x[:, 48:53], 0
    assert torch.equal(y, expected)


@pytest.mark.parametrize("in_turns", [False, True])
def test_atomics(kernels, in_turns):
    n, u, f = torch.zeros(5, dtype=torch.int32), torch.zeros(2, dtype=torch.uint32), torch.zeros(1)
    kernels.launch("atomics", 3, 40, 0, writable(n), writable(u), writable(f), in_turns=in_turns)
    assert n.tolist()[:3] == [119 * 60, 119, -119] and n[4] == 7 and n[3] > 0
    assert u.tolist() == [120, 0x80000000 + 119] and f == 60


@pytest.mark.parametrize("in_turns", [False, True])
def test_the_last_program_merges(kernels, in_turns):
    x = torch.randint(-9, 9, (5, 64)).float()

    def run(fences):
        sums, out, count = torch.empty(5), torch.empty(1), torch.zeros(1, dtype=torch.int32)
        buffers = unwritten(sums), unwritten(out), writable(count)
        kernels.launch("sum", 5, 64, 260, x, *buffers, fences, in_turns=in_turns)
        assert out == x.sum() and count == 0

    run(3)
    for fences in (0, 1, 2):
        with pytest.raises(AssertionError, match=r"race: read of argument 1.*not ordered after the write"):
            run(fences)


def test_programs_in_turns_hand_over(kernels):
    flag, out = torch.zeros(1, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    with pytest.raises(AssertionError, match="barrier: a thread that waits for ever, by atomics"):
        kernels.launch("relay", 3, 1, 0, writable(flag), unwritten(out))
    kernels.launch("relay", 3, 1, 0, writable(flag), unwritten(out), in_turns=True)
    assert out.tolist() == [41, 42]


def test_places(kernels):
    out = torch.empty(2 * 3 * 4 * 5, dtype=torch.int32)
    kernels.launch("places", (4, 5), (2, 3), 0, unwritten(out))
    assert torch.equal(out, torch.arange(120, dtype=torch.int32))


class Plane(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("stride", ctypes.c_long)]


class Params(ctypes.Structure):
    _fields_ = [("planes", Plane * 2), ("out", ctypes.c_void_p), ("n", ctypes.c_int)]


def test_one_struct(kernels):
    x, y, out = torch.randn(40, 2)[:, 1], torch.randn(40), torch.empty(40)
    planes = [{"x": t, "stride": t.stride(0)} for t in (x, y)]
    kernels.launch("by_struct", 1, 32, 0, struct(Params, planes=planes, out=unwritten(out), n=40))
    assert torch.equal(out, x - y)
    planes[0]["stride"] = 1  # memory of the tensor, between its elements
    with pytest.raises(
        AssertionError, match=r"out of bounds: read of 4 bytes, nearest is planes\[0\].x\[byte 4 of 316\]"
    ):
        kernels.launch("by_struct", 1, 32, 0, struct(Params, planes=planes, out=unwritten(out), n=40))


def test_what_one_launch_wrote_another_may_read(kernels):
    sums, x = unwritten(torch.empty(120, dtype=torch.int32)), torch.empty(9, 64, dtype=torch.int32)
    with pytest.raises(AssertionError, match="unwritten: read of 4 bytes, nothing wrote argument 0"):
        kernels.launch("shuffles", 1, 64, 0, sums, unwritten(x))
    kernels.launch("places", (4, 5), (2, 3), 0, sums)
    kernels.launch("shuffles", 1, 64, 0, sums, unwritten(x))


def test_calls_that_do_not_fit(kernels):
    x = torch.zeros(120, dtype=torch.int32)
    for arguments in [(writable(x), 3), (3,), ()]:
        with pytest.raises(AssertionError, match="argument: "):
            kernels.launch("places", (4, 5), (2, 3), 0, *arguments)
    with pytest.raises(ValueError, match="overlaps"):
        kernels.launch("transposed", 1, 32, 0, x, writable(x[10:50]))
    with pytest.raises(RuntimeError, match="weak"):
        build("__global__ void f() { __shared__ int x[32]; x[threadIdx.x] = 0; }")


# Faults -------------------------------------------------------------------------------------------------------------

# A body of a kernel with shared words s, read-only words x and words y of 256 each, y not written yet, for 64 threads
# in two programs; what is reported of it; and a body without the fault.
FAULTS = {
    "between warps": (
        "FILL s[i] = i; __syncwarp(); y[128 * b + i] = s[63 - i];",
        r"race: write of shared\[byte 128 of 1024\], not ordered after the read by thread 31 of the same program",
        "FILL s[i] = i; __syncthreads(); y[128 * b + i] = s[63 - i];",
    ),
    "inside of a warp": (
        "FILL s[i] = i; y[128 * b + i] = s[i ^ 1];",
        r"race: write of shared\[byte 4 of 1024\], not ordered after the read by thread 0 of the same program",
        "FILL s[i] = i; __syncwarp(); y[128 * b + i] = s[i ^ 1];",
    ),
    "shuffles order nothing": (
        "FILL s[i] = i; __shfl_xor_sync(~0u, i, 1); y[128 * b + i] = s[i ^ 1];",
        r"race: read of shared.*after the write by thread 30 of the same program at kernel.cu:\d+; thread 31 of",
        "FILL s[i] = i; __syncwarp(); y[128 * b + i] = s[i ^ 1];",
    ),
    "write after a read": (
        "FILL const int v = s[i ^ 1]; __any_sync(~0u, 1); s[i] = v; y[128 * b + i] = v;",
        "race: write of shared.*after the read by thread 30 of the same program",
        "FILL const int v = s[i ^ 1]; __syncwarp(); s[i] = v; y[128 * b + i] = v;",
    ),
    "write after reads of a warp": (
        "if (i < 32) s[i] = i; __syncthreads(); y[128 * b + i] = s[0]; __syncwarp(); if (i == 40) s[0] = 1;",
        "race: write of shared.*after the read by several warps of the same program",
        "if (i < 32) s[i] = i; __syncthreads(); y[128 * b + i] = s[0]; __syncthreads(); if (i == 40) s[0] = 1;",
    ),
    "neighbouring bytes are no race": (
        "((uint8_t*)s)[i / 2] = i; y[128 * b + i] = i;",
        "race: write of shared.*after the write by thread 0",
        "((uint8_t*)s)[i] = i; y[128 * b + i] = i;",
    ),
    "between threads in a buffer": (
        "y[128 * b + i / 2] = i;",
        r"race: write of argument 1\[byte 0 of 1024\]",
        "y[128 * b + i] = i;",
    ),
    "between programs": (
        "y[i] = i;",
        r"race: write of argument 1\[byte 0 of 1024\], not ordered after the write by thread 0 of program 0",
        "if (b == 0) y[i] = i;",
    ),
    "an atomic and a store": (
        "if (b == 0) { if (i == 0) y[0] = 0; __syncwarp(); atomicAdd(y, 1); }",
        "race: atomic access of argument 1.*after the write",
        "if (b == 0) { if (i == 0) y[0] = 0; __syncthreads(); atomicAdd(y, 1); }",
    ),
    "a load of a matrix": (
        "FILL uint32_t z[4]; s[4 * i] = i; load_matrix(z, shared_address(s) + 16 * i); y[128 * b + i] = z[0];",
        "race: .* of shared",
        "FILL uint32_t z[4]; s[4 * i] = i; __syncwarp(); load_matrix(z, shared_address(s) + 16 * i);",
    ),
    "no wait for a copy": (
        "copy16(shared_address(s + 4 * i), x + 4 * i); commit_copies(); y[128 * b + i] = s[4 * i];",
        r"in flight: read of 4 bytes, shared\[byte 0 of 1024\] is the target",
        "copy16(shared_address(s + 4 * i), x + 4 * i); commit_copies(); wait_copies<0>(); y[128 * b + i] = s[4 * i];",
    ),
    "a wait for too few copies": (
        "copy4(shared_address(s + i), x + i); commit_copies(); copy4(shared_address(s + 64 + i), x); commit_copies();"
        "wait_copies<1>(); y[128 * b + i] = s[64 + i];",
        "in flight: read",
        "copy4(shared_address(s + i), x + i); commit_copies(); copy4(shared_address(s + 64 + i), x); commit_copies();"
        "wait_copies<0>(); y[128 * b + i] = s[64 + i];",
    ),
    "a write below a copy": (
        "copy4(shared_address(s + i), x + i); s[i] = 0; wait_all_copies();",
        "in flight: write of 4 bytes",
        "s[i] = 0; copy4(shared_address(s + i), x + i); wait_all_copies();",
    ),
    "another's copy": (
        "copy4(shared_address(s + i), x + i); wait_all_copies(); __any_sync(~0u, 0); y[128 * b + i] = s[i ^ 1];",
        "race: read of shared.*after the write by thread 30",
        "copy4(shared_address(s + i), x + i); wait_all_copies(); __syncwarp(); y[128 * b + i] = s[i ^ 1];",
    ),
    "a copy over what is read": (
        "FILL y[128 * b + i] = s[i ^ 1]; __any_sync(~0u, 1); copy4(shared_address(s + i), x + i);",
        "race: write of shared.*after the read by thread 30",
        "FILL y[128 * b + i] = s[i ^ 1]; __syncwarp(); copy4(shared_address(s + i), x + i);",
    ),
    "behind a buffer": (
        "y[128 * b + i] = x[256 + i];",
        r"out of bounds: read of 4 bytes, nearest is argument 0\[byte 1024 of 1024\]; thread 0 of program \(0, 0, 0\)",
        "y[128 * b + i] = x[192 + i];",
    ),
    "before a buffer": (
        "y[i - 1] = x[i];",
        r"out of bounds: write of 4 bytes, nearest is argument 1\[byte -4",
        "y[128 * b + i] = 0;",
    ),
    "far from a buffer": ("y[128 * b + i] = x[1l << 40];", "out of bounds: read of 4 bytes", "y[128 * b + i] = x[i];"),
    "a null pointer": (
        "const int* p = x[i] == 77 ? x : nullptr; y[128 * b + i] = *p;",
        "out of bounds: read of 4 bytes",
        "const int* p = x[i] == 77 ? nullptr : x; y[128 * b + i] = *p;",
    ),
    "behind shared memory": (
        "s[256 + i] = 0;",
        r"out of bounds: write of 4 bytes, nearest is shared\[byte 1024 of 1024\]",
        "s[192 + i] = 0;",
    ),
    "a copy behind shared memory": (
        "copy4(shared_address(s + 193 + i), x + i);",
        r"out of bounds: write of 4 bytes, nearest is shared\[byte 1024",
        "copy4(shared_address(s + 192 + i), x + i);",
    ),
    "a misaligned word": (
        "y[128 * b + i] = *(const int*)((const char*)x + 2);",
        r"misaligned: access at argument 0\[byte 2 of 1024\]; thread 0 of program \(0, 0, 0\) at kernel.cu:\d+",
        "y[128 * b + i] = *(const int*)((const char*)x + 4);",
    ),
    "a misaligned vector": (
        "const int4 v = *(const int4*)(x + i); y[128 * b + i] = v.x;",
        r"misaligned: access at argument 0\[byte 4",
        "const int4 v = *(const int4*)(x + 4 * (i / 4)); y[128 * b + i] = v.x;",
    ),
    "a misaligned vector in shared memory": (
        "*(float2*)(s + 2 * i + 1) = make_float2(0, 0);",
        r"misaligned: access at shared\[byte 4",
        "*(float2*)(s + 2 * i) = make_float2(0, 0);",
    ),
    "a misaligned copy": (
        "copy16(shared_address(s + 2 * i), x);",
        r"misaligned: write of 16 bytes at shared\[byte 8 of",
        "copy16(shared_address(s + 4 * (i % 64)), x);",
    ),
    "a copy from a misaligned place": (
        "copy8(shared_address(s + 2 * i), x + i);",
        r"misaligned: read of 8 bytes at argument 0\[byte 4 of",
        "copy8(shared_address(s + 2 * i), x + 2 * i);",
    ),
    "bytes may be copied from anywhere": (
        "int v; memcpy(&v, (const char*)x + 1021, 4); y[128 * b + i] = v;",
        "out of bounds: read of 4 bytes",
        "int v; memcpy(&v, (const char*)x + 1019, 4); y[128 * b + i] = v;",
    ),
    "unwritten shared memory": (
        "s[i] = i; __syncthreads(); y[128 * b + i] = s[i + 1];",
        r"unwritten: read of 4 bytes, nothing wrote shared\[byte 256 of",
        "s[i] = i; s[i + 64] = i; __syncthreads(); y[128 * b + i] = s[i + 64];",
    ),
    "an unwritten byte of a word": (
        "((uint16_t*)s)[4 * i] = 0; y[128 * b + i] = s[2 * i];",
        r"unwritten: read of 4 bytes, nothing wrote shared\[byte 2 of",
        "((uint16_t*)s)[4 * i] = 0; ((uint16_t*)s)[4 * i + 1] = 0; y[128 * b + i] = s[2 * i];",
    ),
    "an earlier program's shared memory": (
        "if (b == 0) s[i] = i; y[128 * b + i] = s[i];",
        r"unwritten: read of 4 bytes, nothing wrote shared\[byte 0.*of program \(1, 0, 0\)",
        "s[i] = i; y[128 * b + i] = s[i];",
    ),
    "an unwritten buffer": (
        "y[128 * b + i] = y[i] + 1;",
        "unwritten: read of 4 bytes, nothing wrote argument 1",
        "y[128 * b + i] = 1;",
    ),
    "a read-only buffer": (
        "((int*)x)[i] = 0;",
        r"read-only: write of 4 bytes, argument 0\[byte 0",
        "y[128 * b + i] = x[i];",
    ),
    "an atomic on a read-only buffer": (
        "atomicAdd((int*)x, 1);",
        "read-only: atomic access",
        "if (i == 0) y[b] = x[0];",
    ),
    "threads that end before a barrier": (
        "if (i < 60) __syncthreads();",
        r"barrier: 60 threads of program \(0, 0, 0\) wait in __syncthreads.*at kernel.cu:\d+; thread 60 has ended",
        "if (i < 60) y[128 * b + i] = 0; __syncthreads();",
    ),
    "lanes in different instructions": (
        "if (i % 2) __syncwarp(); else __any_sync(~0u, 1);",
        r"barrier: __syncwarp meets __any_sync, where thread 0 waits at kernel.cu:\d+",
        "if (i < 32) __syncwarp(); else __any_sync(~0u, 1);",
    ),
    "a warp that waits for a program": (
        "if (i == 3) __syncthreads(); else __syncwarp();",
        "barrier: .* threads .* wait in __sync",
        "if (i < 32) __syncwarp(); __syncthreads();",
    ),
}
HEAD = "extern __shared__ __align__(16) uint8_t shared[]; int* s = (int*)shared; "
HEAD += "const int i = threadIdx.x, b = blockIdx.x;"
FILL = "for (int n = i; n < 256; n += 64) s[n] = 0; __syncthreads();"


@pytest.fixture(scope="module")
def bodies():
    """Two kernels for each: wrong_3 and right_3."""
    text, names = "", []
    for n, (wrong, _, right) in enumerate(FAULTS.values()):
        for name, body in (f"wrong_{n}", wrong), (f"right_{n}", right):
            text += f"__global__ void {name}(const int* x, int* y) {{ {HEAD} {body} }}\n"
            names.append(name)
    return build(text, {"FILL": FILL}, names)


@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_faults(bodies, name, in_turns):
    n = list(FAULTS).index(name)
    arguments = torch.arange(256, dtype=torch.int32), unwritten(torch.empty(256, dtype=torch.int32))
    with pytest.raises(AssertionError, match=FAULTS[name][1]):
        bodies.launch(f"wrong_{n}", 2, 64, 1024, *arguments, in_turns=in_turns)
    arguments = arguments[0], unwritten(arguments[1].tensor)
    bodies.launch(f"right_{n}", 2, 64, 1024, *arguments, in_turns=in_turns)
