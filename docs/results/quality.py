"""Tables and plots of what a cache loses."""

from matplotlib.figure import Figure
from swan.evaluation.frontier import plot_frontier

import figures
from tables import table

from . import cells, data


def frontier_table(model: str) -> str:
    """List the methods of `swan frontier` by falling retention."""
    columns = (
        "method",
        "retention",
        "whole cache",
        "perplexity",
        "KL, 1/1000 nats",
        "same token",
        "",
    )
    rows = sorted(data.frontier(model), key=lambda row: -row["retention"])
    return table(columns, [_frontier_cells(row) for row in rows], "lrrrrrl")


def _frontier_cells(row: data.Row) -> list[str]:
    if row["form"] == "dense":  # the others are compared with it
        perplexity, kl, star = f"{row['perplexity']:.2f}", f"{row['kl']:.3f}", ""
    else:
        perplexity, kl = cells.increase_with_error(row), cells.kl_with_error(row)
        star = "★" if row["frontier"] else ""
    return [
        cells.method(row),
        f"{row['retention']:.3f}",
        f"{row['compression_bf16']:.3f}",
        perplexity,
        kl,
        cells.percent(row["agreement"]),
        star,
    ]


def frontier_plot(model: str) -> str:
    """Plot KL against retention, swan beside its rivals."""
    return figures.svg(
        frontier_figure(model, title=model),
        f"KL divergence from the dense predictions against retention, both of {model}, KL logarithmic. The line of "
        "swan's default plans lies below the points of every rival at equal bytes.",
    )


def frontier_figure(model: str, title: str) -> Figure:
    """Draw what `frontier_plot` shows, in the style of the pages."""
    return plot_frontier(data.frontier(model), title)


def rivals_table(model: str) -> str:
    """List each rival beside the default plan in as many bytes or fewer."""
    columns = (
        "rival",
        "its retention",
        "its KL, 1/1000",
        "swan's retention",
        "KL",
        "ratio",
        "swan as good from",
    )
    return table(columns, map(_rival_cells, data.rivals(model)), "lrrrrrr")


def _rival_cells(row: data.Row) -> list[str]:
    swan = ["-", "-", "-"]
    if row["ratio"] is not None:
        swan = [
            f"{row['retention']:.3f}",
            f"{1000 * row['kl']:.3f}",
            f"{row['ratio']:.2f}",
        ]
    return [
        row["rival"],
        f"{row['rival_retention']:.3f}",
        f"{1000 * row['rival_kl']:.3f}",
        *swan,
        "-" if row["enough"] is None else f"{row['enough']:.3f}",
    ]


def needles_table(model: str) -> str:
    """List how many needles a cache finds, by length of the text and depth of the needle."""
    rows = data.load(f"frontier-{model}")["needles"]
    lengths = [f"{part['length']} tokens" for part in rows[0]["by_length"]]
    depths = [f"depth {part['depth']:.1f}" for part in rows[0]["by_depth"]]
    columns = ("retention", "found", *lengths, *depths, "nats per answer token")
    return table(columns, map(_needle_cells, rows), "l" + "r" * (len(columns) - 1))


def _needle_cells(row: data.Row) -> list[str]:
    parts = (row, *row["by_length"], *row["by_depth"])
    return [
        "dense" if row["form"] == "dense" else f"{row['retention']:.2f}",
        *(f"{part['found']} of {part['cases']}" for part in parts),
        f"{row['nll']:.3f}",
    ]


def hard_table() -> str:
    """List the KL divergence on texts unlike those that plans were made on."""
    cases = data.hard_cases()
    found = {
        (round(row["retention"], 3), cells.method(row), title): cells.kl_with_error(
            row, 2
        )
        for title, rows in cases.items()
        for row in rows
    }
    lines = [
        [
            method,
            f"{share:.3f}",
            *(found.get((share, method, title), "-") for title in cases),
        ]
        for share, method in sorted({key[:2] for key in found}, reverse=True)
    ]
    columns = ("method", "retention", *cases)
    return table(columns, lines, "lr" + "r" * len(cases))


def after_prompt_table() -> str:
    """List presses, which evict tokens of a prompt once, and swan, by falling bytes after the prompt."""
    columns = (
        "method",
        "bytes after the prompt",
        "at the end",
        "KL, 1/1000",
        "perplexity",
        "agreement",
    )
    presses = [
        _after_prompt_cells(
            f"{row['press']}, {row['kept']:.2f}",
            row["kept"],
            (row["kept"] + 1) / 2,  # as many tokens follow, which stay dense
            row,
        )
        for row in data.rows_of("kvpress-smollm2-135m")
    ]
    swans = [
        _after_prompt_cells(
            f"**swan, {row['retention']:.3f}**{_kept(row)}, buffer {row['buffer']}",
            row["share_at_prompt"],
            row["share_at_end"],
            row,
        )
        for row in data.rows_of("after-prompt-smollm2-135m")
    ]
    rows = sorted(presses + swans, key=lambda row: -float(row[1]))
    return table(columns, rows, "lrrrrr")


def _kept(row: data.Row) -> str:
    return "" if row["keep"] is None else f", {row['keep']:.2f} of the tokens"


def _after_prompt_cells(
    name: str, at_prompt: float, at_end: float, row: data.Row
) -> list[str]:
    return [
        name,
        f"{at_prompt:.3f}",
        f"{at_end:.3f}",
        cells.kl_with_error(row, digits=2),
        cells.increase(row),
        cells.percent(row["agreement"]),
    ]


def evaluation_table() -> str:
    """List forms, bases and bits, as measured by `swan evaluate`."""
    columns = (
        "stored form of the history",
        "basis",
        "buffer + sinks",
        "retention",
        "perplexity",
        "increase",
        "KL",
        "same token",
    )
    rows = data.rows_of("evaluate-smollm2")
    return table(columns, map(_evaluation_cells, rows), "lllrrrrr")


def _evaluation_cells(row: data.Row) -> list[str]:
    settings = row["settings"]
    return [
        cells.history(row),
        settings["basis"] if "keys" in settings else "-",
        cells.recent(settings) if settings else "-",
        f"{row['retention']:.2f}",
        f"{row['perplexity']:.2f}",
        "-" if row["form"] == "dense" else cells.increase_with_error(row),
        f"{row['kl']:.3f}",
        cells.percent(row["agreement"]),
    ]


def bases_table(keep: int) -> str:
    """List what top-k costs in each basis, the best first."""
    columns = ("basis", "perplexity", "KL", "same token")
    rows = [
        [
            f"`{row['settings']['basis']}`",
            cells.increase_with_error(row),
            f"{row['kl']:.4f}",
            cells.percent(row["agreement"]),
        ]
        for row in sorted(data.evaluated_topk(keep), key=lambda row: row["kl"])
    ]
    return table(columns, rows, "lrrr")


def forms_table() -> str:
    """List both forms in the joint basis, at retentions of a fifth to a half."""
    columns = ("retention", "stored", "perplexity", "KL")
    rows = [
        [
            f"{row['retention']:.3f}",
            cells.history(row),
            cells.increase_with_error(row),
            f"{row['kl']:.4f}",
        ]
        for row in data.evaluated_forms(0.2, 0.51)
    ]
    return table(columns, rows, "rlrr")


def harness_table() -> str:
    """List scores of lm-evaluation-harness."""
    rows = data.rows_of("lm-eval-smollm2-135m")
    tasks = list(rows[0]["scores"])
    scores = [
        [
            "dense" if row["retention"] is None else f"{row['retention']:.2f}",
            *(f"{row['scores'][task]:.2f}" for task in tasks),
        ]
        for row in rows
    ]
    return table(("retention", *tasks), scores, "l" + "r" * len(tasks))
