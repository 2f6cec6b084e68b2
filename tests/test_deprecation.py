"""Old names: they work, warn once where they are used, and say what to write instead."""

import inspect
import warnings

import pytest
import torch

from swan import deprecation
from swan.deprecation import renamed_arguments, warn_renamed


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(deprecation, "_warned", set())


@renamed_arguments("0.4", kept="keep", width="bits")
def prune(x: int, keep: int, bits: int = 8) -> tuple[int, int, int]:
    """Take three numbers."""
    return x, keep, bits


def test_an_old_argument_works_and_warns_once_where_it_is_used():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [prune(1, kept=2) for _ in range(2)] == [(1, 2, 8)] * 2
        assert prune(1, 2, width=4) == (1, 2, 4)
    assert [(w.category, str(w.message)) for w in caught] == [
        (FutureWarning, "kept of prune goes in swan 0.4; use keep"),
        (FutureWarning, "width of prune goes in swan 0.4; use bits"),
    ]
    assert {w.filename for w in caught} == {__file__}


def test_new_arguments_do_not_warn_and_the_signature_is_that_of_the_function():
    assert prune(1, keep=2, bits=4) == (1, 2, 4)
    assert list(inspect.signature(prune).parameters) == ["x", "keep", "bits"]


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match="prune got keep and kept, its old name; give keep only"):
        prune(1, keep=2, kept=2)


def test_an_old_name_of_a_module_warns_where_it_is_read():
    def read_old_name():
        warn_renamed("swan.Cache", "swan.KVCache", "0.4")

    with pytest.warns(FutureWarning, match=r"^swan\.Cache goes in swan 0\.4; use swan\.KVCache$") as caught:
        read_old_name()
    assert caught[0].filename == __file__
    read_old_name()  # a second warning would be an error


def test_compiled_code_takes_old_arguments_without_a_graph_break():
    @renamed_arguments("0.4", factor="scale")
    def scaled(x, scale):
        return x * scale

    x = torch.arange(3.0)
    compiled = torch.compile(lambda x: scaled(x, factor=2), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x)
