"""`OrthoRotation` and `StructuredPruner` mirror their functions."""

import pytest
import torch

from swan import Graded, OrthoRotation, StructuredPruner, TopK, inverse_rotate, pack, random_rotation, rotate, unpack
from tests.strategies import DTYPES, ids, normal


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_rotation_mirrors_rotate(dtype):
    basis, x = random_rotation(2, 17, seed=0, dtype=dtype), normal(0, 2, 6, 3, 17, dtype=dtype)
    rotation = OrthoRotation(basis)
    assert torch.equal(rotation(x), rotate(x, basis))
    assert torch.equal(rotation.inverse(x), inverse_rotate(x, basis))
    assert repr(rotation) == "OrthoRotation(kv_heads=2, d=17)"


def test_rotation_keeps_its_basis():
    basis = random_rotation(2, 16, seed=0)
    rotation, other = OrthoRotation(basis), OrthoRotation(random_rotation(2, 16, seed=1))
    basis.zero_()
    assert torch.equal(rotation.basis, random_rotation(2, 16, seed=0))
    other.load_state_dict(rotation.state_dict())
    assert torch.equal(other.basis, rotation.basis)
    assert rotation.to(torch.bfloat16).basis.dtype == torch.bfloat16
    assert not list(rotation.parameters())


def test_rotation_refuses():
    with pytest.raises(ValueError, match="the basis is not orthogonal"):
        OrthoRotation(torch.ones(2, 16, 16))


@pytest.mark.parametrize("layout", [TopK(17, 5), TopK(17, 5, bits=16), Graded.leading(17, 5)], ids=str)
def test_pruner_mirrors_pack(layout):
    x = normal(0, 2, 3, 4, 17)
    pruner = StructuredPruner(layout)
    assert torch.equal(unpack(pruner(x)), unpack(pack(x, layout)))
    assert repr(layout) in repr(pruner)
    with pytest.raises(ValueError, match=r"got \[2, 3, 4, 16\]"):
        pruner(x[..., 1:])
