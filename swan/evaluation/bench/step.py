"""Time of the parts of one decode step of a layer, and the length from which on it is less than a dense step's."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swan.calibration.progress import track
from swan.evaluation.bench.common import (
    Form,
    Setup,
    add_speedups,
    check_forms,
    reason_in,
    relative_error,
)
from swan.evaluation.bench.decode import DENSE, fused_on, random_step
from swan.evaluation.bench.gpu import host_us, launches, turns_of
from swan.functional.rotation import inverse_rotate, random_rotation, rotate
from swan.modules import KVCache
from swan.modules.visible import Visible
from swan.storage import LayerPlan

__all__ = ["Layer", "bench_step", "break_even", "eager_columns", "filled"]

STEP_FORMS: tuple[Form, ...] = (("graded", 0.27), ("topk", 0.5), ("leading", 0.5))
STEP_IMPLS = ("eager", "compiled")
Token = tuple[Tensor, Tensor, Tensor]  # q, k, v


@torch.no_grad()
def bench_step(
    lengths: Sequence[int],
    setup: Setup | None = None,
    *,
    forms: Sequence[Form] = STEP_FORMS,
    impls: Sequence[str] = STEP_IMPLS,
) -> list[dict[str, Any]]:
    r"""Time the parts of one decode step of a layer, from queries, keys and values to the output.

    A step rotates them, takes the token in and packs the one that leaves the buffer (`KVCache.update`), attends, and
    rotates the output back. Projections are not in it; nor is, in the dense step that it is compared with, the
    writing of the token. The result is first compared with the reference on the same cache.

    Args:
        lengths: tokens in the cache, each above the buffer and the sinks.
        setup: the layer, and how it is timed.
        forms: as in `bench_decode`.
        impls: ``"eager"`` (a cache that grows), or ``"compiled"`` (torch.compile, fullgraph, a static cache).

    Returns:
        Rows as of `bench_decode`, without ``bandwidth_fraction`` and ``peak_bytes``, and with ``share`` (of the
        time of the attention) and ``formula``. ``what`` is

        - ``"step"``: all of it, and what the dense attention takes; ``bytes`` are those of the cache, ``error`` is
          that of the result;
        - eager ``"rotate"`` (queries, keys, values and the output), ``"update"``, ``"attend"``, and ``"rest"`` (the
          step less these);
        - compiled ``"rotate+update"`` (one function), and ``"attend"`` (the step less that: the compiler
          fuses);
        - ``"break-even"``: ``length`` from which on a step takes less time than dense, between two of the lengths
          on a straight line, with ``formula``, what `break_even` counts for as many coordinates as the bytes of the
          form are (None where it does not lie between them: ``error`` says which is faster).

        On a GPU dense steps and compiled ones are replayed from a CUDA graph, eager ones timed by events with what
        Python takes if that is longer; eager rows have ``host_us`` (what Python takes for a call, in microseconds) and
        ``launches`` (of kernels, copies and fills for a call).

    Raises:
        ValueError: a length that is too short, or an unknown form or impl.

    Example:
        >>> setup = Setup(heads=4, kv_heads=2, head_dim=32, buffer=16, repeats=3)
        >>> rows = bench_step([64, 128], setup, forms=[("topk", 0.5)], impls=["eager"])
        >>> [row["what"] for row in rows if row["length"] == 64]
        ['step', 'rotate', 'update', 'attend', 'rest', 'step']
    """
    setup = setup or Setup()
    check_forms(forms)
    least = setup.buffer + KVCache(None).buffer.sinks
    if any(length <= least for length in lengths) or not set(impls) <= set(STEP_IMPLS):
        raise ValueError(
            f"every length must be above buffer and sinks ({least}) and impls of {', '.join(STEP_IMPLS)}, got "
            f"{list(lengths)} and {list(impls)}"
        )
    cases = [*itertools.product(sorted(lengths), [("dense", 1.0)], fused_on(setup.device))]
    cases += itertools.product(sorted(lengths), forms, impls)
    rows: list[dict[str, Any]] = []
    for length, form, impl in track(cases, "timing", show=setup.progress):
        row = setup.row("step", impl, form, length, share=None, formula=None)
        parts: dict[str, dict[str, Any]] = {}
        with reason_in(row):
            layer = setup.plan_layer(*form)
            measured, parts = _dense(setup, length, impl) if layer is None else _STEPS[impl](setup, layer, length)
            row |= measured
        rows += [setup.row(what, impl, form, length, share=None, formula=None) | part for what, part in parts.items()]
        rows.append(row)
        _add_shares(rows[-1 - len(parts) :])
    add_speedups(rows)
    return rows + [_break_even_row(setup, rows, form, impl) for form, impl in itertools.product(forms, impls)]


def break_even(d: int, keep: int, buffer: int) -> float:
    r"""Compute the tokens from which on a step takes fewer operations than dense: $L > d^2 / (d - k) + b$.

    Args:
        d: head dimension.
        keep: coordinates kept of each vector, below `d`.
        buffer: recent tokens kept dense.

    Returns:
        The length ``L`` at which the rotations of a step cost what pruning saves.

    Raises:
        ValueError: `keep` is not below `d`.

    Example:
        >>> break_even(d=128, keep=64, buffer=128)
        384.0

    Source: arXiv:2511.18936.
    """
    if not 0 < keep < d:
        raise ValueError(f"keep must be between 1 and d - 1 = {d - 1}, got {keep}")
    return d**2 / (d - keep) + buffer


class Layer:
    """The functions of a step; compiled ones must not hold more than they use."""

    def __init__(self, setup: Setup) -> None:
        options: dict[str, Any] = {"dtype": setup.dtype, "device": setup.device}
        bases = (random_rotation(setup.kv_heads, setup.head_dim, seed=seed, **options) for seed in (0, 1))
        self.key_basis, self.value_basis = bases

    def rotate(self, token: Token) -> Token:
        """Rotate queries, keys and values into the bases."""
        q, k, v = token
        return rotate(q, self.key_basis), rotate(k, self.key_basis), rotate(v, self.value_basis)

    def take_in(self, cache: KVCache, token: Token) -> tuple[Tensor, Visible]:
        """Store the rotated keys and values; return the rotated queries, and what they see."""
        q, k, v = self.rotate(token)
        return q, cache.update(k, v)

    def step(self, cache: KVCache, token: Token) -> Tensor:
        """Make the whole step, from queries, keys and values to the output."""
        return inverse_rotate(cache.attend(*self.take_in(cache, token)), self.value_basis)


Measured = tuple[dict[str, Any], dict[str, dict[str, Any]]]  # columns of the step, and of each part


def _dense(setup: Setup, length: int, impl: str) -> Measured:
    step = random_step(setup, length, None)
    times = setup.replayed(lambda stored: DENSE[impl](step.q, *stored), step.copies)
    return times | {"bytes": step.nbytes}, {}


def _eager(setup: Setup, layer: LayerPlan, length: int) -> Measured:
    functions, token = Layer(setup), _token(setup)
    caches = filled(setup, layer, length)
    error = _checked(functions, caches[0], token, functions.step)
    q, k, v = functions.rotate(token)
    visible = {id(cache): cache.update(k, v) for cache in caches}

    def rotations(token: Token) -> None:
        inverse_rotate(functions.rotate(token)[0], functions.value_basis)

    parts = {
        "rotate": eager_columns(setup, rotations, [token]),
        "update": eager_columns(setup, lambda cache: visible.update({id(cache): cache.update(k, v)}), caches),
        "attend": eager_columns(setup, lambda cache: cache.attend(q, visible[id(cache)]), caches),
    }
    step = eager_columns(setup, lambda cache: functions.step(cache, token), caches)
    parts["rest"] = _difference(step, *parts.values())
    return step | {"bytes": caches[0].nbytes, "error": error}, parts


def eager_columns(setup: Setup, run: Callable[[Any], Any], inputs: Sequence[Any]) -> dict[str, Any]:
    """Time calls with the inputs in turn; on a GPU also Python's part of a call and its launches."""
    times = setup.timed(run, inputs)
    if setup.device.type != "cuda":
        return times
    return times | {
        "host_us": host_us(run, inputs, setup.device),
        "launches": launches(run, inputs, setup.device),
    }


def _compiled(setup: Setup, layer: LayerPlan, length: int) -> Measured:
    functions, token = Layer(setup), _token(setup)
    caches = filled(setup, layer, length, static=True)
    torch.compiler.reset()
    step, take_in = (torch.compile(f, fullgraph=True, dynamic=False) for f in (functions.step, functions.take_in))
    error = setup.first(lambda: _checked(functions, caches[0], token, step))
    whole = setup.replayed(lambda cache: step(cache, token), caches)
    for cache in caches:
        cache.crop(length)  # has room again
    setup.first(lambda: take_in(caches[0], token))
    part = setup.replayed(lambda cache: take_in(cache, token), caches)
    return whole | {"bytes": caches[0].nbytes, "error": error}, {
        "rotate+update": part,
        "attend": _difference(whole, part),
    }


_STEPS = {"eager": _eager, "compiled": _compiled}


def _token(setup: Setup) -> Token:
    q, k, v = setup.random(1, 1)
    return q, k, v


def filled(setup: Setup, layer: LayerPlan, length: int, static: bool = False) -> list[KVCache]:
    """Make caches of so many tokens, in as many copies as it takes to leave the last-level cache."""
    _, k, v = setup.random(1, length)
    copies = setup.copies(round(layer.retention * (k.nbytes + v.nbytes)))
    calls = len(turns_of([*range(copies)])) if setup.device.type == "cuda" else 1  # of a replay, or by themselves
    room = -(-calls * (setup.repeats + 8) // copies)  # for each call of one row
    cache = KVCache(layer, buffer=setup.buffer, static=static, max_length=length + room if static else None)
    cache.update(k[:, :, :-1], v[:, :, :-1])
    cache.update(k[:, :, -1:], v[:, :, -1:])  # leaves no more dense tokens than the buffer
    return [cache, *(copy.deepcopy(cache) for _ in range(copies - 1))]


def _checked(functions: Layer, cache: KVCache, token: Token, step: Any) -> float:
    """Compute the error of a step over the reference on a copy of the cache."""
    twin = copy.deepcopy(cache)
    out = step(cache, token)
    q, visible = functions.take_in(twin, token)
    return relative_error(out, inverse_rotate(twin.attend(q, visible, impl="reference"), functions.value_basis))


def _difference(whole: dict[str, Any], *parts: dict[str, Any]) -> dict[str, Any]:
    return {"median_ms": whole["median_ms"] - sum(part["median_ms"] for part in parts)}


def _add_shares(rows: Sequence[dict[str, Any]]) -> None:
    """Set ``share`` of the rows of one step."""
    attend = next((row["median_ms"] for row in rows if row["what"] == "attend"), None)
    for row in rows:
        row["share"] = None if attend is None or attend <= 0 else row["median_ms"] / attend


def _break_even_row(setup: Setup, rows: Sequence[dict[str, Any]], form: Form, impl: str) -> dict[str, Any]:
    """Find the length at which the lines through the steps of swan and of dense cross."""
    d = setup.head_dim
    keep = min(max(round(form[1] * d), 1), d - 1)
    row = setup.row("break-even", impl, form, None, share=None, formula=break_even(d, keep, setup.buffer))
    steps = [row for row in rows if row["what"] == "step" and row["median_ms"] is not None]
    slowest_first = sorted(steps, key=lambda row: -row["median_ms"])
    dense = {row["length"]: row["median_ms"] for row in slowest_first if row["form"] == "dense"}  # the fastest
    lost = [
        (step["length"], step["median_ms"] - dense[step["length"]])
        for step in steps
        if (step["form"], step["retention"], step["impl"]) == (*form, impl) and step["length"] in dense
    ]
    for (a, more), (b, less) in itertools.pairwise(lost):
        if more > 0 >= less:
            return row | {"length": a + (b - a) * more / (more - less)}
    if not lost:
        row["error"] = "nothing was measured"
    elif lost[-1][1] > 0:
        row["error"] = f"dense is still faster at {lost[-1][0]} tokens"
    else:
        row["error"] = f"swan is faster at {lost[0][0]} tokens already"
    return row
