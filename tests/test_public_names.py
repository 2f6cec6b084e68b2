"""What is public changes on purpose only."""

import difflib

import pytest

pytest.importorskip("transformers")

from tests import public_names

ADVICE = (
    "What is public has changed. If that is meant: `make public-names`, say so in CHANGELOG.md, and where something "
    "went or was renamed, read about deprecation in CONTRIBUTING.md."
)


def test_public_names_and_signatures_are_those_of_the_file():
    before, now = public_names.FILE.read_text().splitlines(), public_names.text().splitlines()
    changes = [line for line in difflib.unified_diff(before, now, "committed", "now", lineterm="", n=0)]
    assert not changes, "\n".join([ADVICE, *changes])
