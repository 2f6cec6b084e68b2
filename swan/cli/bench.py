"""`swan bench`: timings against the strongest dense attention."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from swan.cli.common import (
    CalibrationOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_outputs,
    check_retentions,
    check_size,
    console,
    envelope,
    layer_dtype,
    load,
    print_json,
    write_json,
)
from swan.cli.tables import Columns, Row, mebibytes, milliseconds, number, percent, print_table, ratio
from swan.evaluation import bench as benchmarks
from swan.evaluation.bench import FORMS, IMPLS, SHAPES, Setup
from swan.evaluation.bench.common import instructions
from swan.evaluation.calibrations import calibration_of
from swan.evaluation.dtypes import dtype_name
from swan.evaluation.figures import save
from swan.evaluation.machine import memory_bandwidth
from swan.evaluation.texts import evaluation_text, token_windows
from swan.integrations.sizes import byte_count
from swan.storage.layout import MAX_DIM

bench = typer.Typer(help="Timings against the strongest dense attention.", no_args_is_help=True)

Form = tuple[str, float]

LengthsOption = Annotated[list[int] | None, typer.Option("--lengths", min=1, help="Tokens in the cache (repeat it).")]
ShapeOption = Annotated[
    str,
    typer.Option(
        callback=lambda shape: _shape(shape) and shape,
        help=f"{', '.join(SHAPES)}, or query heads/KV heads/head dimension, such as 32/8/128.",
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences.")]
BufferOption = Annotated[int, typer.Option(min=1, help="Recent tokens kept dense.")]
FormOption = Annotated[list[str] | None, typer.Option(help="graded, topk, leading or fp8 (repeat it).")]
RetentionOption = Annotated[
    list[float] | None,
    typer.Option(callback=check_retentions, help="Retentions of the forms, or of graded if none is given (repeat it)."),
]


@bench.command()
def decode(
    lengths: LengthsOption = None,
    shape: ShapeOption = "llama",
    batch: BatchOption = 1,
    buffer: BufferOption = 128,
    form: FormOption = None,
    retention: RetentionOption = None,
    impl: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(IMPLS)} (repeat it); those of the device by default.")
    ] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Dtypes of the cache (repeat it); bfloat16, on a CPU all.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Image file to draw.")] = None,
    json: JsonOption = False,
) -> None:
    """Time the attention of one decoding step of one layer, swan beside dense."""
    lengths = lengths or [8192]
    check_outputs(plot=plot)
    setup = Setup(batch=batch, buffer=buffer, **_shape(shape))
    bandwidth = memory_bandwidth(setup.device)
    if not dtype and setup.device.type == "cpu":
        dtype = [Dtype.float32, Dtype.bfloat16, Dtype.float16]  # CPUs differ in which they are fastest with
    dtypes = [layer_dtype(each) for each in dtype] if dtype else None
    chosen = _forms(form, retention)
    rows = benchmarks.bench_decode(lengths, setup, dtypes=dtypes, forms=chosen, impls=impl, bandwidth=bandwidth)
    if plot is not None:
        save(benchmarks.plot_decode(rows, _about(setup)), plot)
    if json:
        return print_json(_settings(setup, shape, lengths=lengths, bandwidth=bandwidth), rows)
    columns: Columns = {
        "cache": _label,
        "impl": lambda row: row["impl"],
        "dtype": lambda row: row["dtype"],
        "length": lambda row: str(row["length"]),
        "ms (spread)": milliseconds,
        "speedup": _speedup,
        "read MB": lambda row: number(row["bytes"] / 1e6, 1),
        "GB/s": _gigabytes,
    }
    _show(f"Attention of one decode step, {_about(setup)}", columns, rows)
    _say_bandwidth(bandwidth)
    if setup.device.type == "cpu":
        used = instructions(setup.device)
        console.print(f"instructions: {used['variant']} in swan's kernels, {used['instruction_set']} in torch")


@bench.command()
def step(
    lengths: LengthsOption = None,
    shape: ShapeOption = "llama",
    batch: BatchOption = 1,
    buffer: BufferOption = 128,
    form: FormOption = None,
    retention: RetentionOption = None,
    impl: Annotated[list[str] | None, typer.Option(help="Of eager, compiled (repeat it).")] = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Time the parts of one decoding step of one layer, and find the length from which on swan's is faster."""
    lengths = lengths or [512, 2048, 8192]
    options = _given(forms=_forms(form, retention), impls=impl)
    setup = Setup(batch=batch, buffer=buffer, dtype=layer_dtype(dtype), **_shape(shape))
    rows = benchmarks.bench_step(lengths, setup, **options)
    if json:
        return print_json(_settings(setup, shape, lengths=lengths), rows)
    columns: Columns = {
        "cache": _label,
        "impl": lambda row: row["impl"],
        "length": lambda row: str(row["length"]),
        "part": lambda row: row["what"],
        "ms (spread)": milliseconds,
        "share": lambda row: percent(row["share"], 0),
        "speedup": _speedup,
    }
    if setup.device.type == "cuda":
        columns |= {
            "launches": lambda row: number(row["launches"], 0),
            "Python us": lambda row: number(row["host_us"], 0),
        }
    timed = [row for row in rows if row["what"] != "break-even"]
    _show(f"One decode step of a layer, {_about(setup)}, {dtype_name(setup.dtype)}", columns, timed)
    console.print("share: of the time of the attention")
    for row in (row for row in rows if row["what"] == "break-even"):
        measured = row["error"] if row["length"] is None else f"{number(row['length'], 0)} tokens"
        operations = number(row["formula"], 0)
        console.print(f"break-even, {_label(row)} {row['impl']}: {measured} (by operations {operations})")


@bench.command()
def prefill(
    lengths: LengthsOption = None,
    shape: ShapeOption = "llama",
    batch: BatchOption = 1,
    buffer: BufferOption = 128,
    form: FormOption = None,
    retention: RetentionOption = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Measure time and peak of memory of taking in a prompt in one layer, swan beside dense."""
    lengths = lengths or [2048]
    setup = Setup(batch=batch, buffer=buffer, dtype=layer_dtype(dtype), **_shape(shape))
    rows = benchmarks.bench_prefill(lengths, setup, **_given(forms=_forms(form, retention)))
    if json:
        return print_json(_settings(setup, shape, lengths=lengths), rows)
    columns: Columns = {
        "cache": _label,
        "impl": lambda row: row["impl"],
        "length": lambda row: str(row["length"]),
        "ms (spread)": milliseconds,
        "speedup": _speedup,
        "cache MiB": lambda row: mebibytes(row["bytes"], unit=""),
        "peak MiB": lambda row: mebibytes(row["peak_bytes"], unit=""),
    }
    _show(f"A prompt in one layer, {_about(setup)}, {dtype_name(setup.dtype)}", columns, rows)


@bench.command()
def capacity(
    memory: Annotated[
        str, typer.Option(callback=check_size, help="Memory for the cache of one layer, such as 64MiB.")
    ] = "1GiB",
    lengths: LengthsOption = None,
    shape: ShapeOption = "llama",
    buffer: BufferOption = 128,
    form: FormOption = None,
    retention: RetentionOption = None,
    impl: Annotated[
        str | None, typer.Option(help="Of the swan rows, as of decode; the kernel of the device by default.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Measure tokens per second of one layer at the largest batch that fits a memory."""
    lengths = lengths or [8192]
    setup = Setup(buffer=buffer, dtype=layer_dtype(dtype), **_shape(shape))
    size, bandwidth = byte_count(memory), memory_bandwidth(setup.device)
    chosen = _forms(form, retention)
    rows = benchmarks.bench_capacity(size, lengths, setup, forms=chosen, impl=impl, bandwidth=bandwidth)
    if json:
        settings = _settings(setup, shape, lengths=lengths, memory=size, bandwidth=bandwidth)
        return print_json(settings, rows)
    columns: Columns = {
        "cache": _label,
        "impl": lambda row: row["impl"],
        "length": lambda row: str(row["length"]),
        "batch": lambda row: str(row["batch"]),
        "ms (spread)": milliseconds,
        "tokens/s": lambda row: number(row["tokens_per_second"], 0),
        "speedup": _speedup,
        "GB/s": _gigabytes,
    }
    heads = f"{setup.heads} query and {setup.kv_heads} KV heads of {setup.head_dim}"
    _show(f"Decode attention of one layer in {memory}, {heads}, {dtype_name(setup.dtype)}", columns, rows)
    _say_bandwidth(bandwidth)


@bench.command()
def model(
    model: ModelArgument = "smollm2-135m",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, from papers of qasper.")] = 7500,
    tokens: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 200,
    batch: BatchOption = 1,
    buffer: BufferOption = 128,
    retention: Annotated[
        list[float] | None,
        typer.Option(callback=check_retentions, help="Retentions beside 1 (repeat it); 0.5 and 0.26 if none is given."),
    ] = None,
    impl: Annotated[list[str] | None, typer.Option(help="Of eager, compiled (repeat it); both by default.")] = None,
    quantized: Annotated[bool, typer.Option(help="Also transformers' quantized cache, if quanto is there.")] = True,
    calibration_file: CalibrationOption = None,
    dtype: DtypeOption = Dtype.auto,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, after each row too.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure tokens per second of a whole model, swan's caches beside those of transformers."""
    options = _given(retentions=retention, impls=impl)
    check_outputs(out=out)
    network, tokenizer = load(model, dtype)
    ids = token_windows(evaluation_text("qasper"), tokenizer, batch, prompt)
    calibration = calibration_of(model, network, tokenizer, path=calibration_file)
    options |= {"tokens": tokens, "quantized": quantized, "buffer": buffer}
    settings = {"model": model, "prompt": prompt, "tokens": tokens, "batch": batch, "buffer": buffer}
    settings |= {"dtype": dtype_name(network.dtype), "threads": torch.get_num_threads()}

    def write(rows: list[Row]) -> None:
        write_json(out, envelope(settings, rows))

    rows = benchmarks.bench_model(network, ids, calibration, after_row=write, **options)
    if json:
        return print_json(settings, rows)
    columns: Columns = {
        "cache": _label,
        "impl": lambda row: row["impl"],
        "tok/s": lambda row: number(row["tokens_per_second"], 1),
        "ms (spread)": milliseconds,
        "speed": _speedup,
        "fill s": lambda row: number(row["prefill_seconds"], 1),
        "MiB": lambda row: mebibytes(row["bytes"], unit=""),
        "growth": lambda row: number(row["growth"], 1, scale=2**-10),
        "counted": lambda row: number(row["growth_counted"], 1, scale=2**-10),
        "agree": lambda row: percent(row["agreement"], 0),
    }
    _show(f"{model}, {tokens} tokens after {batch} x {prompt}, {settings['dtype']}", columns, rows)
    console.print("fill: of the prompt; growth of the process, counted of the cache, KiB per token")
    console.print("agree: with the tokens of the first row")


def _shape(shape: str) -> dict[str, Any]:
    if shape in SHAPES:
        return SHAPES[shape]
    numbers = shape.split("/")
    if len(numbers) != 3 or not all(number.isdigit() and int(number) for number in numbers):
        raise typer.BadParameter(f"a shape is {', '.join(SHAPES)}, or such as 32/8/128, got {shape!r}")
    heads, kv_heads, head_dim = map(int, numbers)
    if heads % kv_heads or head_dim > MAX_DIM:
        raise typer.BadParameter(f"query heads must be a multiple of KV heads, heads have up to {MAX_DIM} coordinates")
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def _forms(form: list[str] | None, retention: list[float] | None) -> list[Form] | None:
    """Pair the chosen forms with the retentions, or with the usual ones; None if neither is given."""
    if retention:
        return list(itertools.product(form or ["graded"], retention))
    usual = (*FORMS, *((name, 0.5) for name in form or [] if name not in dict(FORMS)))
    return [pair for pair in usual if pair[0] in form] if form else None


def _given(**options: Any) -> dict[str, Any]:
    """Select the options that were given, so that others keep their defaults."""
    return {name: value for name, value in options.items() if value}


def _settings(setup: Setup, shape: str, **more: Any) -> dict[str, Any]:
    sizes = {name: getattr(setup, name) for name in ("heads", "kv_heads", "head_dim", "buffer")}
    return {"shape": shape, **sizes, "device": str(setup.device), "threads": torch.get_num_threads(), **more}


def _about(setup: Setup) -> str:
    return f"{setup.heads} query and {setup.kv_heads} KV heads of {setup.head_dim}, batch {setup.batch}"


def _show(title: str, columns: Columns, rows: Sequence[Row]) -> None:
    """Print a table of what was measured, and below it what was not, and why."""
    timed = [row for row in rows if row["median_ms"] is not None]
    print_table(title, columns, timed)
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["median_ms"] is None:
            missing.setdefault((row["impl"], row["error"]), []).append(f"{_label(row)} at {row['length']}")
    for (impl, error), cases in missing.items():
        console.print(f"no {impl} of {', '.join(cases)}: {error}", markup=False, highlight=False)


def _say_bandwidth(bandwidth: float) -> None:
    console.print(f"plain reading or copying: {number(bandwidth / 1e9, 1)} GB/s (threads: {torch.get_num_threads()})")


def _label(row: Row) -> str:
    return "dense" if row["form"] == "dense" else f"{row['form']} {number(row['retention'], 2)}"


def _speedup(row: Row) -> str:
    return ratio(row["speedup"])


def _gigabytes(row: Row) -> str:
    return number(row["bytes"] / row["median_ms"] / 1e6, 1)
