"""Writes the numbers of a row as they stand in a table or a sentence."""

from typing import Any

from swan.evaluation.frontier import label

from .data import Row


def percent(share: float, digits: int = 1) -> str:
    """Write a share, which a line break does not part from its sign."""
    return f"{100 * share:.{digits}f}&nbsp;%"


def increase(row: Row, digits: int = 2) -> str:
    """Write by how much perplexity exceeds that of the dense cache."""
    return f"{100 * row['perplexity_increase']:+.{digits}f}&nbsp;%"


def increase_with_error(row: Row) -> str:
    """Write the increase of perplexity and its standard error."""
    return increase(row) + _plus_minus(row["standard_error"], 100, digits=2)


def kl_with_error(row: Row, digits: int = 3) -> str:
    """Write the KL divergence and its standard error in 1/1000 nats."""
    kl = f"{1000 * row['kl']:.{digits}f}"
    return kl + _plus_minus(row["kl_error"], 1000, digits)


def _plus_minus(error: float | None, scale: float, digits: int) -> str:
    # A single window has no error.
    return "" if error is None else f"&nbsp;±&nbsp;{scale * error:.{digits}f}"


def scores(row: Row) -> str:
    """Write what a plan costs."""
    return (
        f"perplexity {increase_with_error(row)}, KL {row['kl']:.5f}, "
        f"same next token {percent(row['agreement'])}"
    )


def needles(row: Row) -> str:
    """Write how many needles a cache finds."""
    return f"{row['found']} of {row['cases']} needles (dense {row['found_dense']})"


def cache(row: Row) -> str:
    """Write the form and the retention of a cache that was timed."""
    if row["form"] == "dense":
        return "dense"
    return f"{row['form']}, {row['retention']:.2f}"


def method(row: Row) -> str:
    """Write the name of a row of `swan frontier`, that of a default plan in bold."""
    name = f"**{label(row)}**" if row["form"] == "swan" else label(row)
    return name if row["seeds"] == 1 else f"{name}, {row['seeds']} seeds"


def history(row: Row) -> str:
    """Write how the history of a row of `swan evaluate` is stored."""
    if row["form"] == "dense":
        return "dense cache"
    if row["form"] == "window":
        return "nothing (window only)"
    keys, values = row["settings"]["keys"], row["settings"]["values"]
    if keys == values:
        return layout(keys)
    return f"K {layout(keys)}; V {layout(values)}"


def recent(settings: dict[str, Any]) -> str:
    """Write how many of the newest and of the first tokens are kept dense."""
    return f"{settings['buffer']}&nbsp;+&nbsp;{settings['sinks']}"


def layout(settings: dict[str, Any]) -> str:
    """Write how one vector is stored."""
    if settings["form"] == "graded":
        groups = (f"{size} at {bits} bit" for size, bits in settings["groups"])
        return "graded " + " + ".join(groups)
    index = ", index list" if settings["positions"] == "index" else ""
    keep, d, bits = (settings[name] for name in ("keep", "d", "bits"))
    return f"top {keep} of {d}, {bits} bit{index}"
