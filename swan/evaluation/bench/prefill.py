"""Time and memory that a prompt takes in one layer: swan beside dense attention alone."""

import itertools
from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor

from swan.calibration.progress import track
from swan.evaluation.bench.common import Form, Setup, add_speedups, check_forms, reason_in, relative_error
from swan.evaluation.bench.decode import float64_attention
from swan.evaluation.bench.step import Layer
from swan.evaluation.machine import peak_bytes
from swan.functional.attention import dense_attention
from swan.functional.rotation import inverse_rotate, rotate
from swan.modules import KVCache
from swan.modules.cache import Prefill
from swan.storage import LayerPlan

__all__ = ["bench_prefill"]

PREFILL_FORMS: tuple[Form, ...] = (("graded", 0.27), ("topk", 0.5))


@torch.no_grad()
def bench_prefill(
    lengths: Sequence[int], setup: Setup | None = None, *, forms: Sequence[Form] = PREFILL_FORMS
) -> list[dict[str, Any]]:
    """Time the taking in of a prompt in one layer, with random contents.

    Dense is causal attention alone. swan rotates, stores (buffer, sinks and packed history), attends, and rotates the
    outputs back: in one way densely, as dense does, in the other as if token by token, each query to its own window
    and to the packed tokens before. The output of the last token is first compared with float64 attention.

    Args:
        lengths: tokens of the prompt.
        setup: the layer, and how it is timed.
        forms: as in `bench_decode`.

    Returns:
        Rows as of `bench_decode`: ``impl`` is ``"sdpa"`` for dense, for swan the `prefill` of the cache, ``"chunk"``
        or ``"windowed"``; ``bytes`` are what the cache then holds, ``bandwidth_fraction`` is None.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> setup = Setup(heads=4, kv_heads=2, head_dim=32, buffer=16, repeats=3)
        >>> [row["form"] for row in bench_prefill([64], setup)]
        ['dense', 'graded', 'graded', 'topk', 'topk']
    """
    setup = setup or Setup()
    check_forms(forms)
    rows: list[dict[str, Any]] = []
    ways = [("sdpa", ("dense", 1.0)), *((prefill, form) for form in forms for prefill in get_args(Prefill))]
    for length, (impl, form) in track([*itertools.product(lengths, ways)], "timing", show=setup.progress):
        row = setup.row("prefill", impl, form, length)
        with reason_in(row):
            row |= _measured(setup, impl, setup.plan_layer(*form), length)
        rows.append(row)
    add_speedups(rows)
    return rows


def _measured(setup: Setup, impl: str, layer: LayerPlan | None, length: int) -> dict[str, Any]:
    inputs = q, k, v = setup.random(length, length)
    functions = Layer(setup)

    def swan() -> tuple[Tensor, KVCache | None]:
        cache = KVCache(layer, buffer=setup.buffer, prefill=cast(Prefill, impl))
        return functions.step(cache, (q, k, v)), cache

    def dense() -> tuple[Tensor, KVCache | None]:
        return dense_attention(q, k, v, causal=True, impl="sdpa"), None

    run = dense if layer is None else swan
    out, cache = run()
    last = q[:, :, -1:]
    if cache is not None and cache.prefill == "windowed":
        expected = _seen_packed(functions, last, cache)
    else:
        expected = float64_attention(last, (k, v))
    error = relative_error(out[:, :, -1:], expected)
    nbytes = k.nbytes + v.nbytes if cache is None else cache.nbytes
    del out, cache
    times = setup.timed(lambda _: run(), [inputs])
    return times | {"bytes": nbytes, "error": error, "peak_bytes": peak_bytes(run, setup.device)}


def _seen_packed(functions: Layer, q: Tensor, cache: KVCache) -> Tensor:
    """Attend in float64 to what a cache stores."""
    state, stored = cache.state, cache.history_length
    history = [packed.tokens(0, stored) for packed in (state.k_history, state.v_history) if packed is not None]
    out = float64_attention(rotate(q, functions.key_basis), (*history, state.k_recent, state.v_recent))
    return inverse_rotate(out, functions.value_basis.double())
