"""`swan serve`: the command that starts a vLLM server with swan in it, or that server."""

import os
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from swan.cli.common import JsonOption, ModelArgument, check_retention, console, print_json
from swan.evaluation.models import load_config, servable_name
from swan.integrations.transformers.pretrained import saved_calibration
from swan.integrations.vllm.command import serve_command
from swan.integrations.vllm.model import heads_of_config
from swan.integrations.vllm.settings import Settings, load


def serve(
    model: ModelArgument,
    retention: Annotated[
        float, typer.Option(callback=check_retention, help="Bytes of a token over dense ones.")
    ] = 0.26,
    calibration_file: Annotated[Path, typer.Option("--calibration", help="The file of `swan calibrate MODEL`.")] = Path(
        "swan-calibration.safetensors"
    ),
    buffer: Annotated[int, typer.Option(min=1, help="Newest tokens that each query sees dense.")] = 128,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that all queries see dense.")] = 1,
    arguments: Annotated[str, typer.Option(help="Further arguments for vllm serve, as one text.")] = "",
    run: Annotated[bool, typer.Option("--run", help="Start the server instead of printing the command.")] = False,
    json: JsonOption = False,
) -> None:
    """Print the command that serves a model by vLLM with swan in it; --run executes it."""
    if run and json:
        raise typer.BadParameter("--run becomes the server, which prints no JSON object; leave one of both out")
    if run and shutil.which("vllm") is None:
        raise ImportError("there is no vllm to run: pip install 'swan-attention[hf,vllm]'")
    try:
        further = shlex.split(arguments)
    except ValueError as error:
        raise typer.BadParameter(f"--arguments cannot be split into words: {error}") from error
    config = load_config(model)
    heads_of_config(config)
    inside = calibration_file.is_file() and calibration_file.absolute().parent == Path(model).absolute()
    misplaced = calibration_file if inside and calibration_file.suffix == ".safetensors" else saved_calibration(model)
    if misplaced is not None:
        raise ValueError(
            f"{misplaced} lies in the folder of the model, where vLLM would read it as weights; move it out, and name "
            "its place by --calibration"
        )
    if not calibration_file.is_file():
        raise ValueError(
            f"there is no calibration {calibration_file}; make it: swan calibrate {shlex.quote(model)} --out "
            f"{shlex.quote(str(calibration_file))}"
        )
    settings = Settings(str(calibration_file.absolute()), retention, buffer, sinks)
    calibration, plan = load(settings)
    calibration.check_config(config)
    command = serve_command(servable_name(model), settings, further)
    if run:
        os.execvp(command[0], command)
    if json:
        asked = {"model": model, "retention": retention, "buffer": buffer, "sinks": sinks}
        asked["calibration"] = settings.calibration
        return print_json(asked, [{"command": command, "retention": plan.retention}])
    console.print(shlex.join(command), markup=False, highlight=False, soft_wrap=True)
