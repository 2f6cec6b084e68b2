"""Nothing on the way from a packed history to an output allocates history x d in a dense dtype."""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from swan import Graded, KVCache, LayerPlan, TopK, pack, packed_attention
from swan.functional.attention import TILE
from swan.functional.dispatch import Impl
from tests.strategies import normal, one_thread  # noqa: F401

D, KV_HEADS, HEADS, HISTORY, BUFFER, SINKS = 64, 2, 4, 20_000, 32, 4
CHUNK = 200
PLANS = {
    "topk 8": LayerPlan(TopK(D, 24), TopK(D, 16, positions="index")),
    "topk 16": LayerPlan(TopK(D, 24, bits=16), TopK(D, 16, bits=16)),
    "graded": LayerPlan(Graded.leading(D, 32), Graded(((16, 16), (32, 0), (16, 16)))),
    "all of it": LayerPlan(TopK(D, D, bits=16), TopK(D, D)),
}
every_plan = pytest.mark.parametrize("plan_layer", PLANS.values(), ids=PLANS)


class Allocations(TorchDispatchMode):
    """Records the number of elements of every new floating-point tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        held = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if torch.is_tensor(t) and t.is_floating_point() and t.untyped_storage().data_ptr() not in held:
                self.sizes[str(func)] = max(self.sizes.get(str(func), 0), t.untyped_storage().nbytes() // t.itemsize)
        return result

    @property
    def largest(self) -> int:
        return max(self.sizes.values())


def filled_cache(plan_layer: LayerPlan, static: bool) -> KVCache:
    room = {"static": True, "max_length": HISTORY + 4 * CHUNK} if static else {}
    cache = KVCache(plan_layer, buffer=BUFFER, sinks=SINKS, prefill="windowed", **room)
    cache.update(*normal(0, 2, 1, KV_HEADS, HISTORY, D))
    # Once more, so that the growing history has room: its own growth is stored bytes, not dense ones.
    cache.update(*normal(1, 2, 1, KV_HEADS, 1, D))
    return cache


def step(cache: KVCache, tokens: int, impl: Impl) -> None:
    cache.update(*normal(2, 2, 1, KV_HEADS, tokens, D))
    cache.attend(normal(3, 1, HEADS, tokens, D), impl=impl)


def tile_bound(tokens: int) -> int:
    """A tile of keys or values; the scores or mask of all queries against one; outputs that wait to be merged."""
    return max(KV_HEADS * TILE * D, HEADS * tokens * TILE, HEADS * (TILE + tokens) * D)


@every_plan
@pytest.mark.parametrize("tokens", [1, CHUNK], ids=["decode", "windowed prefill"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("impl", ["auto", "compiled"])
@torch.no_grad()
def test_steps_stay_within_a_tile(impl, static, tokens, plan_layer):
    cache = filled_cache(plan_layer, static)
    with Allocations() as seen:
        for _ in range(2):
            step(cache, tokens, impl)
    bound = tile_bound(tokens)
    assert bound < HISTORY * KV_HEADS * D / 3  # the bound says something
    if impl == "compiled" and "all of it" not in str(plan_layer):
        assert seen.largest >= KV_HEADS * D * TILE  # tiles were seen at work
    assert seen.largest <= bound, seen.sizes


@every_plan
@torch.no_grad()
def test_repacking_stays_within_a_tile(plan_layer):
    lower = LayerPlan(TopK(D, 8), TopK(D, 8))
    cache = filled_cache(plan_layer, static=False)
    with Allocations() as seen:
        cache.repack(lower)
    assert seen.largest <= KV_HEADS * 1024 * D, seen.sizes


@torch.no_grad()
def test_the_oracle_is_exempt():
    """And the recorder sees what it should: the reference does unpack everything."""
    k, v = (pack(normal(i, 1, KV_HEADS, 5000, D), TopK(D, 16)) for i in (0, 1))
    with Allocations() as seen:
        packed_attention(normal(2, 1, HEADS, 1, D), k, v, impl="reference")
    assert seen.largest >= 5000 * D * KV_HEADS
