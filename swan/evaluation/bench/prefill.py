"""Time and memory that a prompt takes in one layer: swan beside dense attention alone."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swan.calibration.progress import track
from swan.evaluation.bench.common import Form, Setup, add_speedups, check_forms, reason_in, relative_error
from swan.evaluation.bench.decode import float64_attention
from swan.evaluation.bench.step import Layer
from swan.evaluation.machine import peak_bytes
from swan.functional.attention import dense_attention
from swan.modules import KVCache
from swan.storage import LayerPlan

__all__ = ["bench_prefill"]

PREFILL_FORMS: tuple[Form, ...] = (("graded", 0.27), ("topk", 0.5))


@torch.no_grad()
def bench_prefill(
    lengths: Sequence[int], setup: Setup | None = None, *, forms: Sequence[Form] = PREFILL_FORMS
) -> list[dict[str, Any]]:
    """Time the taking in of a prompt in one layer, with random contents.

    Dense is causal attention alone. swan rotates, stores (buffer, sinks and packed history), attends densely as that
    does, and rotates the outputs back. The output of the last token is first compared with float64 attention.

    Args:
        lengths: tokens of the prompt.
        setup: the layer, and how it is timed.
        forms: as in `bench_decode`.

    Returns:
        Rows as of `bench_decode`: ``impl`` is ``"sdpa"`` or ``"eager"``, ``bytes`` are what the cache then holds,
        ``bandwidth_fraction`` is None.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> setup = Setup(heads=4, kv_heads=2, head_dim=32, buffer=16, repeats=3)
        >>> [row["form"] for row in bench_prefill([64], setup)]
        ['dense', 'graded', 'topk']
    """
    setup = setup or Setup()
    check_forms(forms)
    rows: list[dict[str, Any]] = []
    cases = [*itertools.product(lengths, [("dense", 1.0), *forms])]
    for length, form in track(cases, "timing", show=setup.progress):
        row = setup.row("prefill", "sdpa" if form[0] == "dense" else "eager", form, length)
        with reason_in(row):
            row |= _measured(setup, setup.plan_layer(*form), length)
        rows.append(row)
    add_speedups(rows)
    return rows


def _measured(setup: Setup, layer: LayerPlan | None, length: int) -> dict[str, Any]:
    q, k, v = setup.random(length, length)
    run = _dense if layer is None else _swan(setup, layer)
    out, nbytes = run(q, k, v)
    error = relative_error(out[:, :, -1:], float64_attention(q[:, :, -1:], (k, v)))
    del out
    times = setup.timed(lambda inputs: run(*inputs), [(q, k, v)])
    peak = peak_bytes(lambda: run(q, k, v), setup.device)
    return times | {"bytes": nbytes, "error": error, "peak_bytes": peak}


Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, int]]  # output, and bytes of the cache


def _dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
    return dense_attention(q, k, v, causal=True, impl="sdpa"), k.nbytes + v.nbytes


def _swan(setup: Setup, layer: LayerPlan) -> Run:
    functions = Layer(setup)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
        cache = KVCache(layer, buffer=setup.buffer)
        return functions.step(cache, (q, k, v)), cache.nbytes

    return run
