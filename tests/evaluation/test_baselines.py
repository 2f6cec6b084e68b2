"""Rivals: their grids, their bytes, and that they see what they should."""

import itertools
import math

import pytest
import torch

from swan import Graded, KVCache, LayerPlan, Plan, pack, unpack
from swan.evaluation.baselines import (
    BlockBits,
    Float4,
    Float8,
    Kivi,
    KVarN,
    LloydMax,
    TransformersQuantized,
    Trellis,
    rivals,
)
from swan.evaluation.baselines.codes import FLOAT4, block_bits, normal_grid, sphere_grid
from swan.evaluation.baselines.tiles import KIVI_GROUP, TileHistory, balanced, kivi_fits
from swan.evaluation.baselines.trellis import grid_of, nearest_paths, subset
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


UNEVEN = BlockBits(((6,) * 8 + (2,) * 56, (3,) * 32 + (2,) * 16 + (1,) * 8 + (3,) * 8))


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (LloydMax(64, 4), 34),
        (LloydMax(63, 3), 26),  # 16 bytes of high parts and 8 of low ones
        (LloydMax(64, 2), 18),
        (Float8(64), 64),
        (Float4(64, 0.3), 36),
        (Trellis(64, 3), 27),
        (Trellis(64, 2), 19),
        (BlockBits(((3,) * 64,) * 2), 26),
        (UNEVEN, 26),  # 160 bits and three lengths, of which one head uses two
    ],
    ids=lambda value: str(value)[:20],
)
def test_layouts_store_their_bytes(layout, size):
    x = normal(0, 3, 2, 7, layout.d)
    packed = pack(x, layout)
    assert packed.nbytes == 42 * layout.vector_bytes() == 42 * size
    restored = unpack(packed)
    assert restored.shape == x.shape
    assert (restored - x).square().mean() < 0.2
    assert unpack(pack(torch.zeros(1, 2, 1, layout.d), layout)).abs().max() < 1e-6


def test_errors_fall_with_bits():
    """Squared errors of normal vectors; those of the trellis are near the least possible, 4 ** -bits."""
    x = normal(3, 1, 2, 200, 64)
    errors = {}
    for bits in (2, 3):
        uniform, trellis = BlockBits(((bits,) * 64,) * 2), Trellis(64, bits)
        errors[bits] = [(unpack(pack(x, a)) - x).square().mean().item() for a in (uniform, trellis)]
    assert errors[2] == pytest.approx([0.116, 0.070], rel=0.05)
    assert errors[3] == pytest.approx([0.034, 0.019], rel=0.05)


def test_float4_by_hand():
    x = torch.tensor([12.0, -1.0, 2.9, 0.4] + [0.0] * 12).view(1, 1, 1, 16)  # 12 / 6 is the scale
    assert unpack(pack(x, Float4(16))).flatten()[:4].tolist() == [12.0, -1.0, 3.0, 0.0]
    exact = torch.tensor(FLOAT4 + tuple(-m for m in FLOAT4)).view(1, 1, 1, 16)
    assert torch.equal(unpack(pack(exact, Float4(16))), exact)
    with pytest.raises(ValueError, match="NVFP4 needs a head dimension that is a multiple of 16, got 24"):
        Float4(24)


def test_rotary_blocks_get_bits_by_their_energy():
    """Greedy bits have no other of the same sum that is better, for all of three blocks; none is above 8."""
    energy = torch.tensor([[40.0, 3.0, 1.0]])
    bits = block_bits(energy, 3)
    loss = {
        (a, b, 9 - a - b): (energy * 4.0 ** -torch.tensor([[a, b, 9 - a - b]])).sum().item()
        for a in range(1, 8)
        for b in range(1, 9 - a)
    }
    assert tuple(bits[0].tolist()) == min(loss, key=loss.get) == (4, 3, 2)
    assert block_bits(torch.tensor([[1e9, 1.0, 1.0, 1.0]]), 4)[0].tolist() == [8, 3, 3, 2]


def test_uneven_bits_lie_at_their_coordinates():
    x = normal(4, 1, 2, 500, 64)
    error = (unpack(pack(x, UNEVEN)) - x).square().mean((0, 2))
    assert error[0, :8].max() < 0.002 < 0.08 < error[0, 8:].min()
    assert error[1, 48:56].min() > 0.25 > 0.05 > error[1, :32].max()
    with pytest.raises(ValueError, match=r"as many bits each, got \[32, 48\]"):
        BlockBits(((2,) * 16, (3,) * 16))


@pytest.mark.parametrize("n", [2, 8, 64])
def test_grids_of_unit_vectors(n):
    """Of one bit the points are the mean magnitude; of two coordinates it is 2 / pi."""
    x = torch.nn.functional.normalize(normal(5, 20_000, n), dim=-1)[:, 0]
    assert sphere_grid(1, n)[1].item() == pytest.approx(x.abs().mean().item(), rel=0.02)
    errors = [(x[:, None] - sphere_grid(bits, n)).abs().amin(-1).square().mean().item() for bits in (1, 2, 3, 4)]
    assert all(b < a / 3 for a, b in itertools.pairwise(errors))
    if n == 2:
        assert sphere_grid(1, n)[1].item() == pytest.approx(2 / math.pi, abs=1e-4)


def test_paths_on_the_trellis_are_the_nearest():
    """Against all paths of three coordinates."""
    x, bits = normal(6, 5, 3), 2
    first, codes = nearest_paths(x, bits)
    state = torch.arange(256).view(-1, 1, 1, 1)
    code = torch.arange(4)
    points, shape = [], [256, 4, 4, 4]
    for axis in range(3):
        now = code.view([-1 if i == axis else 1 for i in range(3)])
        points.append(grid_of(bits)[4 * (now >> 1) + subset(state, now & 1)].expand(shape))
        state = (2 * state + (now & 1)) % 256
    every = torch.stack(points, dim=-1).view(-1, 3)
    least = torch.cdist(x.double(), every.double()).square().amin(-1)
    own = torch.stack(
        [every[((f * 4 + a) * 4 + b) * 4 + c] for f, (a, b, c) in zip(first.int(), codes.int(), strict=True)]
    )
    torch.testing.assert_close((own - x).double().square().sum(-1), least, rtol=1e-5, atol=1e-6)


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
    cache.history = TileHistory(Kivi(bits), cache)
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
    coded = sum(t.numel() * t.element_size() for group in cache.history.coded for side in group for t in side)
    assert coded == 2 * 2 * whole * d * 2 * Kivi(bits).retention


def test_balanced_matrices_have_even_rows_and_columns():
    x = normal(7, 2, 32, 128) * normal(8, 2, 32, 1).exp() * normal(9, 2, 1, 128).exp()
    quotient, rows, columns = balanced(x)
    torch.testing.assert_close(quotient * rows * columns, x)
    for dim in (-1, -2):
        deviations = quotient.std(dim)
        assert deviations.max() / deviations.min() < 1.05 < 5 < x.std(dim).max() / x.std(dim).min()
    assert balanced(torch.zeros(4, 8))[0].eq(0).all()


def test_factors_of_nearly_empty_rows_and_columns_fit_into_16_bits():
    """A token of almost nothing, as first layers have them: its factor fell in each round, and NaN came out."""
    x = torch.randn(3, 128, 64, generator=torch.Generator().manual_seed(0))
    x[0, 5] = 1e-7
    x[1, :, 7] = 3.0 + 1e-8 * x[1, :, 7]
    x[2, 9] *= 1e-9
    quotient, rows, columns = balanced(x)
    for factors in (rows, columns, quotient.abs().amax((-1, -2)) * rows.amax((-1, -2))):
        assert factors.half().isfinite().all()
    assert columns.half().gt(0).all()
    torch.testing.assert_close(quotient * rows * columns, x)


def test_kvarn_stores_its_bytes_and_spends_bits_on_keys():
    """A channel of outliers and a token of outliers cost little: both are divided by factors of their own."""
    coder = KVarN((64, 32))
    k, v = normal(10, 1, 2, 3, 128, 64), normal(11, 1, 2, 3, 128, 32)
    keys, values = coder.code(k, v)
    size = sum(t.numel() * t.element_size() for t in (*keys, *values))
    assert size == coder.retention * 2 * (k.numel() + v.numel())
    assert KVarN((64, 64)).retention == (64 * 64 + 2 * 256 + 128 * 16 + 2 * 320) / (2 * 128 * 128)
    restored = coder.decode(keys, values, (64, 32))
    errors = [(a - b).square().mean().item() for a, b in zip(restored, (k, v), strict=True)]
    assert errors[0] < 0.015 < 0.1 < errors[1] < 0.2
    k[..., 5, :] *= 100
    (restored, _) = coder.decode(*coder.code(k, v), (64, 32))
    error = (restored - k).square().mean(-1)
    assert error[..., 6:].mean() < 2 * errors[0]


def test_kvarn_in_a_cache_waits_for_128_tokens():
    plain = Graded(((32, 16),))
    cache = KVCache(LayerPlan(plain, plain), buffer=16, sinks=2, prefill="windowed")
    cache.history = TileHistory(KVarN((32, 32)), cache)
    k, v = normal(0, 1, 2, 300, 32), normal(1, 1, 2, 300, 32)
    for start in range(0, 300, 50):
        cache.update(k[:, :, start : start + 50], v[:, :, start : start + 50])
    (packed, _) = cache.history.until(284)
    (tile, _) = KVarN((32, 32)).code(*(x[:, :, 2:258].unflatten(2, (2, 128)) for x in (k, v)))
    assert torch.equal(cache.history.coded[1][0][0], tile[0][:, :, 1:])
    torch.testing.assert_close(unpack(packed)[:, :, 256:], k[:, :, 258:284])
    assert 0 < (unpack(packed)[:, :, :256] - k[:, :, 2:258]).abs().max() < 0.5


def test_rivals_are_scored_on_a_model():
    model, ids = tiny(head_dim=32), tokens(1, 120)
    calibration = calibration_of(model)
    chosen = rivals(calibration, buffer=16, seeds=1)
    attachable = [rival for rival in chosen if rival.basis is not None]
    assert [rival.form for rival in attachable] == [
        "window", "fp8", "topk, no rotation", "topk, no rotation", "low rank", *["random-rotation"] * 3, "nvfp4",
        "trellis", "trellis", *["block-gtq"] * 4, "kivi", "kivi", "kvarn", *["expected attention"] * 3,
        *["expected attention, 4 bit"] * 3, *["snapkv"] * 3, *["snapkv, 4 bit"] * 3,
    ]  # fmt: skip
    dense, *rows = evaluate(model, ids, attachable, calibration)
    for row, rival in zip(rows, attachable, strict=True):
        assert row["form"] == rival.form
        assert row["retention"] == rival.retention
        assert row["kl"] > (0 if rival.form != "kvarn" else -1e-6)  # there is no whole tile of it
        history = 120 - 16 - 4
        assert row["compression_bf16"] == pytest.approx((20 + history * rival.retention) / 120)
    kl = {
        (row["form"], row["settings"].get("bits"), row["retention"]): row["kl"]
        for row in rows
        if row["form"] != "kvarn"
    }
    assert min(kl, key=kl.get)[0] == "fp8"
    assert max(kl, key=kl.get)[0] == "window"
    assert dense["kl"] == 0


def test_rotary_blocks_are_found_in_the_basis():
    """RoPE turns the coordinates i and i + d / 2 together: whatever the order of the basis, both have the same bits."""
    model = tiny(head_dim=32)
    calibration = calibration_of(model)
    chosen = [rival for rival in rivals(calibration, seeds=1) if rival.form == "block-gtq"]
    plan = chosen[2].plan  # 3 bits for keys and 2 for values
    for index, layer in enumerate(plan.layers):
        identity = calibration.with_basis("identity").layers[index].key_basis
        bits = torch.tensor(layer.keys.bits, dtype=torch.float32)
        by_axis = (identity @ bits[..., None])[..., 0]
        assert torch.equal(by_axis[:, :16], by_axis[:, 16:])
        assert by_axis.sum(-1).eq(96).all()
        moments = calibration.moments[index]
        energy = (moments.q / 2 + moments.k).diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, 16)).sum(-2)
        assert torch.equal(energy.argmax(-1), (energy * 4.0 ** -by_axis[:, :16]).argmax(-1)) or by_axis.max() > 3
        assert {bits for head in layer.values.bits for bits in head} == {2}


def test_kivi_wants_groups_of_32_coordinates_in_values():
    model = attached(head_dim=48)
    message = r"KIVI needs values .* multiple of 32, got 48 in layer 0: leave it out for this model, as rivals\(\) does"
    with pytest.raises(ValueError, match=message):
        Kivi(4).cache(model)
    assert "kivi" not in {rival.form for rival in rivals(calibration_of(tiny(head_dim=48)))}
    assert kivi_fits(32) and not kivi_fits(48)


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
