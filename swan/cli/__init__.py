"""The command line: `swan info`, `calibrate`, `generate`, `evaluate`, `frontier`, `serve`, `capacity`, `bench` ..."""

import signal
import sys

from swan import interrupts

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from swan.cli.app import app
    except ImportError as error:
        if error.name in ("typer", "rich"):
            sys.exit("the command line needs typer and rich: pip install 'swan-attention[cli,hf]'")
        raise
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        interrupts.during_work()
    app()
