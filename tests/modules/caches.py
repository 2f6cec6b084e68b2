"""Small caches that several tests look at."""

import pytest
import torch
from torch import Tensor

from swan import Graded, KVCache, LayerPlan, TopK, unpack
from tests.strategies import (
    qkv,
)

D, DV = 16, 8
PLAN = LayerPlan(TopK(D, 6, bits=16), Graded.leading(DV, 4))
INT8 = LayerPlan(TopK(D, 6), TopK(DV, 3, positions="index"))
LOWER = LayerPlan(TopK(D, 3, bits=16), Graded.leading(DV, 2))
HIGHER = LayerPlan(TopK(D, 12, bits=16), Graded.leading(DV, 7))
HEADS = (4, 2)
static_or_not = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


def cache_of(plan_layer=PLAN, *, static=False, prefill="windowed", max_length=60, buffer=8, sinks=2) -> KVCache:
    room = {"static": True, "max_length": max_length} if static else {}
    return KVCache(plan_layer, buffer=buffer, sinks=sinks, prefill=prefill, **room)


def sequence(tokens: int, batch: int = 2, dtype=torch.float32) -> list[Tensor]:
    return qkv(0, batch, HEADS, tokens, tokens, D, DV, dtype)


def history(cache: KVCache) -> tuple[Tensor, Tensor]:
    stop = cache.history_length
    return tuple(unpack(packed.tokens(0, stop)) for packed in (cache.state.k_history, cache.state.v_history))


def reachable(thing, found=None) -> dict[int, int]:
    """Bytes of every storage that can be reached from an object's attributes."""
    found = {} if found is None else found
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, (list, tuple, dict)):
        for part in thing.values() if isinstance(thing, dict) else thing:
            reachable(part, found)
    elif hasattr(thing, "__dict__"):
        reachable(vars(thing), found)
    return found


def snapshot(cache: KVCache):
    return [t.clone() for t in cache.tensors], cache.length, cache.history_length, cache.plan_layer


def assert_same(cache: KVCache, before) -> None:
    now = snapshot(cache)
    assert now[1:] == before[1:]
    assert all(torch.equal(a, b) for a, b in zip(now[0], before[0], strict=True))
