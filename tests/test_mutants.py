"""The mutants of `make mutants` are current; that tests notice them is for it to run, in minutes."""

import ast
from pathlib import Path

import pytest

from tests.mutant_list import MUTANTS
from tests.mutants import ROOT, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_can_be_made(mutant):
    """The text that it replaces is there once, Python reads the result if it is Python, and its tests are there."""
    source = (ROOT / mutant.file).read_text()
    read = (lambda text: ast.dump(ast.parse(text))) if mutant.file.endswith(".py") else str
    assert read(mutated(source, mutant)) != read(source)
    assert all((ROOT / "tests" / Path(test.split("::")[0])).is_file() for test in mutant.tests)


def test_names_are_told_apart():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_a_mutant_that_is_not_current_is_refused():
    with pytest.raises(ValueError, match=r"has .* 0 times, once was expected"):
        mutated("", MUTANTS[0])
    with pytest.raises(ValueError, match=r"has .* 2 times, once was expected"):
        mutated(2 * MUTANTS[0].old, MUTANTS[0])
