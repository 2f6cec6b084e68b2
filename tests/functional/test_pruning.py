"""Pruning as mathematics; tests/storage/test_packed.py checks that storage agrees with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import graded_prune, topk_prune
from swan.functional import reference
from tests.strategies import distinct, dtypes, graded_layouts, normal, seeds


@given(seeds, st.integers(1, 70), dtypes, st.data())
def test_topk_is_its_reference(seed, d, dtype, data):
    keep = data.draw(st.integers(1, d))
    x = distinct(seed, 2, 3, d, dtype=dtype)
    assert torch.equal(topk_prune(x, keep), reference.topk_prune(x, keep))


@given(seeds, st.integers(2, 70), dtypes, st.data())
def test_graded_is_its_reference(seed, d, dtype, data):
    groups = data.draw(graded_layouts(d)).groups
    x = normal(seed, 2, 3, d, dtype=dtype)
    assert torch.equal(graded_prune(x, groups), reference.graded_prune(x, groups))


@pytest.mark.parametrize("keep", [1, 5, 16])
def test_ties_keep_exactly_keep(keep):
    x = torch.where(normal(0, 50, 16) > 0, 1.0, -1.0)
    assert (topk_prune(x, keep) != 0).sum(-1).eq(keep).all()


def test_gradients_reach_what_is_kept():
    x = torch.tensor([3.0, -1.0, 0.5, -2.0], requires_grad=True)
    topk_prune(x, 2).sum().backward()
    assert x.grad.tolist() == [1, 0, 0, 1]
    x.grad = None
    graded_prune(x, ((1, 0), (2, 16), (1, 0))).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("keep", [0, 5])
def test_topk_refuses(keep):
    with pytest.raises(ValueError, match=f"between 1 and d = 4, got {keep}"):
        topk_prune(torch.zeros(4), keep)


def test_graded_refuses():
    with pytest.raises(ValueError, match="groups sum to 5 coordinates, x has 4"):
        graded_prune(torch.zeros(4), ((3, 16), (2, 0)))
