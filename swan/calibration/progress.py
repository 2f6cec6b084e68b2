"""A progress bar where rich is installed."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, show: bool = True) -> Iterator[T]:
    """Yield the items; a terminal sees a bar that goes away when they are done."""
    if show:
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
    yield from items
