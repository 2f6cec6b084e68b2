"""Rivals: their grids, their bytes, and that they see what they should."""

import math

import pytest
import torch

from swan import Graded, KVCache, LayerPlan, Plan, pack, unpack
from swan.evaluation.baselines import (
    KIVI_GROUP,
    Float8,
    Kivi,
    KiviHistory,
    LloydMax,
    TransformersQuantized,
    normal_grid,
    rivals,
)
from swan.evaluation.perplexity import Setting, evaluate
from swan.functional import reference
from tests.strategies import normal, one_thread  # noqa: F401
from tests.tiny import attached, calibration_of, tiny, tokens


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_normal_grid_has_the_error_of_the_tables(bits, error):
    """Squared errors of optimum quantizers for a normal variable, J. Max (1960)."""
    x = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    grid = normal_grid(bits).double()
    nearest = (x[:, None] - grid).abs().amin(-1)
    assert nearest.square().mean().item() == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("layout", [LloydMax(64, 4), LloydMax(63, 3), LloydMax(64, 2), Float8(64)], ids=str)
def test_layouts_store_their_bytes(layout):
    x = normal(0, 2, 3, 7, layout.d)
    packed = pack(x, layout)
    assert packed.nbytes == 42 * layout.vector_bytes()
    assert unpack(packed).shape == x.shape


def test_lloyd_max_error_after_rotation():
    x = normal(1, 1, 1, 2000, 64)
    error = (unpack(pack(x, LloydMax(64, 3))) - x).square().mean()
    assert error == pytest.approx(0.0345, rel=0.05)


def test_fp8_is_a_cast():
    x = normal(2, 1, 2, 5, 16) * 100
    assert torch.equal(unpack(pack(x, Float8(16))), x.to(torch.float8_e4m3fn).float())
    assert unpack(pack(torch.full((1, 1, 1, 16), 1e4), Float8(16))).eq(448).all()


def affine(x, dim, bits):
    low, high = x.amin(dim, keepdim=True).bfloat16(), x.amax(dim, keepdim=True)
    scale = ((high - low.float()) / (2**bits - 1)).bfloat16().float()
    return ((x - low.float()) / scale).round().clamp(0, 2**bits - 1) * scale + low.float()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("chunks", [[140], [70, 50, 20], [1] * 140])
def test_kivi_codes_keys_by_channel_and_values_by_token(bits, chunks):
    """Against attention over history that is coded directly; tokens that wait for their group are dense."""
    d, buffer, sinks = 64, 16, 2
    plain = Graded(((d, 16),))
    cache = KVCache(LayerPlan(plain, plain), buffer=buffer, sinks=sinks, prefill="windowed")
    cache.history = KiviHistory(bits, cache)
    k, v = normal(0, 1, 2, 140, d), normal(1, 1, 2, 140, d)
    start = 0
    for size in chunks:
        cache.update(k[:, :, start : start + size], v[:, :, start : start + size])
        start += size
    # one token more sees all of it
    q, new_k, new_v = normal(2, 1, 4, 1, d), normal(3, 1, 2, 1, d), normal(4, 1, 2, 1, d)
    out = cache(q, new_k, new_v)
    k, v = torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)
    whole = (141 - buffer - sinks) // KIVI_GROUP * KIVI_GROUP
    for first in range(sinks, sinks + whole, KIVI_GROUP):
        group = slice(first, first + KIVI_GROUP)
        k[:, :, group] = affine(k[:, :, group], 2, bits)
        v[:, :, group] = affine(v[:, :, group].reshape(1, 2, KIVI_GROUP, 2, 32), -1, bits).reshape(1, 2, KIVI_GROUP, d)
    expected, _ = reference.dense_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    coded = sum(t.numel() * t.element_size() for group in cache.history.coded for t in group)
    assert coded == 2 * 2 * whole * d * 2 * Kivi(bits).retention


def test_rivals_are_scored_on_a_model():
    model, ids = tiny(head_dim=32), tokens(2, 120)
    calibration = calibration_of(model)
    chosen = rivals([(32, 32)] * 2, buffer=16, seeds=2)
    names = [rival.form for rival in chosen if rival.basis is not None]
    assert (
        names
        == ["window", "fp8", "topk, no rotation", "topk, no rotation", "low rank"]
        + ["random-rotation"] * 6
        + ["kivi"] * 2
    )
    attachable = [rival for rival in chosen if rival.basis is not None]
    dense, *rows = evaluate(model, ids, attachable, calibration)
    for row, rival in zip(rows, attachable, strict=True):
        assert row["form"] == rival.form
        assert row["retention"] == rival.retention
        assert row["kl"] > 0
        history = 120 - 16 - 4
        assert row["compression_bf16"] == pytest.approx((20 + history * rival.retention) / 120)
    kl = {(row["form"], row["settings"].get("bits"), row["retention"]): row["kl"] for row in rows}
    assert min(kl, key=kl.get)[0] == "fp8"
    assert max(kl, key=kl.get)[0] == "window"
    assert dense["kl"] == 0


def test_kivi_wants_groups_of_32_coordinates_in_values():
    model = attached(head_dim=48)
    message = r"KIVI needs values .* multiple of 32, got 48 in layer 0: leave it out for this model, as rivals\(\) does"
    with pytest.raises(ValueError, match=message):
        Kivi(4).cache(model)
    assert "kivi" not in {rival.form for rival in rivals([(48, 48)] * 2)}
    assert "kivi" not in {rival.form for rival in rivals([(32, 32), (32, 48)])}
    assert "kivi" in {rival.form for rival in rivals([(48, 32)] * 2)}  # keys share scales between tokens


def test_caches_of_transformers_run_as_they_are():
    pytest.importorskip("optimum.quanto")
    model, ids = tiny(head_dim=64), tokens(1, 300)
    rows = evaluate(model, ids, [TransformersQuantized("quanto", bits) for bits in (4, 2)], calibration_of(model))
    assert 0 < rows[1]["kl"] < rows[2]["kl"]
    assert rows[1]["compression"] is None
    assert rows[1]["retention"] == 4.5 / 16


def test_a_layout_of_ones_own_is_stored_by_the_cache():
    model, ids = tiny(), tokens(1, 100)
    plan = Plan((LayerPlan(Float8(16), Float8(16)),) * 2, buffer=8)
    _, row = evaluate(model, ids, [Setting(plan, basis="identity")], calibration_of(model))
    assert 0 < row["kl"] < 0.01
    assert math.isclose(row["retention"], 0.5)
