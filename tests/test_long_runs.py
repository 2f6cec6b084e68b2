"""Long decodes: memory grows by what the cache counts, numbers do not drift, nothing is compiled anew."""

import copy
import ctypes
import gc
import os

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from swan import Graded, KVCache, LayerPlan, SwanAttention, SwanCache, random_rotation
from swan.integrations.transformers import cache_keyword
from tests.stateful.checked import assert_answer
from tests.stateful.layouts import plain, read
from tests.stateful.oracle import Answer, Oracle
from tests.strategies import normal
from tests.tiny import attached, forget_mixes, live_storages, tokens

D, HEADS, KV_HEADS = 16, 4, 2
SCALE = 0.2
DRIFT = 2.0**-11  # the most that an output is off at any length, relative to the largest value
slow = pytest.mark.slow


def exact(kv: KVCache, q: Tensor) -> Answer:
    """What attention over the bytes that a cache holds should be, in float64."""
    state, length, stored = kv.state, kv.length, kv.history_length
    assert kv.plan_layer is not None and state.k_recent is not None and state.v_recent is not None
    assert state.k_history is not None and state.v_history is not None
    columns = kv.buffer.columns()[0]
    there = columns < length
    oracle = Oracle(kv.buffer.size, kv.buffer.sinks, windowed=True, history=True)
    oracle.padding, oracle.left = [0], int(state.first)
    for name, recent, history in (
        ("keys", state.k_recent, state.k_history),
        ("values", state.v_recent, state.v_history),
    ):
        dense = torch.zeros(1, KV_HEADS, length, D, dtype=torch.float64)
        packed = dense.clone()
        dense[:, :, columns[there]] = recent[:, :, there].double()
        packed[:, :, kv.history.start : kv.history.start + stored] = plain(
            read(history.tokens(0, stored))[0], history.format
        )
        setattr(oracle, name, dense)
        setattr(oracle, f"packed_{name}", packed)
    return oracle.attend(q, length - 1, oracle.left, SCALE)


def check_answer(kv: KVCache) -> None:
    """Compare one more step of a copy with the exact one, to a bound that is the same for all lengths too."""
    kv = copy.deepcopy(kv)
    q, k, v = (normal(i, 1, heads, 1, D) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    found = kv(q, k, v, scale=SCALE)
    answer = exact(kv, q)
    assert_answer(found, answer, kv.plan_layer, impl="auto", d=D)
    assert kv.state.v_recent is not None
    assert (found.double() - answer.out).abs().max() <= DRIFT * kv.state.v_recent.abs().max()


def resident() -> int:
    """Bytes of this process that are in memory, without those that malloc keeps of what is freed (of the oracle)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("static", "steps"),
    [
        (False, 2_000),
        (True, 600),
        pytest.param(False, 20_000, marks=slow),
        pytest.param(True, 20_000, marks=slow),
    ],
    ids=["dynamic-2k", "static-600", "dynamic-20k", "static-20k"],
)
def test_a_long_decode_neither_leaks_nor_drifts(static, steps):
    model = attached(num_hidden_layers=1, max_position_embeddings=steps + 1)
    room = {"levels": [0.33], "static": True, "max_length": steps + 1} if static else {"retention": 0.33}
    ids = tokens(1, steps)
    keyword = cache_keyword(model)
    with torch.no_grad():
        model(ids[:, :200], **{keyword: (warm := SwanCache(model, **room))})
    check_answer(warm.winnowed[0])  # the oracle keeps tables of each layout
    del warm
    forget_mixes()
    before = live_storages()
    cache = SwanCache(model, **room)
    kv = cache.winnowed[0]
    looks, first = [], None
    for step, token in enumerate(ids.unbind(1), 1):
        with torch.no_grad():
            model(token[None], **{keyword: cache})
        if step not in (200, steps // 2, steps):
            continue
        assert (kv.length, kv.history_length) == (step, step - cache.plan.buffer - cache.plan.sinks)
        check_answer(kv)
        oldest = [t.clone() for p in (kv.state.k_history, kv.state.v_history) for t in p.tokens(0, 64).tensors]
        first = first or oldest
        assert all(torch.equal(now, then) for now, then in zip(oldest, first, strict=True)), "old tokens have changed"
        del oldest
        forget_mixes()
        new = live_storages().items() - before.items()
        kept = {t.untyped_storage().data_ptr() for t in first}
        sizes = [size for address, size in new if address not in kept]
        looks.append((len(sizes), sum(sizes) - cache.nbytes, len(gc.get_objects()), resident() - cache.nbytes))
    counts, uncounted, objects, memory = zip(*looks, strict=True)
    assert len(set(counts)) == 1, f"storages {counts}"
    assert len(set(uncounted)) == 1 and uncounted[0] < 4096, f"bytes that are not counted {uncounted}"
    assert objects[2] - objects[1] < 200, f"objects {objects}"
    assert memory[2] - memory[1] < 16 * 2**20, f"resident bytes beside the cache {memory}"


@pytest.mark.parametrize("steps", [500, pytest.param(20_000, marks=slow)], ids=["500", "20k"])
def test_a_long_compiled_decode_compiles_once(steps):
    torch._dynamo.reset()
    counters.clear()
    layer = SwanAttention(32, HEADS, KV_HEADS, D).requires_grad_(False)
    layer.set_bases(random_rotation(KV_HEADS, D, seed=0), random_rotation(KV_HEADS, D, seed=1))
    layouts = LayerPlan(Graded(((8, 8), (8, 4))), Graded(((16, 4),)))
    cache = KVCache(layouts, buffer=16, sinks=2, static=True, max_length=steps + 2)
    counter, xs = CompileCounter(), normal(0, steps, 1, 1, 32)
    layer(xs[0], cache)
    step = torch.compile(layer, fullgraph=True, backend=counter)
    step(xs[0], cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in xs[1:]:
            step(x, cache)
        twin = copy.deepcopy(cache)
        assert torch.equal(step(xs[0], cache), layer(xs[0], twin))
    assert (cache.length, counter.frame_count) == (steps + 2, 1)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()
