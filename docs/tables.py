"""Tables of the pages, generated from the library and from results."""

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import swan


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """A Markdown table; `align` has a letter, l or r, for each column."""
    rules = [":---" if a == "l" else "---:" for a in align or "l" * len(columns)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rules, *rows))


def evaluation(path: str) -> str:
    """The rows of `swan evaluate --json`, or how to make them."""
    command = "swan evaluate smollm2-135m --json"
    if not Path(path).is_file():
        return (
            "!!! note\n    The measurements have not been made in this checkout. Make them with\n"
            f"    `{command} > {path}` (embedded model, 8 windows of 1024 tokens of research papers)."
        )
    result = json.loads(Path(path).read_text())
    head, settings = result["rows"][0], result["settings"]
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
    note = (
        f"{head['model']} on {head['text']}, {settings['windows']} windows of {settings['length']} tokens, "
        f"{settings['dtype']}, compression active as in decoding. Increase: over the dense cache, with the paired "
        "standard error over windows. KL: in nats per token. Same token: share of positions whose likeliest next token "
        f"is the dense one. Made by `{command}`."
    )
    return table(columns, [_evaluated(row) for row in result["rows"]], "lllrrrrr") + "\n\n" + note


def _evaluated(row: dict[str, Any]) -> list[str]:
    about, error = row["settings"], row["standard_error"]
    increase = f"{100 * row['perplexity_increase']:+.2f}&nbsp;%"
    if row["form"] == "dense":
        form, increase = "dense cache", "-"
    elif "keys" not in about:
        form = "nothing (window only)"
    elif about["keys"] == about["values"]:
        form = _layout(about["keys"])
    else:
        form = f"K {_layout(about['keys'])}; V {_layout(about['values'])}"
    if increase != "-" and error is not None:
        increase += f"&nbsp;±&nbsp;{100 * error:.2f}"
    return [
        form,
        about.get("basis", "-") if "keys" in about else "-",
        f"{about['buffer']}&nbsp;+&nbsp;{about['sinks']}" if about else "-",
        f"{row['retention']:.2f}",
        f"{row['perplexity']:.2f}",
        increase,
        f"{row['kl']:.3f}",
        f"{100 * row['agreement']:.1f}&nbsp;%",
    ]


def _layout(layout: dict[str, Any]) -> str:
    if layout["form"] == "graded":
        return "graded " + " + ".join(f"{size} at {bits} bit" for size, bits in layout["groups"])
    index = ", index list" if layout["positions"] == "index" else ""
    return f"top {layout['keep']} of {layout['d']}, {layout['bits']} bit{index}"


def commands() -> str:
    """The commands of the command line."""
    import typer

    from swan.cli.app import app

    return table(
        ("command", "what it does"),
        [[f"`{name}`", about] for name, about in _commands(typer.main.get_command(app), "swan")],
    )


def _commands(command: Any, name: str) -> list[tuple[str, str]]:
    children = getattr(command, "commands", None)
    if not children:
        return [(f"{name} {_arguments(command)}".strip(), command.help.splitlines()[0])]
    return [row for child, below in children.items() for row in _commands(below, f"{name} {child}")]


def _arguments(command: Any) -> str:
    return " ".join(p.name.upper() for p in command.params if p.param_type_name == "argument")


GROUPS = {
    "Functional": (
        *("rotate", "inverse_rotate", "random_rotation", "fold_value_rotation", "topk_prune", "graded_prune"),
        *("dense_attention", "packed_attention", "merge_attention", "swan_attention"),
    ),
    "Storage": ("TopK", "Graded", "PlanLayer", "Packed", "pack", "unpack"),
    "Modules": ("OrthoRotation", "StructuredPruner", "DenseBuffer", "KVCache", "SwanAttention"),
    "Calibration and plans": ("calibrate", "Calibration", "Plan"),
    "Hugging Face": ("attach", "detach", "SwanCache"),
}


def public_names(group: str) -> str:
    """A list of the public names of a group; each name of swan must be in one group."""
    grouped = [name for names in GROUPS.values() for name in names]
    public = [
        n for n, x in inspect.getmembers(swan) if n[0] != "_" and str(getattr(x, "__module__", "")).startswith("swan")
    ]
    if sorted(grouped) != public:
        raise ValueError(f"docs/tables.py groups {sorted(set(grouped) ^ set(public))} otherwise than swan has them")
    return "\n".join(f"- [`{name}`][swan.{name}]: {_summary(getattr(swan, name))}" for name in GROUPS[group])


def _summary(thing: Any) -> str:
    first = re.split(r"\n\s*\n", inspect.getdoc(thing) or "")[0]
    return " ".join(first.split())
