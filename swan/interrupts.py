"""Ctrl-C in swan's commands: one line and status 130, whatever runs; imported before torch.

While modules are imported there is nothing to tidy up, and an exception might be swallowed: the process ends at once.
Afterwards the first Ctrl-C raises KeyboardInterrupt, so that scratch folders are removed; the second ends the process,
and so do some seconds in which the first came to nothing, and an exception that nobody catches: before and after a
command there is nobody, and C code reports there what it cannot raise.
"""

import atexit
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["STATUS", "during_imports", "during_work", "happened", "is_command"]

STATUS = 130
PATIENCE = 5  # seconds to tidy up

is_command = Path(sys.argv[0]).name in ("swan", "swan.exe")
_happened = False


def happened() -> bool:
    """Tell if Ctrl-C was pressed while a command worked: any exception after that comes of it."""
    return _happened


def during_imports() -> None:
    """End the process at Ctrl-C."""
    signal.signal(signal.SIGINT, _leave)


def during_work() -> None:
    """Raise KeyboardInterrupt at the first Ctrl-C, and end the process if that does not."""
    signal.signal(signal.SIGINT, _interrupt)
    if hasattr(signal, "SIGALRM"):  # Python gives signals back before it unloads modules: the alarm would kill it then
        atexit.register(signal.alarm, 0)


def _interrupt(*_: Any) -> None:
    global _happened
    _happened = True
    signal.signal(signal.SIGINT, _leave)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _leave)
        signal.alarm(PATIENCE)
    # Without these an exception in a finalizer, in another thread or outside of commands would show its traceback.
    sys.unraisablehook = threading.excepthook = lambda _: None
    sys.excepthook = _leave
    raise KeyboardInterrupt


def _leave(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(STATUS)


if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it
    during_imports()
