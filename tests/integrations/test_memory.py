"""The memory that a cache really takes: storages alive in the process, and bytes that torch's allocator gave out."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from swan import SwanCache
from swan.integrations.transformers import cache_keyword
from tests.tiny import attached, forget_mixes, live_storages, tokens

PREFILL, STEPS = 4096, 200


@pytest.fixture(scope="module")
def model():
    return attached(effects=True, hidden_size=128, head_dim=64, max_position_embeddings=8192)


@torch.no_grad()
def read(model, cache, steps):
    ids, keyword = tokens(1, PREFILL), {cache_keyword(model): cache}
    model(ids, logits_to_keep=1, **keyword)
    for step in range(steps):
        model(ids[:, step : step + 1], **keyword)


def planned_bytes(cache):
    """Count bytes of the history without room to grow, and of the dense tokens: 2 layers and 2 KV heads in float32."""
    history = cache.get_seq_length() - cache.plan.buffer - cache.plan.sinks
    vectors = sum(entry.keys.vector_bytes(4) + entry.values.vector_bytes(4) for entry in cache.plan.layers)
    return 2 * (history * vectors + (cache.plan.buffer + cache.plan.sinks) * 2 * 2 * 64 * 4)


def test_what_is_alive_is_what_the_cache_counts(model):
    """Every storage that a tensor holds and that was not there before."""
    before = live_storages()

    def alive():
        forget_mixes()  # small matrices, one for each layout, kept for all caches of the process
        return sum(size for _, size in live_storages().items() - before.items())

    cache = SwanCache(model, retention=0.5)
    read(model, cache, STEPS)
    assert cache.get_seq_length() == PREFILL + STEPS
    for retention in (0.5, 0.25):
        cache.retention = retention
        assert alive() == pytest.approx(cache.nbytes, rel=0.05)
        assert planned_bytes(cache) <= alive() <= 1.05 * planned_bytes(cache)
    size = alive()
    cache.reset()
    assert alive() < size / 100


def allocated(work):
    """Bytes that the allocator gave out while `work` ran, less those that it got back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_the_allocator_agrees(model):
    """Fewer steps: the profiler keeps every event."""
    warm = SwanCache(model, retention=0.5)  # the matrices of both layouts are kept for all caches of the process
    read(model, warm, steps=1)
    warm.retention = 0.25
    cache = SwanCache(model, retention=0.5)
    held = allocated(lambda: read(model, cache, steps=2))
    assert held == pytest.approx(cache.nbytes, rel=0.05)
    held += allocated(lambda: setattr(cache, "retention", 0.25))
    assert held == pytest.approx(cache.nbytes, rel=0.05)


def test_the_allocator_is_within_a_budget(model):
    """After each step, of few tokens or many, from the highest level to the least and beyond."""
    ids, budget = tokens(1, PREFILL), 2**17

    @torch.no_grad()
    def steps(measure):
        cache, start = SwanCache(model, budget=budget, on_full="evict", buffer=16), 0
        for size in [60, 1, 1, *[60] * 10, 1, 1]:
            given = {"input_ids": ids[:, start : start + size], cache_keyword(model): cache}
            yield cache, measure(lambda given=given: model(**given, logits_to_keep=1))
            start += size

    def without(work):
        work()

    with pytest.warns(UserWarning, match="the oldest tokens"):
        list(steps(without))  # the matrices of the layouts are kept for all caches of the process
        held, levels = 0, set()
        for cache, more in steps(allocated):
            held += more
            assert held == pytest.approx(cache.nbytes, rel=0.01)
            assert max(held, cache.nbytes) <= budget
            levels.add(cache.retention)
    assert len(levels) > 3
    assert cache.dropped > 0
