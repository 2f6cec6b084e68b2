"""The command line: `swan info`, `calibrate`, `generate`, `evaluate`, `frontier`, `bench` and `demo`."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from swan.cli.app import app
    except ImportError as error:
        if error.name in ("typer", "rich"):
            sys.exit("the command line needs typer and rich: pip install 'swan-attention[cli,hf]'")
        raise
    app()
