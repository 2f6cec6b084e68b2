"""Progress of long loops: a bar on a terminal where rich is installed, else lines."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")
SECONDS = 5.0  # seconds from one line to the next


def track(items: Iterable[T], description: str, *, show: bool = True) -> Iterator[T]:
    """Yield the items; a terminal sees a bar that goes away when they are done, anything else a line every few seconds.

    Lines go to stderr; work that is done sooner prints none.
    """
    if not show:
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        pass
    else:
        console = Console(stderr=True)
        if console.is_terminal:
            yield from rich_track(items, description, console=console, transient=True)
            return
    yield from _with_lines(items, description)


def _with_lines(items: Iterable[T], description: str) -> Iterator[T]:
    total = f" of {len(items)}" if hasattr(items, "__len__") else ""  # pyright: ignore[reportArgumentType]
    start = last = time.monotonic()
    for done, item in enumerate(items):
        if done and time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            print(f"{description}: {done}{total}, {last - start:.0f} s", file=sys.stderr, flush=True)
        yield item
