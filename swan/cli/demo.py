"""`swan demo`: the whole path on a small real model."""

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from swan.calibration import Plan
from swan.cli.common import Dtype, DtypeOption, JsonOption, check_outputs, console, load, print_json
from swan.cli.generate import encode, stream
from swan.cli.tables import Columns, Row, mebibytes, number, percent, print_table
from swan.evaluation.calibrations import TOKENS, calibration_of
from swan.evaluation.dtypes import dtype_name
from swan.evaluation.figures import save
from swan.evaluation.perplexity import Setting
from swan.evaluation.perplexity import evaluate as evaluate_settings
from swan.evaluation.texts import evaluation_text, token_windows
from swan.integrations import attached

RETENTIONS = (0.5, 0.33, 0.25)
PLOT = "swan-demo.png"
QUESTION = "Here is the beginning of a paper. In a few sentences: what is it about, and what does it find?\n\n"


def demo(
    model: Annotated[str, typer.Option(help="As in `swan generate`.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate each time.")] = 64,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 1024 tokens to score.")] = 4,
    dtype: DtypeOption = Dtype.auto,
    out: Annotated[Path, typer.Option(help="Folder of the plot.")] = Path(),
    json: JsonOption = False,
) -> None:
    """Calibrate a model, generate with less and less cache, and measure what it costs."""
    show = not json
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        check_outputs(plot=out / PLOT)
    begun = time.perf_counter()
    with _step(show, f"loading {model}"):
        network, tokenizer = load(model, dtype)
    with _step(show, f"calibrating on {TOKENS} tokens of English"):
        calibration = calibration_of(model, network, tokenizer)
    with _step(show, "reading research papers"):
        text = evaluation_text("qasper")
        inputs = encode(tokenizer, QUESTION + text[:6000])
    rows = [_generate(network, tokenizer, inputs, calibration, r, tokens, show) for r in (None, *RETENTIONS)]
    plans = [Plan.for_retention(r, calibration) for r in RETENTIONS]
    with _step(show, f"scoring {windows} windows of 1024 tokens of the papers, as if decoded token by token"):
        scored = evaluate_settings(
            network, token_windows(text, tokenizer, windows, 1024), [Setting(p) for p in plans], calibration
        )
    rows = [row | {k: s[k] for k in SCORES} for row, s in zip(rows, scored, strict=True)]
    plot = str(_plot(rows, out / PLOT)) if drawn else "none without matplotlib: pip install 'swan-attention[plot]'"
    if json:
        settings = {"model": model, "dtype": dtype_name(network.dtype), "tokens": tokens, "windows": windows}
        return print_json(settings, rows)
    columns: Columns = {
        "retention": _name,
        "bytes": lambda row: mebibytes(row["nbytes"]),
        "of dense": lambda row: number(row["compression"], 2),
        "tokens/s": lambda row: number(row["tokens_per_second"], 1),
        "perplexity": lambda row: number(row["perplexity"], 2),
        "increase": lambda row: percent(row["perplexity_increase"], 2, signed=True),
        "agree": lambda row: percent(row["agreement"]),
    }
    title = f"{model}, {dtype_name(network.dtype)}, prompt of {inputs.shape[1]} tokens and {tokens} generated"
    print_table(title, columns, rows)
    console.print(
        f"of dense: of the bytes of a dense {dtype_name(network.dtype)} cache; buffer of 128 recent tokens and 4 sinks "
        "included. agree: the same likeliest next token.\n"
        f"plot: {escape(plot)}    took {time.perf_counter() - begun:.0f} s"
    )


SCORES = ("perplexity", "perplexity_increase", "standard_error", "kl", "agreement")


def _generate(
    model: Any, tokenizer: Any, inputs: Any, calibration: Any, retention: float | None, tokens: int, show: bool
) -> Row:
    """Generate once, on the dense cache if there is no retention."""
    from transformers import DynamicCache

    from swan.integrations.transformers import SwanCache

    what = "on the dense cache" if retention is None else f"on a cache of retention {retention}"
    inputs = inputs.to(model.device)
    with (
        _step(show, f"generating {tokens} tokens {what}"),
        attached(model, None if retention is None else calibration),
    ):
        dense = DynamicCache(config=model.config)
        cache = dense if retention is None else SwanCache(model, retention=retention)
        row = stream(model, tokenizer, inputs, cache, tokens, show=show)
    form = {"form": "dense", "retention": 1.0} if retention is None else {"form": "graded", "retention": retention}
    return form | row


def _name(row: Row) -> str:
    return "dense" if row["form"] == "dense" else f"{row['retention']}"


def _plot(rows: list[Row], path: Path) -> Path:
    """Draw the bytes of the caches and the perplexity increase, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = [_name(row) for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colors = ["#9aa0a6"] + ["#3f51b5"] * (len(rows) - 1)
    bars = left.bar(labels, [row["nbytes"] / 2**20 for row in rows], color=colors)
    left.bar_label(bars, [number(row["compression"], 2) for row in rows])
    left.set(title="Cache after generating", ylabel="MiB", xlabel="retention")
    increase = [100 * row["perplexity_increase"] for row in rows]
    bars = right.bar(labels, increase, color=colors, yerr=[100 * (row["standard_error"] or 0) for row in rows])
    right.bar_label(bars, [f"{percent(row['agreement'], 0)} agree" for row in rows])
    right.set(title="Perplexity above dense", ylabel="%", xlabel="retention")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    plt.close(figure)
    return save(figure, path)


@contextlib.contextmanager
def _step(show: bool, what: str) -> Iterator[None]:
    """Say that a step begins, and how long it took."""
    begun = time.perf_counter()
    if show:
        console.print(f"\n[bold]{escape(what)}[/]", highlight=False)
    yield
    if show:
        console.print(f"[dim]{time.perf_counter() - begun:.1f} s[/]", highlight=False)
