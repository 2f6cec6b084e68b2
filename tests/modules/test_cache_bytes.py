"""The bytes of a cache, counted and foretold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Graded, KVCache, LayerPlan, TopK
from swan.modules.forecast import nbytes_after
from tests.modules.caches import (
    DV,
    INT8,
    PLAN,
    D,
    cache_of,
    history,
    reachable,
    sequence,
    static_or_not,
)
from tests.strategies import (
    DTYPES,
    assert_within,
    attention_bound,
    plan_layers,
    splits,
)


@static_or_not
@pytest.mark.parametrize("plan_layer", [PLAN, INT8, None], ids=["16", "int8", "window"])
@pytest.mark.parametrize("chunks", [[5], [30, 1], [1] * 30, [10, 1, 19]], ids=["short", "step", "steps", "chunks"])
def test_nbytes_counts_every_storage(chunks, plan_layer, static):
    q, k, v = sequence(sum(chunks))
    cache, start = cache_of(plan_layer, static=static), 0
    for size in chunks:
        part = slice(start, start + size)
        cache(*(t[:, :, part] for t in (q, k, v)), padding=torch.tensor([1, 0]))
        assert cache.nbytes == sum(reachable(cache).values())
        start += size
    assert cache.dense_nbytes == 2 * 2 * 4 * start * (D + DV)


@given(
    st.tuples(plan_layers(D, DV), plan_layers(D, DV)),
    splits(300).flatmap(lambda chunks: st.tuples(st.just(chunks), st.integers(0, len(chunks) - 1))),
    st.integers(0, 300),
    st.sampled_from(DTYPES),
)
def test_bytes_are_known_before(layouts, chunks_and_move, drop, dtype):
    """All of them, at every step; one of them comes after a drop and a move to other layouts."""
    chunks, move = chunks_and_move
    cache, plan_layer, start = cache_of(layouts[0], buffer=8), layouts[0], 0
    _, k, v = sequence(300, dtype=dtype)
    for step, chunk in enumerate(chunks):
        now = slice(start, start + chunk)
        dropped = drop if step == move else 0
        plan_layer = layouts[1] if step == move else plan_layer
        size = {"rows": 2, "kv_heads": 2, "itemsize": dtype.itemsize}
        parts = nbytes_after(cache, chunk, plan_layer, **size, drop=dropped)
        cache.evict(dropped)
        cache.repack(plan_layer)
        cache.update(k[:, :, now], v[:, :, now])
        *exact, counters = parts
        assert sum(exact) <= cache.nbytes <= sum(exact) + counters
        assert counters == 8 * 2
        assert sum(exact[:2]) == sum(p.nbytes for p in (cache.state.k_history, cache.state.v_history) if p is not None)
        start += chunk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_short_text_takes_little_more_than_dense(dtype):
    """At most twice its tokens, the sinks' slots and 8 more; a prompt at once no more than its tokens and those."""
    for chunks in ([1] * 150, [5, 1, 1], [20, 1], [100], [127, 1, 1], [300]):
        cache, start = KVCache(LayerPlan(TopK(D, 6), Graded.leading(DV, 4))), 0
        for size in chunks:
            cache.update(*(t[:, :, :size] for t in sequence(size, dtype=dtype)[1:]))
            start += size
            token = cache.dense_nbytes // start
            assert cache.nbytes <= 2 * cache.dense_nbytes + (4 + 8) * token
            if start == chunks[0]:
                assert cache.nbytes <= cache.dense_nbytes + (4 + 8) * token


@given(
    splits(70),
    st.integers(1, 40),
    st.integers(0, 4),
    st.integers(0, 70),
    st.integers(0, 20),
    st.none() | st.lists(st.integers(0, 12), min_size=2, max_size=2),
)
def test_a_ring_that_grew_holds_what_one_taken_whole_holds(chunks, buffer, sinks, when, cropped, padding):
    grown, whole = (cache_of(buffer=buffer, sinks=sinks) for _ in range(2))
    whole.buffer.slots_after = lambda tokens: buffer
    q, k, v = sequence(70)
    padding, start = None if padding is None else torch.tensor(padding), 0
    for size in chunks:
        part = slice(start, start + size)
        given = [t[:, :, part] for t in (q, k, v)]
        found, expected = (cache(*given, padding=padding) for cache in (grown, whole))
        assert_within(found, expected, 2 * attention_bound(q, k, v))
        start += size
        if start >= when > 0:
            when = 0
            for cache in (grown, whole):
                cache.crop(max(cache.length - cropped, 1))
        slots = sinks + grown.buffer.slots
        for mine, theirs in zip(
            (grown.state.k_recent, grown.state.v_recent), (whole.state.k_recent, whole.state.v_recent), strict=True
        ):
            assert torch.equal(mine, theirs[:, :, :slots]) and not theirs[:, :, slots:].any()
        assert torch.equal(grown.buffer.columns(), whole.buffer.columns()[:, :slots])
        assert grown.history_length == whole.history_length
        if grown.history_length:
            assert all(torch.equal(a, b) for a, b in zip(history(grown), history(whole), strict=True))


def test_a_history_grows_when_its_room_is_full():
    cache, start, rooms = cache_of(), 0, []
    _, k, v = sequence(139)
    for stop in (20, 138, 139):  # of which 10, 128 and 129 are in the history
        *exact, _ = nbytes_after(cache, stop - start, PLAN, rows=2, kv_heads=2, itemsize=4)
        cache.update(k[:, :, start:stop], v[:, :, start:stop])
        assert cache.nbytes == sum(exact)
        rooms.append(cache.history.capacity)
        start = stop
    assert rooms == [128, 128, 256]


def test_a_long_history_costs_what_the_plan_says():
    cache = KVCache(LayerPlan(TopK(64, 40), TopK(64, 24)), buffer=16, sinks=4)
    cache.update(*(t.bfloat16() for t in torch.randn(2, 1, 2, 4000, 64)))
    dense_part = 2 * 2 * (16 + 4) * 64 * 2
    packed = 2 * 2 * 64 * 2 * cache.plan_layer.retention * cache.history_length
    slack = (cache.nbytes - dense_part) / packed - 1
    assert 0 <= slack <= 1 / 32 + 2 * 64 / 4000  # room for 3 % and a block more, in whole blocks
    assert cache.nbytes < 0.36 * cache.dense_nbytes
