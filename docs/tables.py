"""Tables of the pages, generated from the library."""

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import swan
from swan.integrations.architectures import ARCHITECTURES


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = ""
) -> str:
    """Write a Markdown table; `align` has a letter, l or r, for each column."""
    rules = [":---" if a == "l" else "---:" for a in align or "l" * len(columns)]
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (columns, rules, *rows)
    )


def architectures() -> str:
    """List what is known of architectures of transformers."""
    words = {True: "yes", False: "no"}
    rows = [
        [f"`{name}`", words[a.supported], words[a.fold], a.note]
        for name, a in ARCHITECTURES.items()
    ]
    return table(("architecture", "supported", "`fold=True`", "note"), rows, "llll")


def commands() -> str:
    """List the commands of the command line."""
    import typer
    from swan.cli.app import app

    return table(
        ("command", "what it does"),
        [
            [f"`{name}`", about]
            for name, about in _commands(typer.main.get_command(app), "swan")
        ],
    )


def _commands(command: Any, name: str) -> list[tuple[str, str]]:
    children = getattr(command, "commands", None)
    if not children:
        return [
            (f"{name} {_arguments(command)}".strip(), command.help.splitlines()[0])
        ]
    return [
        row
        for child, below in children.items()
        for row in _commands(below, f"{name} {child}")
    ]


def _arguments(command: Any) -> str:
    return " ".join(
        p.name.upper() for p in command.params if p.param_type_name == "argument"
    )


GROUPS = {
    "Functional": (
        *(
            "rotate",
            "inverse_rotate",
            "random_rotation",
            "fold_value_rotation",
            "topk_prune",
            "graded_prune",
        ),
        *(
            "dense_attention",
            "packed_attention",
            "merge_attention",
            "swan_attention",
        ),
    ),
    "Storage": (
        "TopK",
        "Graded",
        "ByHead",
        "Layout",
        "LayerPlan",
        "Packed",
        "pack",
        "unpack",
    ),
    "Modules": (
        "OrthoRotation",
        "StructuredPruner",
        "DenseBuffer",
        "KVCache",
        "SwanAttention",
    ),
    "Calibration and plans": ("calibrate", "Calibration", "Plan"),
    "Hugging Face": (
        "attach",
        "detach",
        "SwanCache",
        "save_pretrained",
        "from_pretrained",
        "supported",
    ),
}


def public_names(group: str) -> str:
    """List the public names of a group; each name of swan must be in one group."""
    grouped = [name for names in GROUPS.values() for name in names]
    public = [
        n
        for n, x in inspect.getmembers(swan)
        if n[0] != "_" and str(getattr(x, "__module__", "")).startswith("swan")
    ]
    if sorted(grouped) != public:
        raise ValueError(
            f"docs/tables.py groups {sorted(set(grouped) ^ set(public))} otherwise than swan has them"
        )
    return "\n".join(
        f"- [`{name}`][swan.{name}]: {_summary(getattr(swan, name))}"
        for name in GROUPS[group]
    )


def _summary(thing: Any) -> str:
    first = re.split(r"\n\s*\n", inspect.getdoc(thing) or "")[0]
    return " ".join(first.split())


def source(*things: Any) -> str:
    """Show the source of functions and classes, and other lines as they are, as a block of Python."""
    parts = [
        thing if isinstance(thing, str) else inspect.getsource(thing)
        for thing in things
    ]
    return (
        "```python\n"
        + "\n\n".join(part.strip("\n") + "\n" for part in parts)
        + "```"
    )


def claims(rows: Sequence[tuple[str, str]]) -> str:
    """List what is claimed, and the test that holds it: ``tests/file.py::test_name``, which must exist."""
    for _, test in rows:
        path, name = test.split("::")
        if f"def {name}(" not in Path(path).read_text():
            raise ValueError(f"there is no test {test}")
    return table(
        ("claim", "held by"), [[claim, f"`{test}`"] for claim, test in rows]
    )
