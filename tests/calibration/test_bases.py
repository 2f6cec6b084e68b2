import pytest
import torch

from swan.calibration.bases import layer_bases
from swan.calibration.moments import Moments

BASES = ("joint", "pca", "random", "identity")
each_basis = pytest.mark.parametrize("basis", BASES)


def moments_of(kv_heads=2, d=16, dv=12, seed=0):
    """Moments of vectors of very different lengths along random directions."""
    generator = torch.Generator().manual_seed(seed)

    def moment(n):
        x = torch.randn(kv_heads, 200, n, generator=generator, dtype=torch.float64)
        x = x * torch.logspace(0, -2, n, dtype=torch.float64)
        x = x @ torch.linalg.qr(torch.randn(kv_heads, n, n, generator=generator, dtype=torch.float64)).Q
        return x.mT @ x

    return Moments(3 * moment(d), moment(d), moment(dv), 7 * moment(dv), tokens=200)


def unit(moment):
    return moment / moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def measures(moments, basis):
    """The matrices that importance is measured with: of keys and of values."""
    if basis == "pca":
        return unit(moments.k), unit(moments.v)
    return (unit(moments.q) + unit(moments.k)) / 2, (unit(moments.v) + unit(moments.o)) / 2


@each_basis
def test_are_orthogonal(basis):
    for columns in layer_bases(moments_of(), basis, seed=0)[:2]:
        identity = torch.eye(columns.shape[-1], dtype=torch.float64).expand_as(columns)
        torch.testing.assert_close(columns.mT @ columns, identity, rtol=0, atol=1e-13)


@each_basis
def test_spectra_are_shares_of_importance_and_descend(basis):
    moments = moments_of()
    *bases, key_spectrum, value_spectrum = layer_bases(moments, basis, seed=0)
    for columns, spectrum, measure in zip(bases, (key_spectrum, value_spectrum), measures(moments, basis), strict=True):
        torch.testing.assert_close(spectrum.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-13)
        assert (spectrum.diff(dim=-1) <= 0).all()
        for head in range(2):
            for i in range(columns.shape[-1]):
                share = columns[head, :, i] @ measure[head] @ columns[head, :, i]
                assert spectrum[head, i].item() == pytest.approx(share.item(), abs=1e-13)


@pytest.mark.parametrize("basis", ["joint", "pca"])
def test_are_eigenvectors(basis):
    moments = moments_of()
    *bases, key_spectrum, value_spectrum = layer_bases(moments, basis, seed=0)
    for columns, spectrum, measure in zip(bases, (key_spectrum, value_spectrum), measures(moments, basis), strict=True):
        torch.testing.assert_close(measure @ columns, columns * spectrum[:, None], rtol=0, atol=1e-13)
        eigenvalues = torch.linalg.eigvalsh(measure).flip(-1)
        torch.testing.assert_close(spectrum, eigenvalues, rtol=0, atol=1e-13)


def test_joint_captures_most_and_identity_keeps_the_axes():
    moments = moments_of()
    leading = {basis: layer_bases(moments, basis, seed=0)[2].cumsum(-1) for basis in ("joint", "random", "identity")}
    assert (leading["joint"] >= leading["random"] - 1e-13).all()
    assert (leading["joint"] >= leading["identity"] - 1e-13).all()
    axes = layer_bases(moments, "identity", seed=0)[0]
    assert torch.equal(axes.sum(-1), torch.ones(2, 16, dtype=torch.float64))
    assert set(axes.unique().tolist()) == {0.0, 1.0}


def test_length_of_queries_against_keys_does_not_matter():
    moments = moments_of()
    longer = Moments(100 * moments.q, moments.k, moments.v, 100 * moments.o)
    for a, b in zip(layer_bases(moments, "joint", seed=0)[2:], layer_bases(longer, "joint", seed=0)[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_random_follows_its_seed():
    same, again, other = (layer_bases(moments_of(d=12), "random", seed=seed) for seed in (5, 5, 6))
    assert torch.equal(same[0], again[0]) and torch.equal(same[1], again[1])
    assert not torch.allclose(same[0], other[0])
    assert not torch.allclose(same[0].abs(), same[1].abs())  # keys and values draw apart


@each_basis
def test_a_head_without_energy_gets_a_basis_too(basis):
    moments = moments_of()
    for moment in (moments.q, moments.k, moments.v, moments.o):
        moment[1] = 0
    for columns in layer_bases(moments, basis, seed=0)[:2]:
        identity = torch.eye(columns.shape[-1], dtype=torch.float64).expand_as(columns)
        torch.testing.assert_close(columns.mT @ columns, identity, rtol=0, atol=1e-13)
    assert torch.isfinite(layer_bases(moments, basis, seed=0)[2]).all()


def test_refuses_an_unknown_basis():
    with pytest.raises(ValueError, match="basis must be one of joint, pca, random, identity, got 'fourier'"):
        layer_bases(moments_of(), "fourier", seed=0)
