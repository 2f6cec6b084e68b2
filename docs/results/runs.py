"""Says how each result was made."""

from typing import Any

from tables import table

from . import data


def made_by(name: str) -> str:
    """Say by which command, when, on what and with what a result was made."""
    result = data.load(name)
    versions = ", ".join(
        f"{package} {version}"
        for package, version in result["versions"].items()
        if package != "swan"
    )
    about = f"Made by `{result['command']}` on {result['date']}; {_machine(result)}; {versions}."
    commands = result["settings"].get("runs", [])  # of the parts of a file
    if isinstance(commands, str):
        commands = [commands]
    return f"{about} Runs: {'; '.join(commands)}." if commands else about


def runs_table() -> str:
    """List all results, with what made them."""
    cells = []
    for name in data.names():
        result = data.load(name)
        versions = result["versions"]
        cells.append(
            [
                f"`{name}.json`",
                result["date"],
                _machine(result),
                f"{versions['torch']}, {versions['transformers']}",
                f"`{result['command']}`",
            ]
        )
    columns = ("file", "date", "machine", "torch, transformers", "command")
    return table(columns, cells)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if machine.get("gpu"):
        return machine["gpu"]
    return f"{machine.get('cpu') or machine['machine']}, {machine['cores']} cores"
