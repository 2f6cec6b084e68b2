"""Tokens per second in a fixed memory: a smaller cache makes room for a larger batch."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from swan.calibration.progress import track
from swan.evaluation.bench.common import Form, Setup, check_forms, check_lengths, forms_on, reason_in
from swan.evaluation.bench.decode import fused_on, kernel_on, measure, random_step
from swan.evaluation.machine import memory_bandwidth

__all__ = ["bench_capacity"]


@torch.no_grad()
def bench_capacity(
    memory: int,
    lengths: Sequence[int],
    setup: Setup | None = None,
    *,
    forms: Sequence[Form] | None = None,
    impl: str | None = None,
    bandwidth: float | None = None,
) -> list[dict[str, Any]]:
    r"""Time the attention of one decode step of one layer at the largest batch that fits a memory.

    $$\text{batch} = \lfloor \text{memory} / \text{bytes of a sequence} \rfloor, \qquad
    \text{tokens per second} = \text{batch} / \text{median time}$$

    for dense attention (sdpa, query groups as rows of their KV head; on a GPU cuDNN and flash) and for each form, as
    `bench_decode` times them.

    Args:
        memory: bytes of the cache of one layer.
        lengths: tokens of each sequence, each above the buffer.
        setup: the layer, and how it is timed; its batch is not used.
        forms: as in `bench_decode`.
        impl: of the swan rows, as in `bench_decode`; by default the kernel of the device (fp8: ``"compiled"``,
            on a GPU ``"flex"``).
        bandwidth: bytes per second that memory gives; measured by default.

    Returns:
        Rows as of `bench_decode`, and ``tokens_per_second``; ``bytes`` are those of the whole batch, ``speedup`` is
        that of the tokens per second over dense.

    Raises:
        ValueError: a length that is not above the buffer, or an unknown form.

    Example:
        >>> setup = Setup(heads=4, kv_heads=2, head_dim=32, buffer=16, repeats=3)
        >>> rows = bench_capacity(2**18, [128], setup, forms=[("graded", 0.27)], impl="tiles")
        >>> [(row["form"], row["batch"]) for row in rows]
        [('dense', 8), ('graded', 23)]
    """
    setup = setup or Setup()
    forms = forms_on(setup.device) if forms is None else forms
    check_forms(forms)
    check_lengths(lengths, setup)
    bandwidth = bandwidth or memory_bandwidth(setup.device)
    rows: list[dict[str, Any]] = []
    on_gpu = setup.device.type == "cuda"
    ways: list[tuple[Form, str]] = [(("dense", 1.0), name) for name in fused_on(setup.device)]
    rivals = {"fp8": "flex" if on_gpu else "compiled", **({"topk": "tiles"} if on_gpu else {})}
    ways += [(form, rivals.get(form[0], impl or kernel_on(setup.device))) for form in forms]
    cases = [*itertools.product(lengths, ways)]
    for length, (form, used) in track(cases, "timing", show=setup.progress):
        row = setup.row("capacity", used, form, length, batch=None, tokens_per_second=None)
        with reason_in(row):
            each = _sequence_bytes(setup, form, length)
            if each > memory:
                raise ValueError(f"one sequence takes {each} bytes, there are {memory}")
            here = dataclasses.replace(setup, batch=memory // each)
            row["batch"] = here.batch
            row |= measure(here, random_step(here, length, here.plan_layer(*form)), used, bandwidth)
            row["tokens_per_second"] = here.batch / row["median_ms"] * 1e3
        rows.append(row)
    _add_speedups(rows)
    return rows


def _sequence_bytes(setup: Setup, form: Form, length: int) -> int:
    layer, itemsize, heads = setup.plan_layer(*form), setup.dtype.itemsize, setup.kv_heads
    if layer is None:
        return heads * length * 2 * setup.head_dim * itemsize
    history = layer.nbytes(heads * (length - setup.buffer), itemsize)
    return sum((*history, *layer.dense_nbytes(heads * setup.buffer, itemsize)))


def _add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    done = [row for row in rows if row["tokens_per_second"]]
    for row in done:
        same = [other for other in done if other["length"] == row["length"] and other["form"] == "dense"]
        if same:
            row["speedup"] = row["tokens_per_second"] / max(other["tokens_per_second"] for other in same)
