"""Times of one layer: a step of attention, packing and rotation, whole eager and compiled steps, a fixed memory."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from swan import SwanAttention, inverse_rotate, pack
from swan.evaluation.bench import Setup, bench_capacity, bench_decode, bench_step
from swan.evaluation.bench.decode import kernel_on, measure, random_step
from swan.evaluation.bench.step import Layer, eager_columns, filled
from swan.evaluation.machine import memory_bandwidth

from .rows import Job, Row

RETENTIONS = (0.504, 0.266, 0.195, 0.18)
SHAPES = ((32768, 8, 128), (8192, 32, 128), (131072, 1, 128), (32768, 1, 128), (8192, 1, 128))  # length, batch, d
OTHER_SHAPES = ((32768, 8, 64), (32768, 8, 256))
CHUNK = 2048  # tokens of a prompt that are packed together
MIDDLE = ("graded", 0.266)
FP8 = ("fp8", 0.5)
MEMORY = 2**30  # bytes of the cache of one layer


def jobs(device: torch.device, quick: bool) -> list[Job]:
    """List the jobs in the order of what matters most."""
    shapes = ((300, 2, 64),) if quick else (*SHAPES, *OTHER_SHAPES)
    bandwidth = memory_bandwidth(device)
    found: list[Job] = []
    on_gpu = device.type == "cuda"
    for length, batch, d in shapes:
        setup = setup_of(device, quick, batch, d)
        impls = ["cudnn", "flash"] if on_gpu else ["sdpa", "sdpa-gqa"]
        forms = [(form, [kernel_on(device) if on_gpu else "tiles"]) for form in graded()]
        name = f"decode {length} x {batch}, d {d}"
        for form, with_impls in (("dense", impls), *forms):
            run = functools.partial(decode_rows, setup, length, form, with_impls, bandwidth)
            found.append((f"{name}, {form if form == 'dense' else form[1]}", run))
    length, batch, d = shapes[0]
    for batches in (batch, 1):
        run = functools.partial(around_rows, setup_of(device, quick, batches, d), length, bandwidth)
        found.append((f"pack and rotate, batch {batches}", run))
    one = setup_of(device, quick, 1, d)
    found.append(("eager step", lambda: step_rows(one, length, "eager")))
    found.append(("eager layer", lambda: layer_rows(one, length)))
    if not quick:
        found.append(("compiled step", lambda: step_rows(one, length, "compiled")))
        run = functools.partial(decode_rows, setup_of(device, quick, batch, d), length, FP8, ["flex"], bandwidth)
        found.append((f"decode {length} x {batch}, FlexAttention", run))
    memory = 2**20 if quick else MEMORY
    found.append(("capacity", lambda: capacity_rows(one, memory, length, bandwidth)))
    return found


def graded() -> list[tuple[str, float]]:
    return [("graded", retention) for retention in RETENTIONS]


def setup_of(device: torch.device, quick: bool, batch: int, d: int) -> Setup:
    heads, kv_heads = (8, 2) if quick else (32, 8)
    seconds = 0.02 if quick else 0.4
    return Setup(
        batch=batch, heads=heads, kv_heads=kv_heads, head_dim=d, device=device, repeats=21, seconds=seconds,
        compile_seconds=45, progress=False,
    )  # fmt: skip


def shaped(setup: Setup, rows: Sequence[Row], bandwidth: float | None = None) -> Iterator[Row]:
    """Add the sizes of the heads to rows, and the bound of their bytes where it is not there yet."""
    for row in rows:
        if bandwidth and row.get("bytes") and row["median_ms"] and row["bandwidth_fraction"] is None:
            row |= setup.bound(row["bytes"], row["median_ms"], bandwidth)
        yield row | {"heads": setup.heads, "kv_heads": setup.kv_heads, "head_dim": setup.head_dim}


def decode_rows(setup: Setup, length: int, form: Any, impls: list[str], bandwidth: float) -> Iterator[Row]:
    """Time the attention of one new token: dense, or in a form."""
    rows = bench_decode([length], setup, dtypes=[setup.dtype], forms=[] if form == "dense" else [form], impls=impls,
                        bandwidth=bandwidth)  # fmt: skip
    yield from shaped(setup, rows)


def around_rows(setup: Setup, length: int, bandwidth: float) -> Iterator[Row]:
    """Time packing and rotating of one token, and packing of a chunk; shares are of the attention at this length."""
    layer = setup.plan_layer(*MIDDLE)
    assert layer is not None
    name = kernel_on(setup.device) if setup.device.type == "cuda" else "tiles"
    attend = measure(setup, random_step(setup, length, layer), name, bandwidth)["median_ms"]
    functions, (q, k, v) = Layer(setup), setup.random(1, 1)
    _, k_chunk, v_chunk = setup.random(1, CHUNK)

    def packed(tokens: Any) -> None:
        pack(tokens[0], layer.keys)
        pack(tokens[1], layer.values)

    def rotated(token: Any) -> None:
        inverse_rotate(functions.rotate(token)[0], functions.value_basis)

    bases = functions.key_basis.nbytes + functions.value_basis.nbytes
    calls: list[tuple[str, Any, Any, int]] = [
        ("pack", packed, (k, v), k.nbytes + v.nbytes),
        ("rotate", rotated, (q, k, v), bases),
        (f"pack {CHUNK}", packed, (k_chunk, v_chunk), k_chunk.nbytes + v_chunk.nbytes),
    ]
    rows = []
    for what, run, tokens, nbytes in calls:
        times = setup.replayed(run, [tokens])
        columns = times | setup.bound(nbytes, times["median_ms"], bandwidth)
        rows.append(setup.row(what, "auto", MIDDLE, length) | columns | {"share": times["median_ms"] / attend})
    yield from shaped(setup, rows)


def step_rows(setup: Setup, length: int, impl: str) -> Iterator[Row]:
    """Time a step of a cache in its parts; on a GPU with its launches and Python's time."""
    rows = bench_step([length], setup, forms=[MIDDLE], impls=[impl])
    yield from shaped(setup, [row for row in rows if row["what"] != "break-even"])


def layer_rows(setup: Setup, length: int) -> Iterator[Row]:
    """Time an eager step of a whole layer: projections, rotations, cache and attention."""
    layer = setup.plan_layer(*MIDDLE)
    assert layer is not None
    width = setup.heads * setup.head_dim
    module = SwanAttention(width, setup.heads, setup.kv_heads, setup.head_dim).to(setup.device, setup.dtype)
    x = torch.randn(setup.batch, 1, width, device=setup.device, dtype=setup.dtype)
    caches = filled(setup, layer, length)
    columns = eager_columns(setup, lambda cache: module(x, cache), caches)
    yield from shaped(setup, [setup.row("layer", "eager", MIDDLE, length) | columns | {"bytes": caches[0].nbytes}])


def capacity_rows(setup: Setup, memory: int, length: int, bandwidth: float) -> Iterator[Row]:
    """Time the largest batches that fit a memory."""
    impl = None if setup.device.type == "cuda" else "tiles"
    rows = bench_capacity(memory, [length], setup, forms=graded(), impl=impl, bandwidth=bandwidth)
    yield from shaped(setup, rows)
