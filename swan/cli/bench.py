"""`swan bench`: timings against the strongest dense attention."""

from typing import Annotated, Any

import typer

from swan.cli.common import JsonOption, percent, print_json, print_table, user_errors
from swan.evaluation.bench import IMPLS, bench_decode

bench = typer.Typer(help="Timings against the strongest dense attention.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Keeps `decode` a command of its own."""


@bench.command()
def decode(
    length: Annotated[list[int] | None, typer.Option("--lengths", help="Tokens in the cache (repeat it).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Head dimension.")] = 128,
    buffer: Annotated[int, typer.Option(min=1, help="Recent tokens kept dense.")] = 128,
    impl: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(IMPLS)} (repeat it); all of them by default.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """One decoding step of one layer: attention over the cache, random weights."""
    shape: dict[str, Any] = {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "buffer": buffer,
    }
    lengths = length or [8192]
    with user_errors():
        rows = bench_decode(lengths, impls=impl or IMPLS, **shape)
    if json:
        return print_json({"lengths": lengths, **shape}, rows)
    print_table(
        f"attention of one decode step, {heads} query and {kv_heads} KV heads of {head_dim}, batch {batch}",
        ("form", "impl", "dtype", "retention", "length", "ms", "spread", "speedup", "read MB", "of bandwidth"),
        [_cells(row) for row in rows],
    )


def _cells(row: dict[str, Any]) -> list[str]:
    about = [row["form"], row["impl"], row["dtype"], f"{row['retention']:.2f}", str(row["length"])]
    if row["median_ms"] is None:
        return [*about, "-", "-", "-", "-", str(row["error"])]
    return [
        *about,
        f"{row['median_ms']:.2f}",
        percent(row["spread"], 0),
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        f"{row['bytes'] / 1e6:.1f}",
        f"{100 * row['bandwidth_fraction']:.0f} %",
    ]
