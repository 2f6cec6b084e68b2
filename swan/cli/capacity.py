"""`swan capacity`: tokens and requests that fit into the memory of a server."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from swan.calibration import Calibration, Plan
from swan.cli.common import JsonOption, ModelArgument, check_retentions, check_size, console, print_json
from swan.cli.tables import Columns, mebibytes, number, print_table
from swan.evaluation.models import load_config
from swan.integrations.sizes import byte_count, token_count
from swan.integrations.vllm.capacity import dense_capacity, packed_capacity
from swan.integrations.vllm.model import heads_of_config

RETENTIONS = (0.5, 0.33, 0.26, 0.2)


def check_length(length: str) -> str:
    """Raise an error of usage if text is no number of tokens."""
    try:
        token_count(length)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return length


def capacity(
    model: ModelArgument,
    memory: Annotated[
        str, typer.Option(callback=check_size, help="Memory for the cache in each process, such as 64GiB.")
    ] = "16GiB",
    length: Annotated[str, typer.Option(callback=check_length, help="Tokens of a request, such as 128k.")] = "16k",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Processes that share the heads.")] = 1,
    retention: Annotated[
        list[float] | None,
        typer.Option(callback=check_retentions, help="Retentions (repeat it); some if none is given."),
    ] = None,
    buffer: Annotated[int, typer.Option(min=1, help="Newest tokens that each query sees dense.")] = 128,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that all queries see dense.")] = 1,
    batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the server computes in a step.")] = 2048,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a block, a multiple of 64.")] = 128,
    calibration_file: Annotated[
        Path | None,
        typer.Option("--calibration", help="A file of `swan calibrate`, whose plans layers share unequally."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Count tokens and requests that fit into a server's memory, its dense cache beside packed ones."""
    if block_tokens % 64:
        raise typer.BadParameter(f"a block has a multiple of 64 tokens, got {block_tokens}")
    config = load_config(model)
    heads = heads_of_config(config)
    kv_heads, tokens, size = heads.of_rank(tensor_parallel), token_count(length), byte_count(memory)
    calibration = None if calibration_file is None else Calibration.load(calibration_file)
    if calibration is not None:
        calibration.check_config(config)
    common: dict[str, Any] = {"kv_heads": kv_heads, "block_tokens": block_tokens}
    dense = dense_capacity(heads.dims, size, tokens, **common)
    rows = [_row("dense", 1.0, dense, dense)]
    for each in retention or RETENTIONS:
        try:
            recent = {"buffer": buffer, "sinks": sinks}
            plan = Plan.for_retention(each, calibration, dims=heads.dims, **recent, by_head=False)
        except ValueError:  # too few bytes for these head dimensions: an error only where it was asked for
            if retention:
                raise
            continue
        found = packed_capacity(plan, size, tokens, batched_tokens=batched_tokens, **common)
        rows.append(_row("graded", plan.retention, found, dense))
    if json:
        asked = {
            "model": model,
            "memory": size,
            "length": tokens,
            "tensor_parallel": tensor_parallel,
            "buffer": buffer,
            "sinks": sinks,
        }
        asked |= {"batched_tokens": batched_tokens, "kv_heads": kv_heads, "layers": len(heads.dims)}
        return print_json(asked, rows)
    columns: Columns = {
        "cache": lambda row: "dense" if row["form"] == "dense" else f"graded {number(row['retention'], 2)}",
        "KiB a token": lambda row: number(row["token_bytes"], 2, scale=2**-10),
        "window MiB": lambda row: mebibytes(row["window_bytes"], unit=""),
        "blocks": lambda row: number(row["blocks"], 0),
        "tokens": lambda row: number(row["tokens"], 0),
        "requests": lambda row: number(row["requests"], 1),
        "times dense": lambda row: number(row["gain"], 2),
        "vLLM's log": lambda row: number(row["reserved_requests"], 1),
    }
    processes = "" if tensor_parallel == 1 else f", in each of {tensor_parallel} processes"
    print_table(f"{model}: requests of {tokens} tokens in {memory}{processes}", columns, rows)
    console.print(f"blocks of {block_tokens} tokens; requests: answered at once, each with its window")
    console.print("vLLM's log: the same with pages for a whole step in each window, which vLLM prints at its start")


def _row(form: str, retention: float, found: Any, dense: Any) -> dict[str, Any]:
    gain = found.requests / dense.requests if dense.requests else None
    return {"form": form, "retention": retention, **dataclasses.asdict(found), "gain": gain}
