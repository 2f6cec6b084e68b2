"""A `SwanCache` in transformers' protocol."""

import copy

import pytest
import torch
from transformers import DynamicCache

from swan import LayerPlan, Plan, SwanCache, TopK, attach, calibrate
from swan.integrations.transformers import cache_keyword
from tests.integrations.caches import NEXT, TEXT, filled, pruned
from tests.tiny import (
    attached,
    everything,
    float32_bound,
    greatest_difference,
    logits_of,
    tiny,
    tokens,
)

THREE = {"gemma3": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}}
EXACT = Plan([LayerPlan(TopK(16, 8, bits=16), TopK(16, 5, bits=16))] * 2, buffer=8, sinks=2)  # no rounding to int8


@pytest.fixture
def model():
    return attached()


OPERATIONS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "the same row twice": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "crop by 3": lambda cache: cache.crop(-3),
    "crop by the buffer": lambda cache: cache.crop(-8),
    "crop by more than the buffer": lambda cache: cache.crop(-20),
    "reset": lambda cache: cache.reset(),
}
ROWS = {"repeat": [0, 0, 0, 1, 1, 1], "select": [1]}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_do_what_they_do_to_a_dense_cache(model, operation):
    cache, dense = filled(model, everything(model)), filled(model, DynamicCache())
    next_tokens = NEXT["input_ids"][ROWS.get(operation, [0, 1])]
    logits = []
    for held in (cache, dense):
        OPERATIONS[operation](held)
        if operation == "reset":
            held = held if held is cache else DynamicCache()  # a dense one keeps its zeroed tokens
        logits.append(logits_of(model, held, chunk=2, input_ids=next_tokens))
    assert greatest_difference(*logits) < float32_bound(model, **TEXT)


@pytest.mark.parametrize(("operation", "rows"), [("reorder", [1, 0]), ("repeat", ROWS["repeat"]), ("select", [1])])
def test_rows_take_their_packed_history_with_them(model, operation, rows):
    cache = filled(model, pruned(model, 0.33, prefill="windowed"))
    moved = copy.deepcopy(cache)
    OPERATIONS[operation](moved)
    for index, kv in cache.winnowed.items():
        for a, b in zip(kv.tensors, moved.winnowed[index].tensors, strict=False):
            assert torch.equal(a[rows], b)


def test_crop_to_a_length_as_older_versions_ask(model):
    cache = filled(model, everything(model))
    for layer in cache.layers:
        layer.crop(55)
    assert cache.get_seq_length() == 55
    for layer in cache.layers:
        layer.crop(100)  # longer than it is: nothing happens
    assert cache.get_seq_length() == 55


def test_crop_by_nothing(model):
    cache = filled(model, pruned(model))
    size = cache.nbytes
    cache.crop(0)
    assert (cache.get_seq_length(), cache.nbytes) == (60, size)


def test_crop_of_everything(model):
    cache = filled(model, everything(model))
    cache.crop(-100)
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


def test_cropped_tokens_that_were_pruned_stay_pruned(model):
    """After a crop by more than the buffer the last tokens are packed: another result than without it."""
    cache = filled(model, pruned(model, 0.33, prefill="windowed"))
    cache.crop(-20)
    fresh = pruned(model, 0.33, prefill="windowed")
    logits_of(model, fresh, input_ids=TEXT["input_ids"][:, :40])
    assert cache.get_seq_length() == fresh.get_seq_length() == 40
    a, b = (logits_of(model, held, **NEXT) for held in (cache, fresh))
    assert greatest_difference(a, b) > float32_bound(model, **TEXT)
    assert torch.isfinite(a).all()


def test_a_copy_goes_its_own_way(model):
    cache = filled(model, pruned(model, 0.5, prefill="windowed"))
    twin = copy.deepcopy(cache)
    assert twin.nbytes == cache.nbytes
    expected = logits_of(model, cache, chunk=1, **NEXT)
    cache.retention = 0.25
    logits_of(model, cache, chunk=1, **NEXT)
    assert (twin.get_seq_length(), twin.retention) == (60, pruned(model, 0.5).retention)
    assert torch.equal(logits_of(model, twin, chunk=1, **NEXT), expected)


def test_a_shared_beginning_is_read_once(model):
    """The way to reuse the cache of a prompt: copy it for each continuation."""
    prompt = filled(model, SwanCache(model, EXACT, prefill="windowed"))
    for seed in range(2):
        new = {"input_ids": tokens(2, 6, seed=seed)}
        reused = logits_of(model, copy.deepcopy(prompt), chunk=3, **new)
        fresh = filled(model, SwanCache(model, EXACT, prefill="windowed"))
        assert greatest_difference(reused, logits_of(model, fresh, **new)) < float32_bound(model, **TEXT)


def test_lengths(model):
    cache = pruned(model)
    assert (cache.get_seq_length(), cache.get_seq_length(1)) == (0, 0)
    filled(model, cache)
    assert (cache.get_seq_length(), cache.get_seq_length(1)) == (60, 60)  # seen, not stored dense
    assert cache.get_mask_sizes(5, 0) == (65, 0)
    assert [layer.get_max_length() for layer in cache.layers] == [-1, -1]
    assert [layer.get_max_cache_shape() for layer in cache.layers] == [-1, -1]
    assert not cache.is_compileable
    assert cache.is_sliding == [False, False]


def test_max_length_of_the_cache(model):
    cache = pruned(model)
    longest = cache.get_max_length() if hasattr(cache, "get_max_length") else cache.get_max_cache_shape()
    assert longest == -1


def test_an_offloaded_cache_comes_back_by_itself(model):
    """To where it was; here that is a device which holds no numbers."""
    cache, twin = (filled(model, pruned(model)) for _ in range(2))
    cache.offload()
    assert all(t.device.type == "cpu" for kv in cache.winnowed.values() for t in kv.tensors)
    assert torch.equal(logits_of(model, cache, **NEXT), logits_of(model, twin, **NEXT))
    layer = cache.layers[0]
    layer.offload()
    layer.home = torch.device("meta")
    layer.prefetch()
    assert all(t.device.type == "meta" for t in layer.kv.tensors)
    assert layer.home is None


def test_excluded_layers_stay_dense():
    model = attached(num_hidden_layers=3)
    cache = filled(model, pruned(model, 0.33, exclude=[2, 0, 2]))
    assert list(cache.winnowed) == [1]
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "SwanLayer", "DynamicLayer"]
    assert "exclude=[0, 2]" in repr(cache)
    assert cache.layers[0].keys.shape[2] == 60
    assert cache.nbytes > 2 * cache.layers[0].keys.nbytes * 2
    before = cache.nbytes
    cache.retention = 0.25
    assert cache.nbytes < before
    for exclude, message in (([0, 1, 2], "every layer of full attention is excluded"), ([3], r"here \[0, 1, 2\], got")):
        with pytest.raises(ValueError, match=message):
            pruned(model, exclude=exclude)


def test_retention_does_not_count_excluded_layers():
    """They do not compete for bytes: what is winnowed has no more than was asked for."""
    model = tiny(num_hidden_layers=4)
    attach(model, calibrate(model, [tokens(2, 200, seed=1)], progress=False))
    for exclude in ((0,), (3,), (1, 2)):
        cache = pruned(model, 0.33, exclude=exclude)
        layers = [kv.plan_layer for kv in cache.winnowed.values()]
        assert cache.retention == pytest.approx(sum(layer.retention for layer in layers) / len(layers))
        assert 0.3 < cache.retention <= 0.33
        cache.retention = 0.25
        assert 0.2 < cache.retention <= 0.25


def test_the_retention_of_a_plan_does_not_count_excluded_layers(model):
    layers = [LayerPlan(TopK(16, n), TopK(16, n)) for n in (12, 5)]
    cache = SwanCache(model, Plan(layers, buffer=8, sinks=2), exclude=[0])
    assert cache.retention == layers[1].retention < layers[0].retention


def test_a_budget_counts_excluded_layers():
    model = attached()
    cache = SwanCache(model, budget=100_000, buffer=8, sinks=2, exclude=[0])
    logits_of(model, cache, chunk=7, **TEXT)
    assert cache.retention < 1
    assert cache.nbytes <= 100_000
    with pytest.raises(ValueError, match="with 1 dense layers"):
        logits_of(model, cache, chunk=7, input_ids=tokens(2, 100))
    with pytest.raises(ValueError, match="a budget needs layers of attention only; this model has others"):
        SwanCache(attached("lfm2"), budget=60_000)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("settings", [{}, {"exclude": [1]}], ids=["all", "one excluded"])
def test_a_budget_holds_under_autocast(architecture, settings):
    """Keys come in float32 and are stored in bfloat16: the dial falls as low as in bfloat16, and no lower."""
    budget = 48_000 if settings else 38_000
    model = attached(architecture, num_hidden_layers=3, **THREE.get(architecture, {}))
    cache, half = (SwanCache(model, budget=budget, buffer=8, sinks=2, **settings) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for chunk, text in ((None, tokens(1, 40)), (1, tokens(1, 30))):
            logits_of(model, cache, chunk=chunk, input_ids=text)
            assert cache.nbytes <= budget
    assert cache.winnowed[2].state.k_recent.dtype == torch.bfloat16
    if architecture == "llama" and not settings:
        logits_of(model.to(torch.bfloat16), half, input_ids=tokens(1, 70))
        assert 0.2 < cache.retention == half.retention < 1


def test_autocast_is_as_close_as_a_dense_cache():
    """Token by token on the history, in bfloat16, against float32."""
    model = attached()
    exact = logits_of(model, **TEXT)
    errors = []
    for cache in (DynamicCache(), everything(model)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append((logits_of(model, cache, chunk=1, **TEXT) - exact).abs().mean())
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3-next"])
def test_hybrids(architecture):
    """Effects by layer, a reset to other rows, and a full static cache."""
    model = tiny(architecture)
    attach(model, calibrate(model, [tokens(2, 200, seed=1)], progress=False))
    cache = pruned(model)
    for rows in (2, 3):
        expected = logits_of(model, pruned(model), input_ids=tokens(rows, 30))
        assert torch.equal(logits_of(model, cache, input_ids=tokens(rows, 30)), expected)
        cache.reset()
        assert cache.nbytes == 0
    full = SwanCache(model, retention=0.5, static=True, max_length=30)
    logits_of(model, full, input_ids=tokens(2, 30))
    with pytest.raises(ValueError, match="the static cache holds 30 of 30 tokens, 1 more do not fit"):
        logits_of(model, full, input_ids=tokens(2, 1))


def test_a_static_cache_comes_back_in_place(model):
    cache = SwanCache(model, retention=0.5, static=True, max_length=70)
    logits_of(model, cache, **TEXT)
    cache.offload()
    logits_of(model, cache, **NEXT)
    for kv in cache.winnowed.values():
        assert all(hasattr(t, "_dynamo_static_input_type") for t in kv.tensors)


def test_another_batch_needs_a_reset(model):
    cache = filled(model, pruned(model))
    with pytest.raises(ValueError, match=r"reset\(\) it for another batch"):
        logits_of(model, cache, input_ids=tokens(3, 5))


def test_output_attentions_is_refused(model):
    """Weights over a packed history are never formed; None in their place would mislead."""
    with pytest.raises(ValueError, match="does not support output_attentions"):
        model(**TEXT, **{cache_keyword(model): pruned(model)}, output_attentions=True)
