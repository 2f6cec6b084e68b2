"""Methods that are compared, and how their rows are joined and marked."""

import pytest
import torch

from swan import calibrate
from swan.evaluation.figures import save
from swan.evaluation.frontier import average_seeds, compared, label, mark_frontier, methods, plot_frontier
from swan.evaluation.perplexity import evaluate
from tests.strategies import one_thread  # noqa: F401
from tests.tiny import tiny, tokens


@pytest.fixture(scope="module")
def rows():
    model, ids = tiny(head_dim=32), tokens(2, 150)
    calibration = calibrate(model, [tokens(1, 200)])
    chosen = [m for m in methods(calibration, (0.5, 0.25), buffer=16, seeds=2) if m.basis is not None]
    return evaluate(model, ids, chosen, calibration)


def test_seeds_are_averaged(rows):
    shown = average_seeds(rows)
    random = [row for row in shown if row["form"] == "random-rotation"]
    assert [row["seeds"] for row in random] == [2, 2, 2]
    assert [label(row) for row in random] == [f"random-rotation, {bits} bit" for bits in (4, 3, 2)]
    names = {label(row) for row in shown}
    assert {"block-gtq, K 3 V 2 bit", "block-gtq, 3 bit", "trellis, 2 bit", "kvarn, K 4 V 2 bit", "nvfp4"} <= names
    assert {"snapkv", "snapkv, 4 bit", "kivi, 4 bit"} <= names
    first = [row["kl"] for row in rows if row["form"] == "random-rotation"][:2]
    assert random[0]["kl"] == pytest.approx(sum(first) / 2)
    assert len(shown) == len(rows) - 3


def test_swan_is_scored_in_the_basis_of_the_calibration():
    calibration = calibrate(tiny(head_dim=32), [tokens(1, 200)], "random", seed=3)
    own = [m for m in methods(calibration, (0.5, 0.25), buffer=16, seeds=1) if m.form.startswith("swan")]
    assert {(m.basis, m.seed) for m in own} == {("random", 3)}
    assert {m.form for m in own} == {"swan", "swan, layers alike", "swan topk"}


def test_the_frontier_is_what_nothing_beats(rows):
    shown = average_seeds(rows)
    mark_frontier(shown)
    for row in shown:
        beaten = [r for r in shown if r["retention"] <= row["retention"] and r["kl"] < row["kl"]]
        assert row["frontier"] == (not beaten or row["form"] == "dense")


def test_rivals_are_compared_in_as_many_bytes(rows):
    shown = average_seeds(rows)
    pairs = compared(shown)
    assert len(pairs) == len([row for row in shown if not row["form"].startswith("swan") and row["form"] != "dense"])
    for row in pairs:
        if row["rival_retention"] >= 0.25:
            assert row["retention"] <= row["rival_retention"]
            assert row["ratio"] == row["kl"] / row["rival_kl"]
        if row["enough"] is not None:
            (enough,) = [r for r in shown if r["form"] == "swan" and r["retention"] == row["enough"]]
            assert enough["kl"] <= row["rival_kl"]


def test_of_a_hybrid_model_only_whole_layers_count():
    model = tiny("gemma3")
    calibration = calibrate(model, [tokens(1, 200)])
    for method in methods(calibration, (0.5,), buffer=16, seeds=1):
        plan = getattr(method, "plan", None)
        if plan is not None and method.retention:
            assert [layer is None for layer in plan.layers] == [True, False]


def test_plots(rows, tmp_path):
    shown = average_seeds(rows)
    mark_frontier(shown)
    path = save(plot_frontier(shown, "tiny"), tmp_path / "new" / "frontier.png")
    assert path.stat().st_size > 10_000
    assert torch.is_grad_enabled()
