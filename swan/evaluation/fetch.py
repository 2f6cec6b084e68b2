"""Fetches embedded models and evaluation texts into the cache folder.

python -m swan.evaluation.fetch NAME ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from swan.evaluation.models import MODELS, model_folder
from swan.evaluation.texts import TEXTS, texts_folder

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the named models and texts into the cache folder and print one line for each."""
    parser = argparse.ArgumentParser(prog="python -m swan.evaluation.fetch", description=main.__doc__)
    parser.add_argument("names", nargs="+", choices=(*MODELS, *TEXTS), metavar="NAME", help="%(choices)s")
    for name in parser.parse_args(arguments).names:
        folder = model_folder(name) if name in MODELS else texts_folder()
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{name}: {folder} ({size / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
