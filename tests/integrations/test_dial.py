"""The dial of a `SwanCache`, and what it reports."""

import dataclasses
import itertools

import pytest
import torch
from transformers import DynamicCache

from swan import LayerPlan, Plan, SwanCache, TopK, unpack
from tests.integrations.caches import NEXT, TEXT, filled, pruned
from tests.tiny import (
    attached,
    generated,
    live_storages,
    logits_of,
    tokens,
)


@pytest.fixture
def model():
    return attached()


def test_lowering_the_dial_frees_memory_at_once(model):
    cache = filled(model, pruned(model, 1.0), input_ids=tokens(2, 300))
    sizes = [cache.nbytes]
    for retention in (0.6, 0.5, 0.33, 0.25):
        cache.retention = retention
        assert cache.retention <= retention
        sizes.append(cache.nbytes)
    assert all(less < more for more, less in itertools.pairwise(sizes))
    assert cache.get_seq_length() == 300


def test_a_lowered_cache_is_one_that_was_always_low(model):
    """Top-k of top-k is top-k, where values are not rounded."""
    high, low = (Plan([LayerPlan(TopK(16, n, bits=16), TopK(16, n, bits=16))] * 2, buffer=8, sinks=2) for n in (12, 5))
    lowered, always = filled(model, SwanCache(model, high)), filled(model, SwanCache(model, low))
    for index, cache in lowered.winnowed.items():
        cache.repack(low.layers[index])
        for a, b in zip(cache.tensors, always.winnowed[index].tensors, strict=False):
            assert a.shape == b.shape
    # Queries of the later chunks saw more in the first cache, so only the first layer holds the same.
    first, other = lowered.winnowed[0], always.winnowed[0]
    for history in ("k_history", "v_history"):
        for a, b in zip(getattr(first.state, history).tensors, getattr(other.state, history).tensors, strict=True):
            assert torch.equal(a[:, :, : first.history_length], b[:, :, : first.history_length])


def test_the_dial_moves_between_steps(model):
    cache = pruned(model, 0.5)
    ids = generated(model, cache, **TEXT, max_new_tokens=3)
    for retention in (0.33, 0.8, 0.25, 1.0):
        cache.retention = retention
        ids = generated(model, cache, input_ids=ids, max_new_tokens=3)
    assert ids.shape == (2, 75)
    assert cache.get_seq_length() == 74
    assert cache.retention == 1


def test_raising_keeps_what_old_tokens_had(model):
    """Old tokens do not change, new ones are kept whole."""
    cache = filled(model, pruned(model, 0.33))
    before = [unpack(kv.state.k_history.tokens(0, 50)) for kv in cache.winnowed.values()]
    cache.retention = 1.0
    logits_of(model, cache, input_ids=tokens(2, 20, seed=3))
    for kv, old in zip(cache.winnowed.values(), before, strict=True):
        now = unpack(kv.state.k_history.tokens(0, kv.history_length))
        assert now.shape[2] == 70
        assert torch.equal(now[:, :, :50], old)
        assert (now[:, :, 50:] != 0).all()


@pytest.mark.parametrize("retention", [0, 1.5, 0.01])
def test_the_dial_refuses_what_no_plan_has_and_stays(model, retention):
    cache = filled(model, pruned(model, 0.5))
    plan, size = cache.plan, cache.nbytes
    with pytest.raises(ValueError, match="retention"):
        cache.retention = retention
    assert (cache.plan, cache.nbytes) == (plan, size)


def test_the_dial_of_a_cache_without_history_is_fixed(model):
    entry = LayerPlan(TopK(16, 8), TopK(16, 8))
    cache = filled(model, SwanCache(model, Plan((entry, None), buffer=8, sinks=2)))
    with pytest.raises(ValueError, match="no history in some layers"):
        cache.retention = 0.5
    assert cache.winnowed[0].plan_layer == entry
    assert cache.winnowed[1].history_length == 0


def test_a_layer_without_history_is_a_window(model):
    """With None for a plan it sees sinks and buffer only: its memory does not grow."""
    cache = filled(model, SwanCache(model, Plan((None, None), buffer=8, sinks=2)))
    size = cache.nbytes
    generated(model, cache, input_ids=torch.cat([TEXT["input_ids"], NEXT["input_ids"]], dim=1))
    assert cache.nbytes == size
    assert cache.retention == 0


def dense_bytes(tokens, batch=2, layers=2, kv_heads=2, d=16, itemsize=4):
    return batch * layers * kv_heads * tokens * 2 * d * itemsize


def test_bytes_are_those_of_the_tensors_that_are_alive(model):
    before = live_storages()
    cache = filled(model, pruned(model, 0.33), input_ids=tokens(2, 300))
    alive = sum(size for _, size in live_storages().items() - before.items())
    assert cache.nbytes == alive


def test_bytes_follow_the_plan(model):
    """History with at most 64 tokens, or a thirty-second part, of room to grow; buffer and sinks dense."""
    cache = filled(model, pruned(model, 0.33), input_ids=tokens(2, 300))
    entry = cache.plan.layers[0]
    per_token = 2 * 2 * 2 * (entry.keys.vector_bytes(4) + entry.values.vector_bytes(4))
    history, dense = 300 - 8 - 2, dense_bytes(8 + 2)
    assert history * per_token + dense <= cache.nbytes <= (history + 2 * 64) * per_token + dense
    assert cache.compression == cache.nbytes / dense_bytes(300)


def test_an_empty_cache(model):
    cache = pruned(model)
    assert (cache.nbytes, cache.compression, cache.get_seq_length(), len(cache)) == (0, 1.0, 0, 2)
    assert [row["tokens"] for row in cache.report()] == [0, 0]


def test_report(model):
    cache = filled(model, pruned(model, 0.33))
    rows = cache.report()
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["tokens"], row["history"]) == (60, 50)
        assert row["compression"] == row["nbytes"] / dense_bytes(60, layers=1)
        entry = cache.plan.layers[row["layer"]]
        assert (row["keys"], row["values"]) == (dataclasses.asdict(entry.keys), dataclasses.asdict(entry.values))
        assert 0.9 < row["keys_energy"] < 1
        assert 0.9 < row["values_energy"] < 1
    assert sum(row["nbytes"] for row in rows) == cache.nbytes
    cache.retention = 1.0
    assert all(row["keys_energy"] == row["values_energy"] == 1 for row in cache.report())


def test_repr(model):
    cache = filled(model, pruned(model, 0.33))
    assert repr(cache) == (
        f"SwanCache(retention={cache.retention:.3g}, buffer=8, sinks=2, tokens=60, nbytes={cache.nbytes}, "
        f"compression={cache.compression:.3g})"
    )


def test_sliding_layers_are_counted_and_left_to_transformers():
    model = attached("gemma3")
    cache, dense = pruned(model), DynamicCache(config=model.config)
    for held in (cache, dense):
        filled(model, held)
    assert list(cache.winnowed) == [1]
    assert type(cache.layers[0]) is type(dense.layers[0])
    sliding = sum(t.untyped_storage().nbytes() for t in (dense.layers[0].keys, dense.layers[0].values))
    assert cache.nbytes == cache.winnowed[1].nbytes + sliding
    assert cache.compression == cache.nbytes / (sliding + dense_bytes(60, layers=1))
