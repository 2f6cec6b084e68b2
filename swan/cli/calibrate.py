"""`swan calibrate`: bases of a model, as one safetensors file."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from swan.calibration import Calibration, Plan
from swan.cli.common import (
    BasisName,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_outputs,
    console,
    envelope,
    load,
    messages,
    print_result,
)
from swan.cli.tables import Columns, Row, number, percent, print_table
from swan.evaluation.calibrations import TOKENS, calibrated
from swan.evaluation.frontier import RETENTIONS
from swan.evaluation.texts import CALIBRATION_TEXT

MUCH = 0.02  # nats of predicted KL divergence: perplexity rises by some 5 % or more


def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("swan-calibration.safetensors"),
    basis: Annotated[BasisName, typer.Option(help="Basis of the rotation.")] = BasisName.joint,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of text to run.")] = TOKENS,
    positions: Annotated[
        int | None, typer.Option(min=1, help="Positions to spread texts over; 8192 or what the model knows.")
    ] = None,
    text: Annotated[str, typer.Option(help="mixed, python-topics, jargon, or a text file.")] = CALIBRATION_TEXT,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Find the bases of a model by running it over some text."""
    check_outputs(out=out)
    network, tokenizer = load(model, dtype)
    calibration = calibrated(model, network, tokenizer, basis.value, tokens=tokens, text=text, positions=positions)
    calibration.save(out)
    rows, plans = calibration.report(), _predictions(calibration)
    _warn(plans)
    if json:
        asked = {"model": model, "basis": basis, "tokens": calibration.tokens, "positions": positions, "text": text}
        settings = asked | {"out": str(out)}
        return print_result(envelope(settings, rows) | {"plans": plans})
    columns: Columns = {
        "layer": lambda row: number(row["layer"], 0),
        "keys: d/4": lambda row: percent(row["keys_quarter"]),
        "keys: d/2": lambda row: percent(row["keys_half"]),
        "values: d/4": lambda row: percent(row["values_quarter"]),
        "values: d/2": lambda row: percent(row["values_half"]),
    }
    print_table("Share of importance in the leading coordinates", columns, rows)
    if plans:
        columns = {
            "retention": lambda row: number(row["retention"], 2),
            "KL at least, 1/1000": lambda row: number(row["predicted_kl"], 2, scale=1000),
            "most of it": _most,
        }
        print_table("What plans are predicted to cost", columns, plans)
    console.print(f"{calibration} written to {out}", markup=False)


def _predictions(calibration: Calibration) -> list[Row]:
    """Predict the KL divergence at each retention for which there is a plan, and what adds most to it."""
    rows = []
    if calibration.effects is None:
        return rows
    for retention in RETENTIONS:
        try:
            plan = Plan.for_retention(retention, calibration)
        except ValueError:  # too few bytes for these head dimensions
            continue
        added = plan.predicted_kl(calibration).nan_to_num(0.0)
        total = added.sum().item()
        layer, head, side = (int(n) for n in torch.unravel_index(added.argmax(), added.shape))
        share = added.max().item() / total if total else None
        row = {"predicted_kl": total, "layer": layer, "kv_head": head, "side": ("keys", "values")[side], "share": share}
        rows.append({"retention": retention} | row)
    return rows


def _most(row: Row) -> str:
    return f"{row['side']} of layer {row['layer']}, KV head {row['kv_head']}, {percent(row['share'], 0)}"


def _warn(plans: list[Row]) -> None:
    """Say from which retention down plans will not hold."""
    for row in plans:
        if row["predicted_kl"] > MUCH:
            text = (
                f"plans will not hold at a retention of {row['retention']} and below: a KL divergence of "
                f"{row['predicted_kl']:.3f} nats or more is predicted, most of it by {_most(row)}; `swan evaluate` "
                "measures it"
            )
            return messages.print(text, markup=False, highlight=False, soft_wrap=True)
