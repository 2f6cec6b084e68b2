"""Tables and plots of what a cache takes: time and memory."""

from swan.evaluation.bench import plot_decode

import figures
from tables import table

from . import cells, data, runs


def decode_table(name: str = "decode-cpu") -> str:
    """List kernels and dense rivals at the attention of one decode step."""
    columns = (
        "cache, retention",
        "impl",
        "dtype",
        "MB read",
        "ms",
        "spread",
        "speed-up",
        "of bandwidth",
        "error",
        "peak MB",
    )
    rows = [
        [
            cells.cache(row),
            row["impl"],
            row["dtype"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['median_ms']:.2f}",
            cells.percent(row["spread"], digits=0),
            f"{row['speedup']:.2f}",
            f"{row['bandwidth_fraction']:.2f}",
            f"{row['error']:.0e}",
            f"{row['peak_bytes'] / 1e6:.2f}",
        ]
        for row in sorted(data.rows_of(name), key=lambda row: row["dtype"])
        if row["median_ms"] is not None and row["impl"] != "tiles"
    ]
    return table(columns, rows, "lll" + "r" * 7)


def decode_plot() -> str:
    """Plot the time of a step by length, and the speed-up by retention."""
    return figures.svg(
        plot_decode(
            data.rows_of("decode-lengths-cpu"),
            "one layer, 32 query and 8 KV heads of 128",
        ),
        "On the left the time of a step against the tokens in the cache, both logarithmic: from some thousand tokens "
        "on the lines of graded layouts lie below the dense one. On the right the speed-up over the fastest dense "
        "attention at the greatest length, which falls as retention grows.",
    )


def steps_table(name: str = "step-cpu") -> str:
    """List whole compiled decode steps of a layer, with the parts of those of swan."""
    columns = (
        "tokens",
        "cache, retention",
        "step, ms",
        "rotate and pack",
        "attend",
        "speed-up",
    )
    rows = []
    for dense in data.rows_of(name, what="step", impl="sdpa"):
        length, time = dense["length"], f"{dense['median_ms']:.2f}"
        rows.append([f"{length}", "dense", time, "", "", "1.00"])
        parts = [
            data.row_of(name, length=length, what=what, impl="compiled")
            for what in ("step", "rotate+update", "attend")
        ]
        rows.append(
            [
                f"{length}",
                cells.cache(parts[0]),
                *(f"{part['median_ms']:.2f}" for part in parts),
                f"{parts[0]['speedup']:.2f}",
            ]
        )
    return table(columns, rows, "rlrrrr")


def model_table(name: str = "model-cpu") -> str:
    """List tokens per second and memory of a whole model."""
    columns = (
        "cache",
        "impl",
        "tokens/s",
        "ms",
        "spread",
        "prompt, s",
        "MiB",
        "growth",
        "counted",
        "same token",
    )
    names = {"dense": "transformers, dense", "quanto": "transformers, quantized"}
    rows = [
        [
            names.get(row["form"], f"swan, {row['retention']:.2f}"),
            row["impl"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['median_ms']:.1f}",
            cells.percent(row["spread"], digits=0),
            f"{row['prefill_seconds']:.0f}",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['growth'] / 1024:.1f}",
            f"{row['growth_counted'] / 1024:.1f}",
            cells.percent(row["agreement"]),
        ]
        for row in data.rows_of(name)
    ]
    return table(columns, rows, "ll" + "r" * 8)


def capacity_table() -> str:
    """List tokens per second where the smaller cache admits a larger batch."""
    columns = ("tokens", "cache, retention", "batch", "ms", "tokens/s", "speed-up")
    rows = [
        [
            f"{row['length']}",
            cells.cache(row),
            f"{row['batch']}",
            f"{row['median_ms']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}",
        ]
        for row in data.rows_of("capacity-cpu")
    ]
    return table(columns, rows, "rlrrrr")


def prefill_table(name: str = "prefill-cpu") -> str:
    """List time and memory of taking in a prompt."""
    columns = (
        "tokens",
        "cache, retention",
        "prefill",
        "ms",
        "cache, MB",
        "peak MB",
    )
    rows = [
        [
            f"{row['length']}",
            cells.cache(row),
            "" if row["form"] == "dense" else row["impl"],
            f"{row['median_ms']:.0f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in data.rows_of(name)
    ]
    return table(columns, rows, "rllrrr")


# On GPUs ------------------------------------------------------------------------------------------


def on_gpus() -> str:
    """Show what was measured on each GPU, or say that nothing was."""
    return "\n\n".join(map(_on, data.cards())) or (
        "**Nothing of this version has run on a GPU.** `benchmarks/gpu.sh` checks and times all of it there in five "
        "minutes; its tables will stand here, under the name of the card."
    )


def _on(card: str) -> str:
    name = f"gpu-speed-{card}"
    checks = data.checks_on(card)
    passed = sum(row["result"] == "passed" for row in checks)
    result = data.load(name)
    gpu, bandwidth = result["machine"]["gpu"], result["settings"]["bandwidth"]
    parts = [
        f"### {gpu}",
        f"{passed} of {len(checks)} checks against float64 passed. Its memory gives {bandwidth / 1e9:.0f} GB/s.",
        _gpu_decode_table(card),
        "One step of attention in bfloat16, replayed from CUDA graphs over copies beyond the L2 cache: ms, and the "
        "speed-up over the faster of cuDNN and flash attention.",
        _gpu_parts_table(card),
        "What stands around the attention of a layer, at 0.266: replayed from CUDA graphs, but eager steps as they are, "
        "with Python's part of a call.",
        _gpu_model_table(card),
        f"A model of random weights in the shape of Llama-3.2-1B. {runs.made_by(name)}",
    ]
    return "\n\n".join(part for part in parts if part)


def _gpu_decode_table(card: str) -> str:
    """List the attention of a step: a line for each shape, a column for each retention."""
    rows = data.timed_on(card, "decode")
    graded = [row for row in rows if row["form"] == "graded"]
    retentions = sorted({row["retention"] for row in graded}, reverse=True)
    shapes = dict.fromkeys(map(_shape, rows))
    lines = []
    for shape in shapes:
        dense = [
            row["median_ms"]
            for row in rows
            if _shape(row) == shape and row["form"] == "dense"
        ]
        packed = {row["retention"]: row for row in graded if _shape(row) == shape}
        tokens, batch, d = shape
        lines.append(
            [f"{tokens} x {batch}", f"{d}", f"{min(dense):.3f}" if dense else ""]
            + [_time_and_speedup(packed.get(each)) for each in retentions]
        )
    columns = ["tokens x batch", "d", "dense", *(f"{r:.3f}" for r in retentions)]
    return table(columns, lines, "r" * len(columns)) if lines else ""


def _shape(row: data.Row) -> tuple[int, int, int]:
    return row["length"], row["batch"], row["head_dim"]


def _time_and_speedup(row: data.Row | None) -> str:
    if row is None:
        return ""
    faster = f"&nbsp;({row['speedup']:.2f})" if row["speedup"] else ""
    return f"{row['median_ms']:.3f}{faster}"


def _gpu_parts_table(card: str) -> str:
    """List packing, rotations, and steps of a cache and of a layer."""
    columns = (
        "part",
        "impl",
        "tokens x batch",
        "ms",
        "of the attention",
        "launches",
        "Python, us",
    )
    parts = ("pack", "pack 2048", "rotate", "update", "attend", "step", "layer")
    rows = [
        [
            row["what"],
            row["impl"],
            f"{row['length']} x {row['batch']}",
            f"{row['median_ms']:.4f}",
            cells.percent(row["share"], 0) if row.get("share") else "",
            f"{row['launches']:.0f}" if row.get("launches") else "",
            f"{row['host_us']:.0f}" if row.get("host_us") else "",
        ]
        for part in parts
        for row in data.timed_on(card, part)
        if row["form"] == "graded"
    ]
    return table(columns, rows, "lllrrrr") if rows else ""


def _gpu_model_table(card: str) -> str:
    """List steps of a whole model."""
    columns = (
        "tokens x batch",
        "cache",
        "impl",
        "ms",
        "speed-up",
        "tokens/s",
        "MiB",
    )
    rows = [
        [
            f"{row['length']} x {row['batch']}",
            cells.cache(row),
            row["impl"],
            f"{row['median_ms']:.2f}",
            f"{row['speedup']:.2f}" if row["speedup"] else "",
            f"{row['tokens_per_second']:.0f}",
            f"{row['bytes'] / 2**20:.0f}",
        ]
        for row in sorted(
            data.timed_on(card, "model"),
            key=lambda row: (row["length"], row["batch"], -row["retention"]),
        )
    ]
    return table(columns, rows, "rllrrrr") if rows else ""
