"""Rotations are orthogonal: scores, norms and whole value paths stay what they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import fold_value_rotation, inverse_rotate, random_rotation, rotate
from swan.functional import reference
from swan.functional.rotation import check_basis
from tests.strategies import DTYPES, U32, assert_within, bases, double, dtypes, heads, ids, normal, seeds, unit

dims = st.sampled_from([16, 17, 63, 64, 128, 256]) | st.integers(16, 256)
kinds = st.sampled_from(["random", "identity"])


def defect(basis):
    """Measure a matrix's distance from orthogonal, at most ``|P P^T - I|``: its entries are rounded to the dtype."""
    wide = basis.double()
    return (wide @ wide.mT - torch.eye(basis.shape[-1])).norm(dim=(1, 2)).max().item()


def rotation_error(d, dtype):
    """Norm of ``fl(x P) - x P`` over the norm of x: d products and sums in float32, one rounding to the dtype.

    Each of the d coordinates is off by at most ``(d U32 + u) |x|`` (Cauchy-Schwarz with a unit column).
    """
    return d**0.5 * (d * U32 + unit(dtype))


@given(seeds, dims, heads, dtypes, kinds, st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_scores_do_not_change(seed, d, head_counts, dtype, kind, batch, queries, tokens):
    count, kv_count = head_counts
    q = normal(seed, batch, count, queries, d, dtype=dtype)
    k = normal(seed + 1, batch, kv_count, tokens, d, dtype=dtype)
    basis = bases(seed, kv_count, d, kind, dtype)
    q_wide, k_wide, q_turned, k_turned = double(q, k, rotate(q, basis), rotate(k, basis))
    groups = count // kv_count
    before = q_wide @ k_wide.repeat_interleave(groups, dim=1).mT
    after = q_turned @ k_turned.repeat_interleave(groups, dim=1).mT
    lengths = q_wide.norm(dim=-1)[..., None] * k_wide.norm(dim=-1).repeat_interleave(groups, dim=1)[:, :, None]
    one = (1 + defect(basis)) * rotation_error(d, dtype)
    assert_within(after, before, lengths * (2 * one + one**2 + defect(basis)), "score")


@given(seeds, dims, heads, dtypes, kinds)
def test_norms_and_inverse(seed, d, head_counts, dtype, kind):
    x, basis = normal(seed, 2, head_counts[0], 3, d, dtype=dtype), bases(seed, head_counts[1], d, kind, dtype)
    turned = rotate(x, basis)
    lengths = x.double().norm(dim=-1)
    one = (1 + defect(basis)) * rotation_error(d, dtype) + defect(basis)
    assert_within(turned.double().norm(dim=-1), lengths, lengths * one, "norm")
    back = inverse_rotate(turned, basis)
    assert back.dtype == dtype
    assert_within((back.double() - x.double()).norm(dim=-1), 0 * lengths, lengths * (2 * one + one**2), "inverse")


@given(seeds, dims, heads, dtypes)
def test_rotate_is_its_reference(seed, d, head_counts, dtype):
    x, basis = normal(seed, 2, head_counts[0], 3, d, dtype=dtype), bases(seed, head_counts[1], d, "random", dtype)
    expected = reference.rotate(*double(x, basis))
    assert_within(rotate(x, basis), expected, x.double().norm(dim=-1)[..., None] * rotation_error(d, dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=ids)
@pytest.mark.parametrize("d", [1, 16, 63, 256])
def test_random_rotation_is_orthogonal(d, dtype):
    basis = random_rotation(3, d, seed=1, dtype=dtype)
    check_basis(basis)
    assert torch.equal(basis, random_rotation(3, d, seed=1, dtype=dtype))
    assert not torch.equal(basis, random_rotation(3, d, seed=2, dtype=dtype)) or d == 1


@pytest.mark.parametrize("d", [1, 16, 63])
def test_random_rotation_is_uniform(d):
    """By Mezzadri's theorem it is, as the Q of a Gaussian matrix whose R has a positive diagonal; this Q is unique."""
    gaussian = torch.randn(3, d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    r = random_rotation(3, d, seed=5, dtype=torch.float64).mT @ gaussian
    assert_within(r.tril(-1), torch.zeros_like(r), 8 * d * unit(torch.float64) * float(gaussian.norm()))
    assert (r.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize(("count", "kv_count", "d"), [(3, 3, 17), (6, 2, 16), (5, 1, 63)], ids=["mha", "gqa", "mqa"])
def test_folding_keeps_the_layer(count, kv_count, d, dtype, bias):
    dim, tokens, groups = 40, 7, count // kv_count
    v_weight = normal(0, kv_count * d, dim).to(dtype)
    o_weight = normal(1, dim, count * d).to(dtype)
    v_bias = normal(2, kv_count * d).to(dtype) if bias else None
    basis = random_rotation(kv_count, d, seed=0, dtype=torch.float64)
    folded = fold_value_rotation(v_weight, o_weight, basis, v_bias)
    assert [None if t is None else t.dtype for t in folded] == [dtype, dtype, dtype if bias else None]

    x = normal(3, tokens, dim).double()
    weights = normal(4, count, tokens, tokens).double().softmax(-1)

    def path(v_weight, o_weight, v_bias, x):
        values = x @ v_weight.double().T + (0 if v_bias is None else v_bias.double())
        values = values.view(tokens, kv_count, d).transpose(0, 1).repeat_interleave(groups, dim=0)
        return (weights @ values).transpose(0, 1).reshape(tokens, -1) @ o_weight.double().T

    # Both folded weights are rounded once; besides, sums in float64.
    sizes = path(*(None if t is None else t.abs() for t in folded), x.abs())
    noise = 4 * (dim + 2 * d + tokens + count * d) * unit(torch.float64) * d
    assert_within(path(*folded, x), path(v_weight, o_weight, v_bias, x), sizes * (2 * unit(dtype) + noise))


def test_gradients_flow_through_rotate():
    x = normal(0, 1, 4, 3, 16).requires_grad_()
    basis = random_rotation(2, 16, seed=0)
    inverse_rotate(rotate(x, basis), basis).sum().backward()
    assert_within(x.grad, torch.ones_like(x), 2 * 4 * rotation_error(16, torch.float32) + 4 * defect(basis))


X, BASIS = torch.zeros(1, 4, 3, 16), torch.eye(16).repeat(2, 1, 1)


@pytest.mark.parametrize("function", [rotate, inverse_rotate])
@pytest.mark.parametrize(
    ("x", "basis", "error", "message"),
    [
        (X, BASIS[0], ValueError, r"shape \[kv_heads, d, d\], got \[16, 16\]"),
        (X, BASIS[:, :8], ValueError, r"shape \[kv_heads, d, d\], got \[2, 8, 16\]"),
        (X[0], BASIS, ValueError, r"heads a multiple of 2, got \[4, 3, 16\]"),
        (X[:, :3], BASIS, ValueError, r"heads a multiple of 2, got \[1, 3, 3, 16\]"),
        (X[..., :8], BASIS, ValueError, r"tokens, 16\] .*, got \[1, 4, 3, 8\]"),
        (X.bfloat16(), BASIS, TypeError, r"use basis\.to\(torch\.bfloat16\)"),
        (X, BASIS.to("meta"), ValueError, "x is on cpu and the basis on meta"),
    ],
    ids=["2d", "oblong", "x3d", "heads", "d", "dtype", "device"],
)
def test_rotate_refuses(function, x, basis, error, message):
    with pytest.raises(error, match=message):
        function(x, basis)


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (BASIS[0], r"shape \[kv_heads, d, d\]"),
        (BASIS * float("nan"), "NaN or infinity; calibrate again"),
        (BASIS * 1.001, r"not orthogonal: max .* = 0\.002 is above 9\.5e-07 for torch\.float32"),
    ],
    ids=["2d", "nan", "scaled"],
)
def test_check_basis_refuses(basis, message):
    with pytest.raises(ValueError, match=message):
        check_basis(basis)


@pytest.mark.parametrize(("rows", "columns"), [(31, 64), (32, 63)])
def test_fold_refuses(rows, columns):
    with pytest.raises(ValueError, match=r"needs a value weight \[32, dim\] and an output weight"):
        fold_value_rotation(torch.zeros(rows, 8), torch.zeros(8, columns), BASIS)
