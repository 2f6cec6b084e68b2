"""`swan frontier`: quality against bytes, swan beside its rivals."""

import functools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from swan.calibration import Plan
from swan.cli.common import (
    CalibrationOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_outputs,
    check_retentions,
    console,
    envelope,
    load,
    print_result,
    write_json,
)
from swan.cli.tables import Columns, Row, number, percent, print_table
from swan.evaluation.baselines import fit_linear_scores
from swan.evaluation.calibrations import calibration_of
from swan.evaluation.dtypes import dtype_name
from swan.evaluation.figures import save
from swan.evaluation.frontier import (
    DEFAULT,
    RETENTIONS,
    average_seeds,
    compared,
    label,
    mark_frontier,
    methods,
    plot_frontier,
)
from swan.evaluation.perplexity import Setting, evaluate
from swan.evaluation.retrieval import evaluate_needles, needle_cases, summarize_needles
from swan.evaluation.texts import calibration_text, evaluation_text, token_windows
from swan.integrations import attached

LINEAR_TOKENS = 8192  # of calibration text that linear scores are fitted on


def frontier(
    model: ModelArgument,
    retention: Annotated[
        list[float] | None,
        typer.Option(callback=check_retentions, help="Retentions of the default plans (repeat it)."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="qasper, squad, or a text file (repeat it).")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 4,
    length: Annotated[int, typer.Option(min=130, help="Tokens of a window.")] = 2048,
    needles: Annotated[int, typer.Option(min=0, help="Needles to find, a multiple of 10; 0 for none.")] = 60,
    needle_retention: Annotated[
        list[float] | None,
        typer.Option(callback=check_retentions, help="Retentions to look for needles at (repeat it); 0.26 by default."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of random rotations.")] = 3,
    buffer: Annotated[int, typer.Option(min=1, help="Recent tokens kept dense.")] = 64,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens kept dense.")] = 4,
    rivals: Annotated[bool, typer.Option(help="Score the rivals too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Short windows, one seed, few needles: minutes.")] = False,
    calibration_file: CalibrationOption = None,
    dtype: DtypeOption = Dtype.auto,
    plot: Annotated[Path | None, typer.Option(help="Image file to draw.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, after each window too.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare default plans with dense, fp8, 2 to 4 bit, top-k, low-rank and token-dropping caches at their bytes."""
    texts, retentions = text or ["qasper", "squad"], retention or list(RETENTIONS)
    if quick:
        windows, length, needles, seeds = 1, 1024, min(needles, 10), 1
        retentions = retention or [0.5, 0.26, 0.15]
    check_outputs(out=out, plot=plot)
    network, tokenizer = load(model, dtype)
    of_texts = [token_windows(evaluation_text(name), tokenizer, windows, length) for name in texts]
    tokens = torch.stack(of_texts, 1).flatten(0, 1)  # in turn: what is written on the way is of all texts
    cases = []
    if needles:
        cases = needle_cases(tokenizer, evaluation_text("qasper"), cases=needles, lengths=(length // 2, length))
    calibration = calibration_of(model, network, tokenizer, path=calibration_file)
    recent: dict[str, Any] = {"buffer": buffer, "sinks": sinks}
    linear = None
    if rivals and length > 2 * buffer:
        batches = token_windows(calibration_text(), tokenizer, max(LINEAR_TOKENS // length, 1), length).split(1)
        linear = fit_linear_scores(network, batches, calibration, buffer=buffer)
    compared_methods = methods(calibration, retentions, seeds=seeds, linear=linear, **recent)
    if not rivals:
        compared_methods = [m for m in compared_methods if m.form == DEFAULT]
    if quick:
        compared_methods = [m for m in compared_methods if m.basis is not None and m.form != "trellis"]  # slow ones
    settings = {"texts": texts, "windows": windows, "length": length, **recent}
    settings |= {"dtype": dtype_name(network.dtype), "calibration": repr(calibration), "layers": _layers(network)}

    def written(scored: list[Row]) -> dict[str, Any]:
        rows = [{"model": model, "text": "+".join(texts), **row} for row in scored]
        mark_frontier(rows)
        result = envelope(settings, rows) | {"needles": []}
        write_json(out, result)
        return result

    result = written(evaluate(network, tokens, compared_methods, calibration, after_window=written))
    plans = [Plan.for_retention(r, calibration, **recent) for r in needle_retention or [0.26]]
    needle_settings = [Setting(), *(Setting(plan, name=DEFAULT) for plan in plans)] if cases else []
    for method in needle_settings:
        with attached(network, None if method.form == "dense" else calibration):
            answers = evaluate_needles(network, cases, functools.partial(method.cache, network))
        row = {"form": method.form, "retention": method.retention}
        result["needles"].append(row | summarize_needles(answers))
        write_json(out, result)
    shown = average_seeds(result["rows"])
    mark_frontier(shown)
    if plot is not None:
        save(plot_frontier(shown, f"{model}, {len(tokens)} windows of {length} tokens"), plot)
    if json:
        return print_result(result)
    sizes = f"{len(tokens)} windows of {length} tokens, buffer {buffer}, sinks {sinks}"
    _print_methods(f"{model} on {' and '.join(texts)}, {sizes}", shown)
    _print_rivals([row for row in compared(shown) if row["ratio"] is not None])
    for row in result["needles"]:
        console.print(f"needles, {row['form']} {number(row['retention'], 2)}: {row['found']} of {row['cases']}")


def _layers(network: Any) -> str:
    """Say which layers are winnowed."""
    kinds = getattr(network.config.get_text_config(decoder=True), "layer_types", None) or []
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    return "all" if len(full) == len(kinds) else ", ".join(map(str, full))


def _print_methods(title: str, rows: list[Row]) -> None:
    columns: Columns = {
        "* frontier": _method,
        "bytes": lambda row: number(row["retention"], 3),
        "cache": lambda row: number(row["compression_bf16"], 3),
        "perplexity, %": lambda row: percent(
            row["perplexity_increase"], 2, unit="", signed=True, error=row["standard_error"]
        ),
        "KL, 1/1000": lambda row: number(row["kl"], 2, scale=1000, error=row["kl_error"]),
        "top-1": lambda row: percent(row["agreement"]),
    }
    print_table(title, columns, sorted(rows, key=lambda row: -row["retention"]))


def _method(row: Row) -> str:
    """Name a method, with a star on the frontier and how many seeds were averaged."""
    return ("* " if row["frontier"] else "  ") + label(row) + ("" if row["seeds"] == 1 else f" x{row['seeds']}")


def _print_rivals(rows: list[Row]) -> None:
    columns: Columns = {
        "rival": lambda row: row["rival"],
        "bytes": lambda row: number(row["rival_retention"], 3),
        "KL": lambda row: number(row["rival_kl"], 2, scale=1000),
        "swan": lambda row: number(row["retention"], 3),
        "its KL": lambda row: number(row["kl"], 2, scale=1000),
        "ratio": lambda row: number(row["ratio"], 2),
        "enough": lambda row: number(row["enough"], 3),
    }
    if rows:
        print_table("Each rival beside the default plan in as many bytes or fewer (KL in 1/1000 nats)", columns, rows)
