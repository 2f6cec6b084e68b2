"""`swan calibrate`: bases of a model, as one safetensors file."""

from pathlib import Path
from typing import Annotated

import typer

from swan.cli.common import (
    BasisName,
    BasisOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_outputs,
    console,
    load,
    print_json,
)
from swan.cli.tables import Columns, number, percent, print_table
from swan.evaluation.calibrations import calibration_of


def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("swan-calibration.safetensors"),
    basis: BasisOption = BasisName.joint,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of text to run.")] = 8192,
    text: Annotated[str, typer.Option(help="python-topics, jargon, or a text file.")] = "python-topics",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Find the bases of a model by running it over some text."""
    check_outputs(out=out)
    network, tokenizer = load(model, dtype)
    calibration = calibration_of(model, network, tokenizer, basis=basis.value, tokens=tokens, text=text)
    calibration.save(out)
    rows = calibration.report()
    if json:
        settings = {"model": model, "basis": basis, "tokens": calibration.tokens, "text": text, "out": str(out)}
        return print_json(settings, rows)
    columns: Columns = {
        "layer": lambda row: number(row["layer"], 0),
        "keys: d/4": lambda row: percent(row["keys_quarter"]),
        "keys: d/2": lambda row: percent(row["keys_half"]),
        "values: d/4": lambda row: percent(row["values_quarter"]),
        "values: d/2": lambda row: percent(row["values_half"]),
    }
    print_table("Share of importance in the leading coordinates", columns, rows)
    console.print(f"{calibration} written to {out}", markup=False)
