"""The meaning of `KVCache`: dense where it should be, token by token the same as in any chunks."""

from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swan import Graded, KVCache, LayerPlan, TopK
from swan.functional import reference
from swan.modules.visible import QUERIES, blocks, part
from tests.strategies import (
    assert_within,
    attention_bound,
    decode,
    double,
    dtypes,
    heads,
    layouts,
    plan_layers,
    qkv,
    seeds,
    small_blocks,  # noqa: F401
    splits,
    stored,
    windowed_oracle,
)

D, DV = 8, 5
EXACT = LayerPlan(TopK(D, D, bits=16), Graded.leading(DV, DV))
statics = st.booleans()
paddings = st.sampled_from(["none", "once", "each time", "as seen"])


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    chunks: list[int]
    buffer: int
    sinks: int


@st.composite
def cases(draw) -> Case:
    tokens = draw(st.integers(1, 24))
    inputs = qkv(draw(seeds), 2, draw(heads), tokens, tokens, D, DV, draw(dtypes))
    return Case(*inputs, draw(splits(tokens)), draw(st.integers(1, 10)), draw(st.integers(0, 4)))


def cache_of(case: Case, plan_layer: LayerPlan | None, prefill="windowed", static=False) -> KVCache:
    room = {"static": True, "max_length": case.q.shape[2] + 3} if static else {}
    return KVCache(plan_layer, buffer=case.buffer, sinks=case.sinks, prefill=prefill, **room)


def bound(case: Case, plan_layer: LayerPlan | None) -> float:
    keys, values = [case.k], [case.v]
    if plan_layer is not None:
        keys.append(stored(case.k, plan_layer.keys))
        values.append(stored(case.v, plan_layer.values))
    return attention_bound(case.q, torch.cat(keys, dim=2), torch.cat(values, dim=2))


def window_starts(chunks, buffer):
    """The dense form: all queries of a chunk see what the first one sees dense."""
    starts, length = [], 0
    for size in chunks:
        starts += [length - buffer + 1] * size
        length += size
    return torch.tensor(starts)


# Exactness anchors --------------------------------------------------------------------------------


@given(cases(), plan_layers(D, DV), statics, st.sampled_from(["chunk", "windowed"]))
def test_short_sequences_are_dense(case, plan_layer, static, prefill):
    case = case._replace(buffer=case.q.shape[2])
    expected, _ = reference.dense_attention(*double(*case[:3]), causal=True)
    assert_within(decode(cache_of(case, plan_layer, prefill, static), *case[:4]), expected, bound(case, None))


@given(cases(), statics, st.sampled_from(["chunk", "windowed"]))
def test_keeping_everything_is_dense(case, static, prefill):
    expected, _ = reference.dense_attention(*double(*case[:3]), causal=True)
    assert_within(decode(cache_of(case, EXACT, prefill, static), *case[:4]), expected, bound(case, EXACT))


# The two forms ------------------------------------------------------------------------------------


@given(cases(), plan_layers(D, DV), statics)
def test_windowed_is_token_by_token(case, plan_layer, static):
    expected = windowed_oracle(*case[:3], plan_layer, buffer=case.buffer, sinks=case.sinks)
    for chunks in (case.chunks, [1] * case.q.shape[2]):
        found = decode(cache_of(case, plan_layer, static=static), *case[:3], chunks)
        assert found.dtype == case.q.dtype
        assert_within(found, expected, bound(case, plan_layer), f"chunks {chunks}")


@given(cases(), plan_layers(D, DV), statics)
def test_dense_form_chunk_by_chunk(case, plan_layer, static):
    starts = window_starts(case.chunks, case.buffer)
    expected = windowed_oracle(*case[:3], plan_layer, buffer=case.buffer, sinks=case.sinks, window_start=starts)
    found = decode(cache_of(case, plan_layer, "chunk", static), *case[:4])
    assert_within(found, expected, bound(case, plan_layer))


@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
@given(cases(), plan_layers(D, DV), statics, paddings.filter(lambda kind: kind != "none"), st.data())
def test_padding_per_row(prefill, case, plan_layer, static, told, data):
    tokens = case.q.shape[2]
    padding = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), min_size=2, max_size=2)))
    starts = None if prefill == "windowed" else window_starts(case.chunks, case.buffer)
    expected = windowed_oracle(
        *case[:3], plan_layer, buffer=case.buffer, sinks=case.sinks, padding=padding, window_start=starts
    )
    cache, outs, start = cache_of(case, plan_layer, prefill, static), [], 0
    for size in case.chunks:
        q, k, v = (t[:, :, start : start + size] for t in case[:3])
        start += size
        given_now = {"once": padding if start == size else None, "each time": padding}
        known = given_now.get(told, padding.clamp(max=start))  # "as seen": all padding so far
        outs.append(cache(q, k, v, padding=known))
    assert_within(torch.cat(outs, dim=2), expected, bound(case, plan_layer))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "padding", [torch.tensor([0, 3]).int(), torch.tensor([0, 9, 3, 9])[::2]], ids=["int32", "strided"]
)
def test_padding_in_any_integers_and_strides(padding, static):
    plan_layer = LayerPlan(Graded(((16, 4),)), Graded(((16, 4),)))
    q, k, v = qkv(0, 2, (4, 2), 12, 12, 16, 16, torch.float32)
    outs = []
    for each in (torch.tensor([0, 3]), padding):
        cache = KVCache(plan_layer, buffer=4, sinks=1, static=static, max_length=12 if static else None)
        outs.append(decode(cache, q, k, v, [11, 1], padding=each))
    assert torch.equal(*outs)


@given(cases(), statics, st.sampled_from([None, 2]))
def test_window_only_is_a_band_and_sinks(case, static, row_padding):
    tokens = case.q.shape[2]
    padding = torch.tensor([0, min(row_padding or 0, tokens - 1)])
    i, j, first = torch.arange(tokens)[:, None], torch.arange(tokens), padding[:, None, None]
    seen = (j <= i) & (j >= first) & ((i - j < case.buffer) | (j < first + case.sinks))
    expected, _ = reference.dense_attention(*double(*case[:3]), mask=seen[:, None])
    cache = cache_of(case, None, static=static)
    found = decode(cache, *case[:4], padding=None if row_padding is None else padding)
    assert_within(found, expected, bound(case, None))
    assert cache.history_length == 0
    assert cache.state.k_history is None


# Masks --------------------------------------------------------------------------------------------


@given(cases(), plan_layers(D, DV), statics, st.sampled_from(["chunk", "windowed"]))
def test_a_causal_mask_is_the_default(case, plan_layer, static, prefill):
    tokens = case.q.shape[2]
    causal = torch.ones(tokens, tokens + 3, dtype=torch.bool).tril()[None, None]  # a static cache's has more columns
    plain = decode(cache_of(case, plan_layer, prefill, static), *case[:4])
    masked = decode(cache_of(case, plan_layer, prefill, static), *case[:4], mask=causal)
    assert_within(masked, plain, 2 * bound(case, plan_layer))


@given(cases(), statics, st.booleans(), st.booleans(), st.data())
def test_a_mask_says_what_is_seen(case, static, per_row, per_head, data):
    """Later tokens of a chunk too: causal it is by itself, if it is."""
    batch, count, tokens, _ = case.q.shape
    shape = batch if per_row else 1, count if per_head else 1, tokens, tokens
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(seeds))) > 0.4
    ends = torch.tensor(list(accumulate(case.chunks))).repeat_interleave(torch.tensor(case.chunks))
    known = torch.arange(tokens) < ends[:, None]
    expected, _ = reference.dense_attention(*double(*case[:3]), mask=mask & known)
    assert_within(decode(cache_of(case, EXACT, static=static), *case[:4], mask=mask), expected, bound(case, EXACT))


def test_a_scale_is_used():
    case = Case(*qkv(0, 1, (4, 2), 9, 9, D, DV, torch.float32), [4, 1, 4], 3, 1)
    expected = windowed_oracle(*case[:3], EXACT, buffer=3, sinks=1, scale=0.9)
    cache, outs = cache_of(case, EXACT), []
    for q, k, v in zip(*(t.split(case.chunks, dim=2) for t in case[:3]), strict=True):
        outs.append(cache(q, k, v, scale=0.9))
    assert_within(torch.cat(outs, dim=2), expected, attention_bound(*case[:3], scale=0.9))


@pytest.mark.parametrize("impl", ["reference", "sdpa", "compiled", "auto"])
def test_every_impl(impl):
    plan_layer = LayerPlan(TopK(D, 3), TopK(D, 4))
    case = Case(*qkv(0, 2, (4, 2), 30, 30, D, D, torch.float32), [13, 1, 16], 5, 2)
    expected = windowed_oracle(*case[:3], plan_layer, buffer=5, sinks=2)
    cache, outs = cache_of(case, plan_layer), []
    for q, k, v in zip(*(t.split(case.chunks, dim=2) for t in case[:3]), strict=True):
        outs.append(cache(q, k, v, impl=impl))
    assert_within(torch.cat(outs, dim=2), expected, bound(case, plan_layer))


def test_many_tokens(monkeypatch):
    """History over several tiles and blocks, at a common head dimension and with odd ends."""
    monkeypatch.setattr("swan.modules.visible.QUERIES", QUERIES)
    plan_layer = LayerPlan(TopK(64, 40), TopK(63, 24, positions="index"))
    case = Case(*qkv(0, 1, (3, 1), 2500, 2500, 64, 63, torch.float32), [1999, 1, 437, 1, 62], 128, 4)
    expected = windowed_oracle(*case[:3], plan_layer, buffer=128, sinks=4)
    cache = cache_of(case, plan_layer)
    assert_within(decode(cache, *case[:4]), expected, bound(case, plan_layer))
    assert (cache.length, cache.history_length) == (2500, 2500 - 128 - 4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 9])])
def test_a_long_windowed_chunk_is_attended_to_in_blocks(padding, static):
    """Each looks at its own queries, their windows, what was there before the chunk, and the sinks of all rows."""
    case = Case(*qkv(0, 2, (4, 2), 100, 100, D, DV, torch.float32), [20, 80], 6, 2)
    cache = cache_of(case, EXACT, static=static)
    for start, stop in ((0, 20), (20, 100)):
        visible = cache.update(case.k[:, :, start:stop], case.v[:, :, start:stop], padding=padding)
        before, hidden = 6 + 2 if static else min(start, 6 + 2), 0 if padding is None else 9
        assert [(block.start, block.stop) for block in blocks(visible)] == [
            (i, i + 5) for i in range(0, stop - start, 5)
        ]
        for block in blocks(visible):
            some = part(visible, block)
            assert some.queries == 5 and some.k_recent.shape[2] <= before + 2 + hidden + 5 + 5
            packed = 0 if some.k_history is None else some.k_history.shape[2]
            assert packed == max(start + block.stop - 6 - 2, 0)


@given(cases(), layouts(D), layouts(DV))
def test_attending_twice_is_free(case, keys, values):
    """A single query may come again, as with several scorers."""
    cache = cache_of(case, LayerPlan(keys, values))
    cache.update(*case[1:3])
    visible = cache.update(case.k[:, :, :1], case.v[:, :, :1])
    assert torch.equal(cache.attend(case.q[:, :, :1], visible), cache.attend(case.q[:, :, :1], visible))


@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
@pytest.mark.parametrize("static", [False, True])
def test_the_tensors_given_may_be_reused(static, prefill):
    """As servers do, which write each step into the same memory: a cache keeps nothing of the caller's."""
    outs = []
    for spoil in (lambda t: t, lambda t: t.fill_(7)):
        cache = KVCache(EXACT, buffer=3, sinks=1, prefill=prefill, static=static, max_length=40 if static else None)
        padding, found = torch.tensor([0, 3]), []
        for i, tokens in enumerate((1, 5, 12, 1, 1, 9, 1)):
            tensors = qkv(i, 2, (4, 2), tokens, tokens, D, DV, torch.float32)
            out = cache(*tensors, padding=padding)
            found.append(out.clone())
            for t in (*tensors, out):
                spoil(t)
            if padding is not None:
                spoil(padding)
                padding = None  # the cache knows it
        outs.append(torch.cat(found, dim=2))
    assert torch.equal(*outs)
