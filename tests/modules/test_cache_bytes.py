"""The bytes of a cache, counted and foretold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import KVCache, LayerPlan, TopK
from swan.modules.forecast import nbytes_after
from tests.modules.caches import (
    DV,
    INT8,
    PLAN,
    D,
    cache_of,
    reachable,
    sequence,
    static_or_not,
)
from tests.strategies import (
    DTYPES,
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
