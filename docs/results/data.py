"""Reads the results in benchmarks/results and chooses rows of them.

A result is what a command printed as JSON: an object of its command, date, versions, machine, settings and rows.
No function here turns a number into text.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swan.evaluation.frontier import average_seeds, compared, mark_frontier

FOLDER = Path("benchmarks/results")
Row = dict[str, Any]


def names() -> list[str]:
    """List all results."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> dict[str, Any]:
    """Read a result."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def rows_of(name: str, **fields: Any) -> list[Row]:
    """Choose the rows of a result whose fields have these values."""
    return [
        row
        for row in load(name)["rows"]
        if all(row[field] == value for field, value in fields.items())
    ]


def row_of(name: str, **fields: Any) -> Row:
    """Choose the only row of a result whose fields have these values."""
    rows = rows_of(name, **fields)
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of {name} have {fields}, not one")
    return rows[0]


def nearest(rows: Iterable[Row], retention: float) -> Row:
    """Choose the row that was measured nearest to a retention."""
    return min(rows, key=lambda row: abs(row["retention"] - retention))


# Quality ------------------------------------------------------------------------------------------


def default_plan(model: str, retention: float) -> Row:
    """Choose the default plan nearest to a retention."""
    return nearest(rows_of(f"frontier-{model}", form="swan"), retention)


def frontier(model: str) -> list[Row]:
    """List default plans and rivals, one row for all seeds, with what is on the frontier marked."""
    rows = average_seeds(load(f"frontier-{model}")["rows"])
    mark_frontier(rows)
    return rows


def rivals(model: str) -> list[Row]:
    """List each rival with the best default plan in as many bytes or fewer."""
    return compared(frontier(model))


def divergence_ratios(model: str) -> list[float]:
    """List, in ascending order, the KL divergence of swan over that of each rival, in as many bytes or fewer.

    Those that were run on fewer tokens only are among them.
    """
    many, few = rivals(model), rivals(f"rivals-{model}")
    seen = {row["rival"] for row in many}
    rows = [*many, *(row for row in few if row["rival"] not in seen)]
    return sorted(row["ratio"] for row in rows if row["ratio"] is not None)


def needles(model: str, retention: float) -> Row:
    """Choose the needle test nearest to a retention, with `found_dense`: how many the dense cache found."""
    rows = load(f"frontier-{model}")["needles"]
    (dense,) = (row for row in rows if row["form"] == "dense")
    row = nearest(rows, retention)
    if abs(row["retention"] - retention) > 0.01:
        raise ValueError(f"no needles of {model} were asked for near {retention}")
    return row | {"found_dense": dense["found"]}


def evaluated_topk(keep: int, positions: str = "bitmap") -> list[Row]:
    """Choose the rows of `swan evaluate` that keep the largest coordinates of keys, with sinks."""
    return [
        row
        for row in rows_of("evaluate-smollm2", form="topk")
        if row["settings"]["sinks"] > 0
        and row["settings"]["keys"]["keep"] == keep
        and row["settings"]["keys"]["positions"] == positions
    ]


def evaluated_forms(low: float, high: float) -> list[Row]:
    """Choose the rows of `swan evaluate` in the joint basis, with sinks, by falling retention between two bounds."""
    rows = [
        row
        for row in rows_of("evaluate-smollm2")
        if low < row["retention"] < high
        and row["settings"].get("basis") == "joint"
        and row["settings"]["sinks"] > 0
    ]
    return sorted(rows, key=lambda row: -row["retention"])


def hard_cases() -> dict[str, list[Row]]:
    """List the rows of benchmarks/hard_cases.py by a title of their case."""
    titles = {
        "long": "papers, 8192 tokens",
        "code": "source code",
        "chat": "chats of 20 turns",
    }
    return {
        title: [
            row
            for row in average_seeds(rows_of("hard-smollm2-135m", case=case))
            if row["form"] != "dense"
        ]
        for case, title in titles.items()
    }


def smallest_prompts() -> tuple[Row, Row]:
    """Choose the best of swan's rows in the fewest bytes of a prompt that a press was given, and the best press in them."""
    presses = rows_of("kvpress-smollm2-135m")
    least = min(row["kept"] for row in presses) + 1e-3
    swans = [
        row
        for row in rows_of("after-prompt-smollm2-135m")
        if row["share_at_prompt"] < least
    ]
    presses = [row for row in presses if row["kept"] < least]
    return min(swans, key=lambda row: row["kl"]), min(
        presses, key=lambda row: row["kl"]
    )


# Speed --------------------------------------------------------------------------------------------


def decode_step(form: str, retention: float = 1, impl: str = "cpp") -> Row:
    """Choose the attention of one step over 32k tokens in bfloat16, nearest to a retention."""
    rows = rows_of("decode-cpu", form=form, impl=impl, dtype="bfloat16")
    return nearest([row for row in rows if row["median_ms"] is not None], retention)


def layer_step(length: int, what: str = "step") -> Row:
    """Choose the compiled step of one layer, or the part of it named `rotate+update` or `attend`."""
    return row_of("step-cpu", length=length, what=what, impl="compiled")


def break_even() -> Row:
    """Choose the row that says from which length on a compiled step takes less time than a dense one."""
    return row_of("step-cpu", what="break-even", impl="compiled")


def model_step(form: str, impl: str, retention: float = 1) -> Row:
    """Choose the step of a whole model."""
    return row_of("model-cpu", form=form, impl=impl, retention=retention)


def full_memory(form: str, length: int, retention: float = 1) -> Row:
    """Choose the step of the largest batch that fits into a fixed memory."""
    return row_of("capacity-cpu", form=form, length=length, retention=retention)


def prompt(impl: str, length: int, name: str = "prefill-cpu") -> Row:
    """Choose the row of taking in a prompt of a length: in the forms `chunk` and `windowed`, or by dense `sdpa`."""
    return row_of(name, length=length, impl=impl)


# On GPUs ------------------------------------------------------------------------------------------


def cards() -> list[str]:
    """List the GPUs that `benchmarks/gpu.sh` has run on, as they stand in the names of its results."""
    prefix = "gpu-speed-"
    found = [
        name.removeprefix(prefix) for name in names() if name.startswith(prefix)
    ]
    return [card for card in found if load(f"{prefix}{card}")["machine"]["gpu"]]


def timed_on(card: str, what: str) -> list[Row]:
    """Choose the rows of a kind of work that have a time on a card."""
    rows = load(f"gpu-speed-{card}")["rows"]
    return [row for row in rows if row.get("what") == what and row["median_ms"]]


def checks_on(card: str) -> list[Row]:
    """List the checks of results on a card."""
    return load(f"gpu-correctness-{card}")["rows"]
