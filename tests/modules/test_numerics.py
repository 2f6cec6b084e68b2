"""What a cache makes of hard numbers: the error of its outputs, and rows that are not numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Graded, KVCache, LayerPlan, TopK
from swan.functional import reference
from tests.modules.caches import static_or_not
from tests.numerics import INPUTS, attention_error, dense_tokens, discarded, hard, norms
from tests.strategies import any_graded, decode, dtypes, one_thread, seeds, splits, topk_layouts  # noqa: F401

CODED = LayerPlan(Graded(((5, 6), (15, 4))), Graded(((20, 3),)))
PLANS = {
    "coded": CODED,
    "with 16 bits": LayerPlan(Graded(((8, 16), (12, 4))), Graded.leading(20, 12)),
    "top-k": LayerPlan(TopK(20, 12), TopK(20, 9, bits=4)),
    "top-k as it is": LayerPlan(TopK(20, 12, bits=16), TopK(20, 9, bits=16, positions="index")),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
every_prefill = pytest.mark.parametrize("prefill", ["chunk", "windowed"])


def cache_of(plan, static, prefill, buffer=6, sinks=2):
    return KVCache(plan, buffer=buffer, sinks=sinks, prefill=prefill, static=static, max_length=60 if static else None)


@static_or_not
@every_prefill
@given(seeds, dtypes, st.sampled_from([20, 64]), st.sampled_from(INPUTS), st.data())
def test_the_error_stays_below_the_discarded_energy(static, prefill, seed, dtype, d, kind, data):
    """Against attention without a cache in float64; tests/functional/test_numerics.py derives the bound."""
    layouts = [data.draw(any_graded(d) | topk_layouts(d, bits=(4, 8, 16))) for _ in "kv"]
    tokens = data.draw(st.integers(1, 40))
    chunks, buffer, sinks = data.draw(splits(tokens)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))
    q, k, v = (hard(seed + i, kind if i else "normal", dtype, 2, 2 if i else 4, tokens, d) for i in range(3))
    steep = data.draw(st.sampled_from([0.1, 5.0]))
    scale = steep / (float(norms(q).max() * norms(k).max()) or 1.0)  # 1 where all keys are zero
    cache, outs = cache_of(LayerPlan(*layouts), static, prefill, buffer, sinks), []
    for new in zip(*(t.split(chunks, dim=2) for t in (q, k, v)), strict=True):
        outs.append(cache(*new, scale=scale))
    expected, _ = reference.dense_attention(*(t.double() for t in (q, k, v)), causal=True, scale=scale)
    dense = dense_tokens(chunks, buffer, sinks, prefill == "windowed")
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    e, f = (discarded(x, layout) for x, layout in zip((k, v), layouts, strict=True))
    bound, _ = attention_error(q, k, v, e, f, scale, (layouts[0], layouts[1]), dense, visible)
    error = norms(torch.cat(outs, dim=2).double() - expected)
    assert (error <= bound).all(), f"off by {(error / bound).max():.3g} times the bound"


@static_or_not
@every_prefill
@every_plan
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row_and_shows(static, prefill, plan, bad):
    """A token of one row: its own query and all later ones show it, when it is dense and when it is packed."""
    chunks = [1, 9, 1, 1, 12, 1, 1]
    q, k, v = (hard(i, "normal", torch.float32, 3, 2 if i else 4, sum(chunks), 20) for i in range(3))
    expected = decode(cache_of(plan, static, prefill), q, k, v, chunks)
    for name, column in [("k", 3), ("v", 3), ("v", 0), ("v", 20)]:
        tensors = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        tensors[name][1, :, column] = bad
        found = decode(cache_of(plan, static, prefill), *tensors.values(), chunks)
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        if name == "v" or bad != bad:
            assert not found[1, :, column:].isfinite().all(-1).any(), (name, column)


@static_or_not
@every_prefill
@every_plan
def test_no_rows_and_one_token(static, prefill, plan):
    for batch, padding in ((0, None), (0, torch.zeros(0, dtype=torch.long)), (1, None)):
        cache = cache_of(plan, static, prefill)
        for tokens in (1, 1, 9, 1):
            out = cache(*(torch.ones(batch, heads, tokens, 20) for heads in (4, 2, 2)), padding=padding)
            assert out.shape == (batch, 4, tokens, 20) and out.isfinite().all()
        cache.crop(3)
        assert cache.length == 3


@static_or_not
@every_plan
def test_rows_of_padding_alone_are_zero(static, plan):
    """A row that has not begun sees nothing: zeros, while the others are as without it."""
    q, k, v = (hard(i, "outliers", torch.float32, 2, 2 if i else 4, 12, 20) for i in range(3))
    out = cache_of(plan, static, "windowed")(q, k, v, padding=torch.tensor([12, 0]))
    assert not out[0].any() and out.isfinite().all()
    torch.testing.assert_close(
        out[1:], cache_of(plan, static, "windowed")(*(t[1:] for t in (q, k, v))), rtol=1e-4, atol=1e-4
    )
