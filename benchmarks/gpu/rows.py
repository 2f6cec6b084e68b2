"""Rows of results: their types, what they say of a failure, and how a process hands them on."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from swan.evaluation.machine import TooLong

Row = dict[str, Any]
Job = tuple[str, Callable[[], Iterator[Row]]]
MARK = "@"  # begins a line for the process that started this one


def guarded(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows until one raises an error, then a row that says so."""
    try:
        yield from rows
    except TooLong as late:
        yield outcome(name, "skipped", str(late))
    except Exception as failure:
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        yield outcome(name, "failed", f"{type(failure).__name__}: {' '.join(lines[:2])}"[:400])


def outcome(name: str, result: str, reason: str) -> Row:
    """Make a row of something that has no number."""
    return {"case": name, "error": None, "bound": None, "result": result, "reason": reason}


def emit(kind: str, content: Any) -> None:
    """Write a line for the process that started this one."""
    sys.stdout.write(f"{MARK}{json.dumps({kind: content})}\n")
    sys.stdout.flush()
