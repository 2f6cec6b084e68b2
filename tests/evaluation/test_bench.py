import json
import time

import pytest
import torch

from swan.evaluation import bench
from swan.evaluation.bench import add_speedups, bench_decode, break_even
from swan.evaluation.machine import TooLong, at_most, last_level_cache, machine, peak_bytes, time_calls, versions

COLUMNS = [
    "what", "impl", "form", "retention", "length", "batch", "dtype", "median_ms", "spread", "bytes",
    "bandwidth_fraction", "error", "speedup", "peak_bytes",
]  # fmt: skip
TINY = {"heads": 4, "kv_heads": 2, "head_dim": 32, "buffer": 16, "device": "cpu", "repeats": 3, "bandwidth": 1e10}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return bench_decode([40, 100], batch=2, impls=["sdpa", "sdpa-gqa", "eager"], **TINY)


def test_rows_follow_the_schema(rows):
    assert len(rows) == 2 * 2 * (2 + len(bench.FORMS))  # lengths, dtypes, dense impls and forms
    for row in rows:
        assert list(row) == COLUMNS
        assert row["what"] == "decode"
        assert (row["form"] == "dense") == (row["impl"] in bench.DENSE)
        assert row["median_ms"] > 0 and row["spread"] >= 0 and row["bandwidth_fraction"] > 0 and row["peak_bytes"] > 0
    json.dumps(rows, allow_nan=False)


def test_results_are_right_and_their_error_is_that_of_the_dtype(rows):
    for row in rows:
        assert 0 < row["error"] < 16 * torch.finfo(getattr(torch, row["dtype"])).eps


def test_bytes_are_what_a_step_reads(rows):
    size = {row["form"]: row["bytes"] for row in rows if row["length"] == 100 and row["dtype"] == "bfloat16"}
    vectors = 2 * 2 * 2  # rows, KV heads, keys and values
    assert size["dense"] == vectors * 100 * 32 * 2
    assert size["leading"] == vectors * (84 * 16 + 16 * 32) * 2


def test_speedup_is_over_the_fastest_dense_row_of_its_length(rows):
    for length in (40, 100):
        same = [row for row in rows if row["length"] == length]
        fastest = min(row["median_ms"] for row in same if row["form"] == "dense")
        assert all(row["speedup"] == fastest / row["median_ms"] for row in same)


def test_speedups_across_calls_keep_batches_apart():
    def row(form, batch, median_ms):
        return {"form": form, "length": 8, "batch": batch, "median_ms": median_ms, "speedup": None}

    rows = [row("dense", 1, 4.0), row("dense", 1, 2.0), row("topk", 1, 1.0), row("topk", 1, None), row("topk", 8, 1.0)]
    add_speedups(rows)
    assert [r["speedup"] for r in rows] == [0.5, 1.0, 2.0, None, None]


def test_what_cannot_run_gives_a_row_with_the_reason():
    impossible, other = bench_decode(
        [40], impls=["eager", "abacus"], forms=[("graded", 0.01)], dtypes=[torch.float32], **TINY
    )
    assert impossible["error"].startswith("ValueError: no plan fits") and impossible["median_ms"] is None
    assert other["error"] == impossible["error"]
    (unknown,) = bench_decode([40], impls=["abacus"], forms=[("topk", 0.5)], dtypes=[torch.float32], **TINY)
    assert "abacus" in unknown["error"] and unknown["median_ms"] is None and unknown["speedup"] is None
    assert list(unknown) == COLUMNS


def test_wrong_results_and_lack_of_memory_are_reasons_too(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("out of memory\nand more lines")

    monkeypatch.setitem(bench.DENSE, "sdpa", no_memory)
    monkeypatch.setitem(bench.DENSE, "sdpa-gqa", lambda q, k, v: 2 * q)
    first, second = bench_decode([40], impls=["sdpa", "sdpa-gqa"], dtypes=[torch.float32], forms=[], **TINY)
    assert first["error"] == "OutOfMemoryError: out of memory"
    assert second["error"].startswith("ArithmeticError: wrong result") and second["median_ms"] is None


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"above the buffer \(16\), got \[100, 16\]"):
        bench_decode([100, 16], **TINY)
    with pytest.raises(ValueError, match="forms are"):
        bench_decode([100], forms=[("ternary", 0.5)], **TINY)


def test_copies_together_do_not_fit_the_cache(monkeypatch):
    monkeypatch.setattr(bench, "last_level_cache", lambda device: 2**20)
    step = bench._random_step(1, 4, 2, 1000, 32, 16, torch.float32, CPU, None)
    each = 2 * 2 * 1000 * 32 * 4
    assert 2 * 2**20 < len(step.copies) * each <= 2 * 2**20 + each
    assert len({k.data_ptr() for k, _ in step.copies}) == len(step.copies)


def test_break_even_is_the_papers():
    assert break_even(128, 64, 128) == 128**2 / 64 + 128
    with pytest.raises(ValueError, match="between 1 and d - 1 = 127, got 128"):
        break_even(128, 128, 0)


def test_machine_and_versions():
    about = machine()
    assert about["cpu"] and about["cores"] >= 1 and about["os"]
    assert (about["gpu"] is None) == (not torch.cuda.is_available())
    assert versions()["torch"] == torch.__version__
    assert last_level_cache("cpu") >= 2**18
    json.dumps([about, versions()], allow_nan=False)


def test_peak_bytes_counts_what_lives_at_once():
    x = torch.zeros(2**16)

    def run():
        y = x
        for _ in range(3):
            y = x + 1  # the last one lives while this is made
        return y.sum()

    assert 2 * x.nbytes <= peak_bytes(run, CPU) < 2 * x.nbytes + 4096


def test_calls_take_their_inputs_in_turn():
    seen: list[int] = []
    times = time_calls(seen.append, [0, 1], CPU, repeats=4, seconds=1.0)
    assert len(times) == 4 and seen == [0, 1, 0, 1, 0, 1, 0]


def test_at_most_interrupts_and_cleans_up():
    with pytest.raises(TooLong, match="the nap took more than 0 s"), at_most(0.05, "the nap"):
        time.sleep(5)
    with at_most(0.05, "nothing"):
        pass
    time.sleep(0.1)


@pytest.mark.slow
def test_compiled_rows():
    rows = bench_decode([40], impls=["flex", "compiled"], dtypes=[torch.float32], **TINY)
    assert [row["impl"] for row in rows] == ["flex"] + ["compiled"] * len(bench.FORMS)
    assert all(row["median_ms"] is not None and row["error"] < 1e-5 for row in rows)
