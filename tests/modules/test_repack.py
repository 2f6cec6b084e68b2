"""A history that moves to other layouts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swan import Graded, LayerPlan, TopK
from swan.functional import reference
from tests.modules.caches import (
    DV,
    HIGHER,
    LOWER,
    PLAN,
    D,
    assert_same,
    cache_of,
    history,
    sequence,
    snapshot,
    static_or_not,
)
from tests.strategies import (
    DTYPES,
    U32,
    assert_within,
    attention_bound,
    decode,
    distinct,
    ids,
    normal,
    seeds,
    windowed_oracle,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("tokens", [9, 40, 2100])
def test_lowering_is_having_stored_less(tokens, dtype):
    q, k, v = (distinct(i, 2, 2, tokens + 1, d, dtype=dtype) for i, d in enumerate((D, D, DV)))
    lowered, low = cache_of(PLAN), cache_of(LOWER)
    for cache in (lowered, low):
        for part in (slice(tokens - 1), slice(tokens - 1, tokens)):
            cache.update(k[:, :, part], v[:, :, part])
    before = lowered.nbytes
    lowered.repack(LOWER)
    assert lowered.nbytes == low.nbytes
    assert low.history_length == 0 or lowered.nbytes < before
    if low.history_length:
        assert all(torch.equal(a, b) for a, b in zip(history(lowered), history(low), strict=True))
    outs = []
    for cache in (lowered, low):
        outs.append(cache(*(t[:, :, tokens:] for t in (q, k, v))))
    assert torch.equal(*outs)


@pytest.mark.parametrize("layouts", [HIGHER, LayerPlan(TopK(D, D, bits=16), TopK(DV, 6, bits=16))], ids=["more", "all"])
def test_raising_keeps_what_was_there(layouts):
    q, k, v = sequence(60)
    cache = cache_of(PLAN)
    decode(cache, q[:, :, :40], k[:, :, :40], v[:, :, :40], [40])
    before, stored_before = history(cache), cache.history_length
    cache.repack(layouts)
    assert all(torch.equal(a, b) for a, b in zip(history(cache), before, strict=True))
    decode(cache, q[:, :, 40:], k[:, :, 40:], v[:, :, 40:], [20])
    now = history(cache)
    assert all(torch.equal(a[:, :, :stored_before], b) for a, b in zip(now, before, strict=True))
    new = slice(2 + stored_before, 2 + cache.history_length)
    assert torch.equal(now[0][:, :, stored_before:], reference.prune(k[:, :, new], layouts.keys))
    assert torch.equal(now[1][:, :, stored_before:], reference.prune(v[:, :, new], layouts.values))


def test_repack_before_and_between():
    q, k, v = sequence(30)
    cache = cache_of(HIGHER)
    cache.repack(PLAN)  # nothing stored yet
    visible = cache.update(k, v)
    cache.repack(PLAN)  # between update and attend, the same layouts
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2)
    assert_within(cache.attend(q, visible), expected, attention_bound(q, k, v))
    cache.crop(5)  # the history is empty again, its memory is not
    cache.repack(LOWER)
    assert (cache.history_length, cache.state.k_history.format) == (3, LOWER.keys)
    cache.crop(1)
    cache.repack(PLAN)
    assert (cache.history_length, cache.state.k_history.format) == (0, PLAN.keys)


@st.composite
def any_layouts(draw, d):
    """Every form with every number of bits."""
    if draw(st.booleans()):
        return TopK(d, draw(st.integers(1, d)), draw(st.sampled_from([4, 8, 16])))
    cut = draw(st.integers(1, d - 1))
    bits = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 16]), min_size=2, max_size=2).filter(any))
    return Graded(((cut, bits[0]), (d - cut, bits[1])))


def largest_loss(y: Tensor, layout) -> Tensor:
    """E(y) of `KVCache.repack`, from the vectors and the settings alone."""
    least, step = 2.0**-16, 2 ** (1 / 8)
    if isinstance(layout, TopK):
        kept = reference.prune(y, TopK(layout.d, layout.keep, bits=16))
        peak = y.abs().amax(-1)
        each = {4: (peak * step).clamp(min=least) / 16, 8: peak / 127 * (1 + 2**-8) / 2, 16: 0 * peak}[layout.bits]
        return ((y - kept).square().sum(-1) + layout.keep * each**2).sqrt()
    mixed = y @ reference.mix(layout.groups)
    total, start = torch.zeros(y.shape[:-1], dtype=torch.float64), 0
    for size, bits in layout.groups:
        group = mixed[..., start : start + size]
        if bits == 0:
            total += group.square().sum(-1)
        elif bits < 16:
            scale = (group.abs().amax(-1) * step).clamp(min=least)
            total += size * (scale * 2.0**-bits) ** 2
        start += size
    return total.sqrt()


@given(st.tuples(any_layouts(D), any_layouts(DV)), st.tuples(any_layouts(D), any_layouts(DV)), seeds)
def test_what_a_move_loses_is_bounded(first, then, seed):
    """|x - x_AB| <= E_A(x) + E_B(x_A), of vectors whose coordinates fall off."""
    cache = cache_of(LayerPlan(*first), buffer=1, sinks=0)
    k, v = (normal(seed + i, 1, 2, 21, d) * 2.0 ** -torch.arange(d) for i, d in enumerate((D, DV)))
    cache.update(k, v)
    before = history(cache)
    cache.repack(LayerPlan(*then))
    for x, once, twice, a, b in zip((k, v), before, history(cache), first, then, strict=True):
        x = x[:, :, :20].double()
        rounding = 8 * x.shape[-1] * U32 * x.norm(dim=-1)  # of two products with a mixing matrix, there and back
        bound = largest_loss(x, a) + largest_loss(once.double(), b) + rounding
        assert_within((x - twice).norm(dim=-1), torch.zeros_like(bound), bound)


def test_a_static_cache_moves_as_a_dynamic_one_and_keeps_its_capacity():
    _, k, v = sequence(60)
    static, dynamic = cache_of(static=True), cache_of()
    shapes = {}
    for part, plan_layer in enumerate([LOWER, HIGHER, PLAN, LOWER, PLAN]):
        tokens = slice(12 * part, 12 * part + 12)
        for cache in (static, dynamic):
            cache.update(k[:, :, tokens], v[:, :, tokens])
            cache.repack(plan_layer)
        assert all(torch.equal(a, b) for a, b in zip(history(static), history(dynamic), strict=True))
        now = [t.shape for t in (*static.state.k_history.tensors, *static.state.v_history.tensors)]
        assert shapes.setdefault(plan_layer, now) == now
        assert all(shape[2] == 64 for shape in now)  # 60 - 8 - 2, and a slot behind them, in a block


@static_or_not
def test_repack_needs_a_history(static):
    with pytest.raises(ValueError, match="a cache without history has none; build a new cache"):
        cache_of(None, static=static).repack(LOWER)


def test_repack_to_another_dimension_changes_nothing():
    q, k, v = sequence(20)
    cache = cache_of()
    decode(cache, q, k, v, [20])
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"of \(16, 8\) coordinates, .* for \(16, 16\)"):
        cache.repack(LayerPlan(LOWER.keys, Graded.leading(D, 4)))
    assert_same(cache, before)
