"""All that a cache holds is in its state: other devices and dtypes, state dicts and copies follow from it."""

import copy
import dataclasses

import pytest
import torch

from swan import Graded, KVCache, LayerPlan, TopK, unpack
from swan.modules.state import CacheState
from tests.strategies import assert_within, attention_bound, qkv, windowed_oracle

D = 16
PLANS = {
    "graded": LayerPlan(Graded(((4, 16), (4, 8), (8, 3))), Graded(((8, 4), (8, 0)))),
    "topk": LayerPlan(TopK(D, 6), TopK(D, 5, bits=16, positions="index")),
    "window": None,
}
each_plan = pytest.mark.parametrize("plan_layer", PLANS.values(), ids=PLANS)
static_or_not = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


def cache_of(plan_layer, static) -> KVCache:
    room = {"static": True, "max_length": 60} if static else {}
    return KVCache(plan_layer, buffer=8, sinks=2, prefill="windowed", **room)


def filled(plan_layer, static, padded=False) -> KVCache:
    cache = cache_of(plan_layer, static)
    cache.update(*qkv(0, 2, (4, 2), 30, 30, D, D, torch.float32)[1:], padding=torch.tensor([3, 0]) if padded else None)
    return cache


def more(cache: KVCache) -> torch.Tensor:
    return cache(*qkv(1, 2, (4, 2), 5, 5, D, D, torch.float32))


@each_plan
@static_or_not
def test_every_tensor_is_in_a_field(plan_layer, static):
    cache = filled(plan_layer, static, padded=True)
    fields = [getattr(cache.state, field.name) for field in dataclasses.fields(CacheState)]
    tensors = [t for value in fields for t in getattr(value, "tensors", (value,)) if isinstance(t, torch.Tensor)]
    assert {id(t) for t in tensors} == {id(t) for t in cache.tensors}
    assert cache.buffer.state is cache.history.state is cache.state


@each_plan
@static_or_not
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_state_dict_is_the_cache(plan_layer, static, padded):
    cache = filled(plan_layer, static, padded)
    state = {name: t.clone() for name, t in torch.nn.ModuleList([cache]).state_dict().items()}
    other = torch.nn.ModuleList([cache_of(plan_layer, static)])
    other.load_state_dict(state)
    assert (other[0].length, other[0].history_length) == (30, cache.history_length)
    assert torch.equal(more(other[0]), more(cache))
    other.load_state_dict({})  # that of an empty cache
    assert (other[0].length, cache_of(plan_layer, static).state_dict()) == (0, {})


@each_plan
@pytest.mark.parametrize("tokens", [1, 5, 11, 40])
@pytest.mark.parametrize(
    "kinds", [(False, False), (False, True), (True, False)], ids=["same", "to static", "to dynamic"]
)
def test_a_state_dict_of_few_tokens(plan_layer, kinds, tokens):
    """A dynamic cache writes the part of the ring that it has; a static one reads it, and the other way round."""
    source, other = (
        KVCache(plan_layer, buffer=20, sinks=2, static=static, max_length=60 if static else None) for static in kinds
    )
    source.update(*qkv(0, 2, (4, 2), tokens, tokens, D, D, torch.float32)[1:])
    state = source.state_dict()
    assert state["keys"].shape[2] == 2 + (20 if kinds[0] else max(min(tokens, 20), 8))
    other.load_state_dict(state)
    assert (other.length, other.history_length) == (tokens, source.history_length)
    q, k, v = qkv(1, 2, (4, 2), 5, 5, D, D, torch.float32)
    assert_within(other(q, k, v), source(q, k, v), 2 * attention_bound(q, *(torch.cat([t] * 12, 2) for t in (k, v))))


def test_a_state_dict_has_slots_for_its_tokens():
    source, other = (KVCache(PLANS["topk"], buffer=20, sinks=2) for _ in range(2))
    source.update(*torch.randn(2, 1, 2, 11, D))
    state = source.state_dict()
    assert state["keys"].shape[2] == 2 + 11
    for slots in (10, 21):
        wrong = {name: state[name].new_zeros(1, 2, 2 + slots, D) for name in ("keys", "values")}
        with pytest.raises(ValueError, match=r"(keys|values) of a saved cache must be torch.float32 \[1, 2, 22, 16\]"):
            other.load_state_dict(state | wrong)
    full = {"length": torch.tensor(10), "first": torch.tensor(2)}  # tokens have left: the ring was full once
    with pytest.raises(ValueError, match=r"(keys|values) of a saved cache must be"):
        other.load_state_dict(state | full)


def test_a_state_dict_knows_what_was_dropped():
    cache, other = filled(PLANS["graded"], False), cache_of(PLANS["graded"], False)
    cache.evict(7)
    other.load_state_dict(cache.state_dict())
    assert (other.dropped, other.history_length) == (7, 13)
    assert torch.equal(more(other), more(cache))


def test_a_state_dict_knows_what_an_empty_cache_owes():
    """Found by tests/stateful."""
    cache, other = (cache_of(PLANS["graded"], False) for _ in range(2))
    cache.evict(7)
    other.load_state_dict(cache.state_dict())
    assert (other.dropped, other.length) == (7, 0)
    assert torch.equal(more(other), more(cache))


def test_a_state_dict_without_tokens_has_none():
    owing, other = (cache_of(PLANS["graded"], False) for _ in range(2))
    owing.evict(7)
    state = owing.state_dict()
    state = {name: torch.tensor(3) if name.endswith("length") else t for name, t in state.items()}
    with pytest.raises((ValueError, RuntimeError), match="holds no tokens, got 3"):
        other.load_state_dict(state)
    assert (other.dropped, other.length) == (0, 0)


def test_a_state_dict_knows_of_sinks_to_come():
    """A row was nothing but padding so far; its sinks are seen long after."""
    cache, other = (cache_of(PLANS["topk"], False) for _ in range(2))
    cache.update(*qkv(0, 2, (4, 2), 3, 3, D, D, torch.float32)[1:], padding=torch.tensor([5, 0]))
    other.load_state_dict(cache.state_dict())
    for _ in range(4):
        assert torch.equal(more(other), more(cache))


@static_or_not
def test_a_state_dict_has_no_room_ahead(static):
    cache = filled(PLANS["graded"], static)
    stored = {t.shape[2] for name, t in cache.state_dict().items() if name.startswith(("k.", "v."))}
    assert stored == {cache.history_length} == {20}


def test_a_loaded_cache_shares_nothing_with_its_state_dict():
    cache, other = filled(PLANS["graded"], False), cache_of(PLANS["graded"], False)
    state = cache.state_dict()
    other.load_state_dict(state)
    before = more(copy.deepcopy(cache))
    more(other)
    assert torch.equal(more(cache), before)


@each_plan
@static_or_not
def test_a_copy_is_a_cache_of_its_own(plan_layer, static):
    cache = filled(plan_layer, static)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    more(copies[0])
    assert (cache.length, copies[0].length, copies[1].length) == (30, 35, 30)
    assert copies[0].buffer.state is copies[0].state
    assert torch.equal(more(copies[1]), more(cache))


@static_or_not
@pytest.mark.parametrize("layout", [Graded(((4, 16), (12, 4))), TopK(D, 6), TopK(D, 6, bits=16)], ids=str)
def test_another_dtype(layout, static):
    """Codes and their scales stay, values of 16 bits follow; new tokens come in the new dtype."""
    cache = filled(LayerPlan(layout, layout), static)
    before = unpack(cache.state.k_history.tokens(0, cache.history_length))
    codes = [t for t in cache.tensors if t.dtype == torch.uint8]
    cache.half()
    assert cache.state.k_recent.dtype == cache.state.v_history.dtype == torch.float16
    assert all(
        torch.equal(a, b) for a, b in zip(codes, [t for t in cache.tensors if t.dtype == torch.uint8], strict=True)
    )
    now = unpack(cache.state.k_history.tokens(0, cache.history_length))
    assert_within(now.double(), before.double(), 2**-9 * before.abs().max().double())
    q, k, v = qkv(1, 2, (4, 2), 5, 5, D, D, torch.float16)
    assert cache(q, k, v).dtype == torch.float16
    with pytest.raises(TypeError, match=r"holds torch\.float16 keys, got torch\.float32"):
        more(cache)


@each_plan
@static_or_not
def test_another_device(plan_layer, static):
    cache = filled(plan_layer, static)
    cache.to("meta")
    assert {t.device.type for t in cache.tensors} == {"meta"}


def test_a_dtype_and_back_is_the_cache():
    """The cache holds numbers that both dtypes have."""
    q, k, v = (t.bfloat16().float() for t in qkv(0, 2, (4, 2), 30, 30, D, D, torch.float32))
    plan_layer = LayerPlan(Graded(((D, 16),)), TopK(D, D, bits=16))
    cache = cache_of(plan_layer, False)
    cache(*(t[:, :, :25] for t in (q, k, v)))
    cache.bfloat16().float()
    found = cache(*(t[:, :, 25:] for t in (q, k, v)))
    expected = windowed_oracle(q, k, v, plan_layer, buffer=8, sinks=2)[:, :, 25:]
    assert_within(found, expected, attention_bound(q, k, v))


@static_or_not
def test_a_state_dict_that_does_not_fit_changes_nothing(static):
    layouts = LayerPlan(TopK(16, 5), TopK(16, 5, positions="index"))
    source, cache = (
        KVCache(layouts, buffer=4, sinks=1, static=static, max_length=40 if static else None) for _ in "ab"
    )
    source.update(*torch.randn(2, 2, 2, 20, 16))
    cache.update(*torch.randn(2, 2, 2, 9, 16))
    good, before = source.state_dict(), {name: t.clone() for name, t in cache.state_dict().items()}
    for name, t in {
        "length": torch.tensor(10**6),
        "first": torch.tensor(-1),
        "dropped": torch.tensor(3),
        "padded": torch.tensor(0.5),
        "keys": good["keys"][..., :8],
        "values": good["values"].half(),
        "k.plane0": good["k.plane0"][:, :, :3],
        "k.scales": good["k.scales"].float(),
        "k.positions": torch.full_like(good["k.positions"], 255),
        "v.positions": torch.full_like(good["v.positions"], 16),
        "padding": torch.tensor([-1, 0]),
        "odd": torch.zeros(1),
    }.items():
        with pytest.raises(ValueError, match=r"saved cache|stored positions"):
            cache.load_state_dict(good | {name: t})
        now = cache.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now), name
    with pytest.raises(ValueError, match="a saved cache has first too"):
        cache.load_state_dict({name: t for name, t in good.items() if name != "first"})
    cache.load_state_dict(good)
    assert cache.length == 20
