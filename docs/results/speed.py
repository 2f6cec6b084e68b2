"""Tables and plots of what a cache takes: time and memory."""

from swan.evaluation.bench import plot_decode

import figures
from tables import table

from . import cells, data


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
