"""`attach` and `detach` on models of one's own, made of `SwanAttention`."""

import pytest
import torch
from torch import nn

from swan import SwanAttention, attach, calibrate, detach


@pytest.fixture
def own():
    torch.manual_seed(1)
    return nn.Sequential(*(SwanAttention(32, heads=4, kv_heads=2) for _ in range(2)))


def test_own_model_gets_the_bases_and_gives_them_back(own):
    x = torch.randn(1, 9, 32)
    before = {name: t.clone() for name, t in own.state_dict().items()}
    expected = own(x)
    calibration = calibrate(own, [torch.randn(2, 30, 32)])
    attach(own, calibration)
    for layer, bases in zip(own, calibration.layers, strict=True):
        assert torch.equal(layer.key_basis, bases.key_basis)
        assert torch.equal(layer.value_basis, bases.value_basis)
    assert torch.equal(own(x), expected)  # without a cache nothing is rotated
    detach(own)
    assert all(torch.equal(t, before[name]) for name, t in own.state_dict().items())


def test_own_model_cannot_be_folded(own):
    with pytest.raises(ValueError, match="fold=True is for transformers models"):
        attach(own, calibrate(own, [torch.randn(1, 5, 32)]), fold=True)


def test_own_model_refuses_the_calibration_of_another(own):
    with pytest.raises(ValueError, match="another model"):
        attach(own, calibrate(nn.Sequential(SwanAttention(32, heads=4)), [torch.randn(1, 5, 32)]))


def test_one_contract_for_models_of_ones_own():
    """As for those of transformers: attached once, detached once."""
    model = torch.nn.Sequential(SwanAttention(64, heads=4))
    calibration = calibrate(model, [torch.randn(2, 50, 64)])
    with pytest.raises(ValueError, match="not attached; there is nothing to detach"):
        detach(model)
    for basis in (calibration, calibrate(model, [torch.randn(2, 50, 64)], "identity")):
        attach(model, basis)
        with pytest.raises(ValueError, match=r"already attached; call swan\.detach"):
            attach(model, calibration)
        detach(model)
    assert not model[0].has_bases
    attach(model, calibration)
    other = torch.nn.Sequential(SwanAttention(64, heads=4))
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"already attached; call swan\.detach"):
        attach(other, calibration)
    detach(other)
