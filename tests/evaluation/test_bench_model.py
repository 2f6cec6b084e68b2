"""Generation of a tiny model on each kind of cache."""

import json

import pytest
import torch
from transformers import DynamicCache

from swan.evaluation.bench import bench_model, model
from swan.evaluation.bench.common import COLUMNS
from swan.integrations.transformers import is_attached
from tests.tiny import calibration_of, tiny


def rows_of(network, **options) -> list[dict]:
    prompt = torch.arange(2, 82).view(2, 40)
    rows = bench_model(network, prompt, calibration_of(network), buffer=16, tokens=3, retentions=[0.5], **options)
    for row in rows:
        assert list(row) == [*COLUMNS, "prefill_seconds", "tokens_per_second", "agreement", "growth", "growth_counted"]
        assert (row["what"], row["length"], row["batch"], row["dtype"]) == ("model", 40, 2, "float32")
    json.dumps(rows, allow_nan=False)
    assert not is_attached(network)
    return rows


def test_eager_rows():
    rows = rows_of(tiny(), impls=["eager"], quantized=False)
    dense, everything, half = rows
    assert [(row["form"], row["retention"]) for row in rows] == [("dense", 1.0), ("graded", 1.0), ("graded", 0.5)]
    assert dense["error"] == 0 and dense["agreement"] == everything["agreement"] == 1
    assert everything["error"] < 1e-5 < half["error"]
    assert half["bytes"] < everything["bytes"]
    for row in rows:
        assert row["median_ms"] > 0 and row["prefill_seconds"] > 0 and row["tokens_per_second"] > 0
        assert row["speedup"] == dense["median_ms"] / row["median_ms"]


def test_the_dense_row_is_there_whatever_is_asked_for(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    dense, *others = rows_of(tiny(), impls=["compiled"])
    assert (dense["form"], dense["impl"]) == ("dense", "eager") and dense["median_ms"] > 0
    assert [row["form"] for row in others] == ["dense", "graded", "graded"]
    assert all(row["error"] == "RuntimeError: no compiler" and row["median_ms"] is None for row in others)


def test_wrong_logits_are_a_reason(monkeypatch):
    monkeypatch.setattr(model._Generation, "run", _nonsense(model._Generation.run))
    rows = rows_of(tiny(), impls=["eager"], quantized=False)
    assert [row["error"] for row in rows[1:]] == ["ArithmeticError: wrong result: the logits are not finite"] * 2


def _nonsense(run):
    def run_wrong(self, rival, forced):
        measured, chosen, logits = run(self, rival, forced)
        return measured, chosen, logits if rival.form == "dense" else logits * torch.nan

    return run_wrong


def test_settings_are_checked():
    network = tiny()
    with pytest.raises(ValueError, match=r"token ids are integers \[rows, tokens\]"):
        bench_model(network, torch.arange(4), calibration_of(network))
    with pytest.raises(ValueError, match=r"impls of eager, compiled, got .*'sdpa'"):
        bench_model(network, torch.ones(1, 4, dtype=torch.long), calibration_of(network), impls=["sdpa"])


def test_bytes_of_a_cache_are_those_of_its_storages():
    cache = DynamicCache()
    whole = torch.zeros(1, 2, 10, 4)
    cache.update(whole[:, :, :3], torch.zeros(1, 2, 3, 4), 0)
    cache.layers[0].keys = whole[:, :, :3]
    assert model.cache_nbytes(cache) == 4 * (2 * 10 * 4 + 2 * 3 * 4)


@pytest.mark.slow
def test_compiled_and_quantized_rows():
    torch.use_deterministic_algorithms(False)  # inductor's code does not know NaN filling (tests/conftest.py)
    rows = [row for row in rows_of(tiny(num_hidden_layers=1)) if row["form"] != "quanto"]
    assert [(row["impl"], row["form"]) for row in rows] == [
        ("eager", "dense"), ("compiled", "dense"), *[("eager", "graded")] * 2, *[("compiled", "graded")] * 2
    ]  # fmt: skip
    assert all(row["error"] < 1e-5 for row in rows if row["retention"] == 1)
    assert all(row["median_ms"] is not None for row in rows)
