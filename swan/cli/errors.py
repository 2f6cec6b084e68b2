"""What a command says and how it ends when something goes wrong: one line on stderr, and a status."""

import contextlib
import os
import sys
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from swan import interrupts
from swan.cli.common import messages

__all__ = ["Commands"]

FAILED, USAGE, CLOSED_PIPE = 1, 2, 141
EXPECTED = (ValueError, TypeError, ImportError, OSError, RuntimeError, MemoryError)  # others are bugs: with a traceback


class Commands(TyperGroup):
    """A group of commands that ends with status 1 on failure, 2 on usage, 130 on Ctrl-C and 141 on a closed pipe."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; write out all that it printed."""
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except BrokenPipeError as error:  # typer would end with status 1
            raise typer.Exit(CLOSED_PIPE) from error

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line and leave the process."""
        try:
            status = super().main(*args, standalone_mode=False, **kwargs)
        except SystemExit as error:  # of rich and typer, where nobody reads what they print
            status = CLOSED_PIPE if error.code == FAILED else error.code
        except BaseException as error:
            status = _failed(error)
        if status == CLOSED_PIPE or not _is_flushed():
            _forget_output()
        if interrupts.happened() or status == interrupts.STATUS:
            _say("interrupted")
            status = interrupts.STATUS
        sys.exit(status)


def _failed(error: BaseException) -> int:
    """Say what went wrong; return the status, or raise the error where it is a bug."""
    if interrupts.happened() or isinstance(error, KeyboardInterrupt | typer.Abort):
        return interrupts.STATUS
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is the message, and is printed by asking for it
        print(vars(error)["ctx"].get_help(), file=sys.stderr, end="")
        return USAGE
    if (message := getattr(error, "format_message", None)) is not None:  # of typer
        context: Any = getattr(error, "ctx", None)
        _say(f"{message()} (see {context.command_path if context else 'swan'} --help)", "error: ")
        return USAGE
    if not isinstance(error, EXPECTED):
        raise error
    _say(_sentence(error), "error: ")
    return FAILED


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the output'}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _say(message: str, label: str = "") -> None:
    """Print one line on stderr; it may be closed."""
    with contextlib.suppress(OSError, SystemExit):
        messages.print(Text.assemble((label, "bold red"), message), soft_wrap=True)


def _is_flushed() -> bool:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        return False
    return True


def _forget_output() -> None:
    """Let what is left to write go nowhere: Python would try again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
