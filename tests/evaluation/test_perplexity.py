"""Scores of caches against the dense one, on a tiny model and on SmolLM2."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swan import Graded, LayerPlan, Plan, calibrate
from swan.evaluation.perplexity import CHUNK, Setting, _standard_error, default_sweep, evaluate

FULL = Graded(((16, 16),))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    windows = torch.randint(64, (2, CHUNK + 37))
    return model, windows, calibrate(model, [windows])


def test_dense_row_is_the_model_itself(tiny):
    model, windows, calibration = tiny
    (row,) = evaluate(model, windows, [Setting()], calibration)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert row["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert (row["form"], row["kl"], row["agreement"], row["perplexity_increase"]) == ("dense", 0, 1, 0)


def test_everything_kept_equals_dense(tiny):
    model, windows, calibration = tiny
    plan = Plan((LayerPlan(FULL, FULL),) * 2, buffer=16)
    _, row = evaluate(model, windows, [Setting(plan)], calibration)
    assert abs(row["perplexity_increase"]) < 1e-5
    assert abs(row["kl"]) < 1e-6
    assert row["agreement"] > 0.999
    assert row["retention"] == 1


def test_fewer_bytes_cost_more(tiny):
    model, windows, calibration = tiny
    plans = [Plan((LayerPlan(Graded(((16, b),)), Graded(((16, b),))),) * 2, buffer=16) for b in (8, 4, 1)]
    rows = evaluate(model, windows, [Setting(plan) for plan in plans], calibration)
    kl = [row["kl"] for row in rows]
    assert kl == sorted(kl)
    assert all(0 < row["compression"] < 1 for row in rows[1:])
    assert {row["form"] for row in rows[1:]} == {"graded"}
    assert model.config._attn_implementation == "sdpa"  # the model is left as it was


def test_default_sweep_has_the_controls():
    sweep = default_sweep([(64, 64)] * 3)
    assert {setting.form for setting in sweep} == {"dense", "window", "topk", "graded"}
    assert {setting.basis for setting in sweep} == {"joint", "pca", "random", "identity"}
    assert {setting.plan.sinks for setting in sweep if setting.plan} == {0, 4}


def test_needs_two_tokens(tiny):
    model, windows, calibration = tiny
    with pytest.raises(ValueError, match="at least two tokens, got \\[2, 1\\]"):
        evaluate(model, windows[:, :1], [Setting()], calibration)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_window_that_is_not_finite_has_no_standard_error(bad):
    """`swan frontier` once ended there after its last window, before it wrote that."""
    assert math.isnan(_standard_error([0.1, bad, 0.2], 2.0))
    assert _standard_error([0.1, 0.3], 2.0) == pytest.approx(0.2)
    assert _standard_error([0.1], 2.0) is None
