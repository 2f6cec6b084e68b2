"""Benchmarks of one layer: a step in its parts, a prompt, and the batch that fits a memory."""

import dataclasses
import json

import pytest
import torch

from swan.evaluation.bench import Setup, bench_capacity, bench_prefill, bench_step, break_even, step
from swan.evaluation.bench.common import COLUMNS

SETUP = Setup(
    heads=4, kv_heads=2, head_dim=32, buffer=16, dtype=torch.float32, device=torch.device("cpu"), repeats=3
)  # fmt: skip
FORM = [("topk", 0.5)]


def check(rows: list[dict], *extra: str) -> None:
    for row in rows:
        assert list(row) == [*COLUMNS, *extra]
        assert row["median_ms"] is None or row["spread"] is None or (row["median_ms"] > 0 and row["spread"] >= 0)
    json.dumps(rows, allow_nan=False)


def test_a_step_is_its_parts():
    rows = bench_step([100, 40], SETUP, forms=FORM, impls=["eager"])
    check(rows, "share", "formula")
    parts = ["rotate", "update", "attend", "rest", "step"]
    assert [(row["what"], row["length"]) for row in rows[:-1]] == [
        ("step", 40), ("step", 100), *((part, 40) for part in parts), *((part, 100) for part in parts)
    ]  # fmt: skip
    by_part = {row["what"]: row for row in rows if row["length"] == 40 and row["form"] == "topk"}
    assert sum(by_part[part]["median_ms"] for part in parts[:-1]) == pytest.approx(by_part["step"]["median_ms"])
    assert by_part["attend"]["share"] == 1
    assert by_part["step"]["share"] == by_part["step"]["median_ms"] / by_part["attend"]["median_ms"]
    assert by_part["step"]["error"] < 1e-5
    assert by_part["step"]["speedup"] == rows[0]["median_ms"] / by_part["step"]["median_ms"]


def test_a_step_that_cannot_run_has_the_reason():
    dense, row, even = bench_step([40], SETUP, forms=[("graded", 0.01)], impls=["eager"])
    check([dense, row, even], "share", "formula")
    assert row["error"].startswith("ValueError: no plan fits") and row["median_ms"] is None
    assert even["error"] == "nothing was measured"
    with pytest.raises(ValueError, match=r"above buffer and sinks \(20\)"):
        bench_step([20], SETUP)
    with pytest.raises(ValueError, match="impls of eager, compiled"):
        bench_step([40], SETUP, impls=["sdpa"])


@pytest.mark.parametrize(
    ("swan", "length", "reason"),
    [
        ([3, 3, 3], 200.0, None),  # dense takes 1, 2 and 4 ms
        ([2, 2, 2], 150.0, None),
        ([1, 1, 1], None, "swan is faster at 100 tokens already"),
        ([5, 5, 5], None, "dense is still faster at 300 tokens"),
    ],
)
def test_the_measured_break_even(monkeypatch, swan, length, reason):
    times = dict(zip([100, 200, 300], zip([1, 2, 4], swan, strict=True), strict=True))
    monkeypatch.setattr(step, "_dense", lambda setup, n, impl: ({"median_ms": times[n][0]}, {}))
    monkeypatch.setitem(step._STEPS, "eager", lambda setup, layer, n: ({"median_ms": times[n][1]}, {}))
    row = bench_step([100, 200, 300], SETUP, forms=FORM, impls=["eager"])[-1]
    assert row["what"] == "break-even" and row["error"] == reason
    assert row["formula"] == break_even(32, 16, 16)
    expected = {200.0: 250.0, 150.0: 200.0}.get(length)
    assert row["length"] == expected


def test_break_even_is_the_papers():
    assert break_even(128, 64, 128) == 128**2 / 64 + 128
    with pytest.raises(ValueError, match="between 1 and d - 1 = 127, got 128"):
        break_even(128, 128, 0)


def test_caches_have_room_for_the_calls_of_a_row():
    setup = dataclasses.replace(SETUP, repeats=9)
    for static in (False, True):
        caches = step.filled(setup, setup.plan_layer(*FORM[0]), 60, static=static)
        assert all(cache.length == 60 and cache.history_length == 60 - 20 for cache in caches)
        if static:
            assert len(caches) * (caches[0].max_length - 60) >= setup.repeats + 4


def test_a_prompt():
    rows = bench_prefill([80], SETUP, forms=FORM)
    check(rows)
    dense, *swan = rows
    assert (dense["impl"], dense["speedup"]) == ("sdpa", 1.0)
    assert dense["bytes"] == 2 * 2 * 80 * 32 * 4
    assert [row["impl"] for row in swan] == ["chunk", "windowed"]
    for row in swan:
        assert row["error"] < 1e-5 and row["peak_bytes"] > dense["peak_bytes"] > 0
    for row in bench_prefill([80], SETUP, forms=[("graded", 0.01)])[1:]:
        assert row["error"].startswith("ValueError: no plan fits")


def test_the_batch_fills_the_memory():
    setup = dataclasses.replace(SETUP, dtype=torch.bfloat16)
    rows = bench_capacity(2**17, [100, 4000], setup, forms=FORM, impl="tiles", bandwidth=1e10)
    check(rows, "tokens_per_second")
    dense, swan, *too_long = rows
    for row in (dense, swan):
        assert 2**17 - row["bytes"] / row["batch"] < row["bytes"] <= 2**17
        assert row["tokens_per_second"] == row["batch"] / row["median_ms"] * 1e3
        assert row["speedup"] == row["tokens_per_second"] / dense["tokens_per_second"]
    assert swan["batch"] > dense["batch"] > 1
    for row in too_long:
        assert row["batch"] is None and row["error"].startswith("ValueError: one sequence takes")
    with pytest.raises(ValueError, match="above the buffer"):
        bench_capacity(2**17, [16], SETUP)


@pytest.mark.slow
def test_a_compiled_step():
    torch.use_deterministic_algorithms(False)  # inductor's code does not know NaN filling (tests/conftest.py)
    # Not topk: fused, its codes are of the scale before it is rounded to bfloat16.
    rows = bench_step([40], SETUP, forms=[("leading", 0.5), ("graded", 0.27)], impls=["compiled"])
    check(rows, "share", "formula")
    parts = ["rotate+update", "attend", "step"]
    assert [row["what"] for row in rows] == ["step", *parts, *parts, *["break-even"] * 2]
    assert rows[3]["error"] < 1e-5
    assert rows[6]["error"] < 4 * 2.0**-15  # queries and weights, which the kernel rounds to 15 bits (AVX2)
