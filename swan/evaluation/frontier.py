"""Quality against bytes: swan's plans and their rivals, scored on the same tokens."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor

from swan.calibration import Calibration, Plan
from swan.evaluation.baselines import rivals
from swan.evaluation.figures import finish
from swan.evaluation.perplexity import Method, Setting
from swan.storage import LayerPlan, TopK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "DEFAULT",
    "KEPT",
    "RETENTIONS",
    "average_seeds",
    "compared",
    "fewer_tokens",
    "label",
    "mark_frontier",
    "methods",
    "plot_frontier",
]

RETENTIONS = (0.5, 0.33, 0.26, 0.2, 0.15, 0.1)
ALIKE = 0.2  # the least of them at which plans without effects are shown
KEPT = 0.18  # retention of the tokens that stay, where a retention is below it
NEAR = 0.985  # share of a rival's bytes from which on a default plan counts as one of as many
DEFAULT = "swan"  # form of the rows of swan's default plans
BY_BITS = ("random-rotation", "trellis", "block-gtq")  # forms of rows whose layouts differ by their bits
SCORES = ("perplexity", "perplexity_increase", "kl", "agreement")


def methods(
    calibration: Calibration,
    retentions: Sequence[float] = RETENTIONS,
    *,
    buffer: int = 64,
    sinks: int = 4,
    seeds: int = 3,
    linear: tuple[Tensor | None, ...] | None = None,
) -> list[Method]:
    """Collect the methods of `swan frontier`: default plans, fewer tokens, no effects, the paper's form, rivals.

    Args:
        calibration: of the model.
        retentions: of the default plans, which are scored at the bytes of each rival too.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.
        seeds: how many rotations a random one is drawn.
        linear: weights of linear scores, as in `rivals`.
    """
    dims = calibration.dims
    recent: dict[str, Any] = {"buffer": buffer, "sinks": sinks}
    winnowed = [layer is not None for layer in Plan.for_retention(1.0, calibration).layers]

    def everywhere(plan: Plan) -> Plan:
        """Empty a plan's entries of layers with a sliding window, so that its retention counts the others."""
        layers = [layer if used else None for layer, used in zip(plan.layers, winnowed, strict=True)]
        return Plan(tuple(layers), buffer=plan.buffer, sinks=plan.sinks)

    own = partial(Setting, basis=calibration.basis, seed=calibration.seed)
    others: list[Method] = []
    for r in retentions:
        if r < KEPT:
            others.append(own(fewer_tokens(r, calibration, **recent), name="swan, tokens kept"))
    for r in (r for r in retentions[1::2] if r >= ALIKE):
        others.append(own(everywhere(Plan.for_retention(r, dims=dims, **recent)), name="swan, layers alike"))
    topk = [LayerPlan(TopK(d, d // 2), TopK(dv, dv // 2)) for d, dv in dims]
    others.append(own(everywhere(Plan(tuple(topk), **recent)), name="swan topk"))
    for rival in rivals(calibration, seeds=seeds, linear=linear, **recent):
        if isinstance(rival, Setting) and rival.plan is not None:
            others.append(Setting(everywhere(rival.plan), rival.basis, rival.seed, rival.name))
        elif rival.basis is not None or all(winnowed):  # transformers quantizes models without sliding layers only
            others.append(rival)
    plans = [Plan.for_retention(r, calibration, **recent) for r in retentions]
    sizes = {method.retention for method in others if not method.form.startswith(DEFAULT)}
    for r in sorted(r for r in sizes if r >= min(retentions)):
        if not any(NEAR * r <= plan.retention <= r for plan in plans):
            plans.append(Plan.for_retention(r, calibration, **recent))
    distinct = sorted(dict.fromkeys(plans), key=lambda plan: -plan.retention)
    return [*(own(plan, name=DEFAULT) for plan in distinct), *others]


def fewer_tokens(share: float, calibration: Calibration, *, buffer: int, sinks: int) -> Plan:
    """Make the plan that stores tokens at a retention of `KEPT`, and keeps so many that the history has a share."""
    plan = Plan.for_retention(KEPT, calibration, buffer=buffer, sinks=sinks, keep=1.0)
    return replace(plan, keep=share / plan.share)


def average_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join rows that differ by their seed alone, with their number as ``seeds``.

    The error of the mean is that over texts and that over seeds together.
    """

    def key(row: dict[str, Any]) -> str:
        settings = {name: value for name, value in row["settings"].items() if name != "seed"}
        return json.dumps([row["form"], row["retention"], settings], default=str)

    averages = []
    for _, group in groupby(rows, key):
        same = list(group)
        row = {**same[0], "seeds": len(same)}
        if len(same) > 1:
            row |= {name: statistics.fmean(r[name] for r in same) for name in SCORES}
            for name, error in (("kl", "kl_error"), ("perplexity_increase", "standard_error")):
                texts = statistics.fmean(r[error] or 0.0 for r in same)
                row[error] = (texts**2 + statistics.variance(r[name] for r in same) / len(same)) ** 0.5
        averages.append(row)
    return averages


def mark_frontier(rows: Sequence[dict[str, Any]]) -> None:
    """Set ``frontier`` in each row: no other row has a lower KL divergence in as many bytes or fewer."""
    for row in rows:
        better = (r for r in rows if r["retention"] <= row["retention"] and r["kl"] < row["kl"])
        row["frontier"] = row["form"] == "dense" or next(better, None) is None


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each rival with the best default plan in as many bytes or fewer.

    Returns:
        By falling bytes, rows with ``rival``, ``rival_retention``, ``rival_kl``, ``rival_kl_error``; of the default
        plan ``retention``, ``kl``, ``kl_error``; ``ratio`` of the two divergences; and ``enough``: the least
        retention at which a default plan was measured to have no higher divergence. None where there is no such plan.
    """
    defaults = [row for row in rows if row["form"] == DEFAULT]
    rival_rows = [row for row in rows if not row["form"].startswith(DEFAULT) and row["form"] != "dense"]
    pairs = []
    for rival in sorted(rival_rows, key=lambda row: -row["retention"]):
        within = [row for row in defaults if row["retention"] <= rival["retention"]]
        best = min(within, key=lambda row: row["kl"], default=None)
        pairs.append(
            {
                "rival": label(rival),
                "rival_retention": rival["retention"],
                "rival_kl": rival["kl"],
                "rival_kl_error": rival["kl_error"],
                "retention": None if best is None else best["retention"],
                "kl": None if best is None else best["kl"],
                "kl_error": None if best is None else best["kl_error"],
                "ratio": None if best is None else best["kl"] / rival["kl"],
                "enough": min((row["retention"] for row in defaults if row["kl"] <= rival["kl"]), default=None),
            }
        )
    return pairs


def label(row: dict[str, Any]) -> str:
    """Name the method of a row, with its bits."""
    settings, bits = row["settings"], row["settings"].get("bits")
    if row["form"] in BY_BITS:
        keys, values = (f"{settings[side]['bits']:g}" for side in ("keys", "values"))
        bits = keys if keys == values else f"K {keys} V {values}"
    return row["form"] if bits is None else f"{row['form']}, {bits} bit"


def plot_frontier(rows: Sequence[dict[str, Any]], title: str) -> "Figure":
    """Draw KL divergence against retention, the default plans as a thick line.

    Args:
        rows: averaged over seeds, with what is on the frontier marked.
        title: of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    shown = [row for row in rows if row["form"] != "dense" and row["retention"] > 0]
    for form in dict.fromkeys(row["form"] for row in shown):
        points = sorted((r["retention"], r["kl"], r["kl_error"] or 0.0) for r in shown if r["form"] == form)
        x, y, error = zip(*points, strict=True)
        is_swan = form == DEFAULT
        thin, thick = {"linewidth": 0.9, "alpha": 0.85}, {"color": "#4c6ef5", "linewidth": 2.2, "zorder": 3}
        style: Any = thick if is_swan else thin
        axes.errorbar(x, y, yerr=error, marker="o" if is_swan else "s", markersize=5, label=form, capsize=2, **style)
    marked = [row for row in shown if row["frontier"]]
    x, y = [row["retention"] for row in marked], [row["kl"] for row in marked]
    axes.scatter(x, y, s=110, facecolors="none", edgecolors="#e8590c", label="frontier", zorder=4)
    axes.set(
        yscale="log", xlabel="retention: bytes of the history over bf16", ylabel="KL from dense, nats", title=title
    )
    finish(figure)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # points are everywhere
    return figure
