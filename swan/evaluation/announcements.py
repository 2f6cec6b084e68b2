"""Announcements of slow work on stderr."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

__all__ = ["announced"]

QUIET_SECONDS = 2.0  # of work that is not announced


@contextlib.contextmanager
def announced(message: str) -> Iterator[None]:
    """Announce on stderr work that takes over two seconds: by a spinner with rich on a terminal, else by a line."""
    done = threading.Event()

    def show(stream: TextIO) -> None:
        if done.wait(QUIET_SECONDS):
            return
        if stream.isatty() and importlib.util.find_spec("rich"):
            from rich.console import Console
            from rich.live import Live
            from rich.spinner import Spinner

            # No redirection of sys.stderr: the caller's thread may be redirecting it too.
            with Live(
                Spinner("dots", message),
                console=Console(file=stream),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            ):
                done.wait()
        else:
            print(f"{message} ...", file=stream, flush=True)

    thread = threading.Thread(target=show, args=(sys.stderr,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
