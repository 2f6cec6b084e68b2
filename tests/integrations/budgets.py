"""Caches with a budget that several tests look at."""

from contextlib import contextmanager

import torch

import swan.modules.history
from swan import SwanCache
from tests.tiny import logits_of, tokens

TEXT = {"input_ids": tokens(1, 500)}
DENSE = 2 * 2 * 2 * 16 * 4  # bytes of a token in two layers with two heads of keys and values
BUDGET = 60 * DENSE  # too little for any history at level 1; the least level holds some 400 tokens


def budgeted(model, budget=BUDGET, **settings):
    return SwanCache(model, **{"budget": budget, "buffer": 8, "sinks": 2} | settings)


def step(model, cache, ids):
    return logits_of(model, cache, input_ids=ids)


def state(cache):
    """All that a cache holds and shows."""
    held = [t.clone() for kv in cache.winnowed.values() for t in kv.tensors]
    held += [
        t.clone() for layer in cache.layers if not hasattr(layer, "kv") for t in (layer.keys, layer.values) if t.numel()
    ]
    return held, [cache.plan, cache.nbytes, cache.dropped, cache.get_seq_length(), repr(cache), cache.report()]


def assert_same(cache, before):
    held, shown = state(cache)
    assert shown == before[1]
    assert all(torch.equal(a, b) for a, b in zip(held, before[0], strict=True))


@contextmanager
def watched(model, cache):
    """Asserts the budget after every layer, and while a history exists twice."""
    original = swan.modules.history._resized

    def check(*_):
        assert cache.nbytes <= cache.budget

    def resized(history, capacity):
        new = original(history, capacity)
        assert cache.nbytes + new.nbytes <= cache.budget
        return new

    hooks = [layer.register_forward_hook(check) for layer in model.model.layers]
    swan.modules.history._resized = resized
    try:
        yield
    finally:
        swan.modules.history._resized = original
        for hook in hooks:
            hook.remove()
