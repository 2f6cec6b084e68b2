"""The public names and their signatures as text: a test compares it with a file, `make public-names` writes that.

Public is what `import swan` shows, what `swan.functional` and `swan.modules` offer, and what the pages of docs/api
describe; of a class, the members that swan itself defines.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import swan
import swan.functional
import swan.modules

FILE = Path(__file__).with_suffix(".txt")
API = Path(__file__).parents[1] / "docs/api"
ON_A_PAGE = re.compile(r"^::: (swan\S+)$", re.MULTILINE)
FOLDERS = re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])")  # where a type is defined is not public
HOOKS = {"extra_repr"}  # called by torch, not by users


class Written(str):
    """An annotation that is text already: printed without quotes."""

    __repr__ = str.__str__


def names() -> list[str]:
    """Dotted names of all that is public, the shortest first."""
    names = {f"swan.{name}" for name in dir(swan)}
    for module in (swan.functional, swan.modules):
        own = [name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)]
        names |= {f"{module.__name__}.{name}" for name in own}
    for page in API.glob("*.md"):
        names |= set(ON_A_PAGE.findall(page.read_text()))
    return sorted(names, key=lambda name: (name.count("."), name))


def text() -> str:
    """A line for each name and for each member of a class."""
    lines, shown = [], {}
    for name in names():
        value = _value(name)
        if callable(value) and value in shown:
            lines.append(f"{name} is {shown[value]}")
            continue
        lines.append(name + _signature(value))
        if inspect.isclass(value):
            lines += [f"    .{member}" for member in _members(value)]
        if callable(value):
            shown[value] = name
    return "\n".join(lines) + "\n"


def _value(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def _members(cls: type) -> Iterator[str]:
    ours = [base for base in cls.__mro__ if base.__module__.startswith("swan.")]
    for name in sorted({name for base in ours for name in vars(base) if name[0] != "_"} - HOOKS):
        yield name + _signature(getattr(cls, name))


def _signature(value: Any) -> str:
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return ""  # a property, a field, or a value
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=_written(p.annotation)) for p in signature.parameters.values()]
    returned = signature.replace(parameters=parameters, return_annotation=_written(signature.return_annotation))
    return FOLDERS.sub("", str(returned))


def _written(annotation: Any) -> Any:
    return Written(annotation) if isinstance(annotation, str) else annotation


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"{FILE.relative_to(Path.cwd())}: {len(names())} names; git diff shows what changed")
