"""A static `SwanCache`: that of a dynamic one, in fixed memory."""

import itertools
import re

import pytest
import torch

from tests.integrations.statics import EXACT, LEVELS, PADDED, TEXT, close, static, twins
from tests.tiny import attached, generated, logits_of, tokens

PLANS = {"everything": {"retention": 1.0}, "top-k": {"plan": EXACT}, "graded": {"retention": 0.33}}
each_plan = pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS)


@each_plan
@pytest.mark.parametrize("chunk", [1, 7, 60], ids=["token by token", "chunks of 7", "at once"])
@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
def test_a_static_cache_is_a_dynamic_one(settings, chunk, prefill):
    model = attached()
    a, b = (logits_of(model, cache, chunk=chunk, **TEXT) for cache in twins(model, prefill=prefill, **settings))
    assert close(model, a, b)


@each_plan
@pytest.mark.parametrize("chunk", [1, 7, 60], ids=["token by token", "chunks of 7", "at once"])
def test_rows_are_padded_as_in_a_dynamic_one(settings, chunk):
    model, real = attached(), PADDED["attention_mask"].bool()
    a, b = (logits_of(model, cache, chunk=chunk, **PADDED) for cache in twins(model, **settings))
    assert close(model, a[real], b[real], PADDED)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "gpt-neox", "mixtral", "olmo2", "phi3", "qwen2", "qwen3"])
def test_architectures(architecture):
    model = attached(architecture)
    a, b = (logits_of(model, cache, chunk=20, **TEXT) for cache in twins(model, EXACT))
    assert close(model, a, b)


def test_sliding_layers_stay_those_of_transformers():
    model = attached("gemma3")
    cache = static(model, retention=0.5)
    assert [type(layer).__name__ for layer in cache.layers] == ["StaticSlidingWindowLayer", "StaticSwanLayer"]
    logits_of(model, cache, chunk=20, **TEXT)
    assert cache.layers[0].keys.shape[2] == 8


@pytest.mark.parametrize("padded", [False, True], ids=["one length", "left-padded"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_token_exact(padded, beams):
    model = attached()
    inputs = {name: PADDED[name] for name in ("input_ids", "attention_mask")} if padded else TEXT
    a, b = (generated(model, cache, **inputs, num_beams=beams) for cache in twins(model, retention=1.0, max_length=80))
    assert torch.equal(a, b)


def test_a_conversation_goes_on():
    model = attached()
    cache, dynamic = twins(model, EXACT)
    ids = TEXT["input_ids"][:, :20]
    for turn in range(3):
        ids = torch.cat([ids, tokens(2, 3, seed=turn)], dim=1)
        expected = generated(model, dynamic, input_ids=ids, max_new_tokens=6)
        assert torch.equal(generated(model, cache, input_ids=ids, max_new_tokens=6), expected)
        ids = expected


def test_memory_is_that_of_its_level():
    model = attached()
    cache = static(model, levels=LEVELS, max_length=1000)
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    logits_of(model, cache, input_ids=TEXT["input_ids"][:, :1])
    sizes = {}
    for retention in [*LEVELS, 0.33, 0.5]:
        cache.retention = retention
        entry = cache.plan.layers[0]
        vectors = 2 * 2 * 2 * (entry.keys.vector_bytes(4) + entry.values.vector_bytes(4))
        dense = 2 * 2 * 2 * 2 * 16 * 4
        expected = 1024 * vectors + 10 * dense  # 990, and a slot behind them, in blocks of 64
        assert expected <= cache.nbytes <= expected + 200  # counters
        assert sizes.setdefault(cache.retention, cache.nbytes) == cache.nbytes
    assert all(less < more for more, less in itertools.pairwise(sizes.values()))
    logits_of(model, cache, input_ids=tokens(2, 999))
    assert cache.nbytes == sizes[cache.retention]
    assert cache.compression == cache.nbytes / (1000 * dense)


def test_moved_levels_are_those_of_a_dynamic_cache():
    model = attached()
    caches = twins(model, levels=LEVELS)
    ids, logits = TEXT["input_ids"].split(15, dim=1), ([], [])
    for part, retention in zip(ids, [0.5, 0.26, 0.33, 0.5], strict=True):
        for cache, found in zip(caches, logits, strict=True):
            cache.retention = retention
            found.append(logits_of(model, cache, chunk=1, input_ids=part))
        assert caches[0].retention == caches[1].retention
        assert caches[0].plan == caches[1].plan
    assert close(model, *(torch.cat(found, dim=1) for found in logits))


def test_a_level_is_named_as_it_was_asked_for_or_as_it_is():
    cache = static(attached(), levels=[0.26, 0.5])
    cache.retention = 0.26
    lower = cache.retention
    cache.retention = 0.5
    cache.retention = lower
    assert cache.retention == lower < 0.26


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"levels": LEVELS}, "0.5, 0.33, 0.26"), ({"retention": 0.5}, "0.5"), ({"plan": EXACT}, f"{EXACT.retention:.3g}")],
    ids=["levels", "retention", "plan"],
)
def test_the_dial_has_no_other_levels(settings, named):
    cache = static(attached(), **settings)
    plan = cache.plan
    with pytest.raises(ValueError, match=rf"the dial of this static cache has the levels {re.escape(named)}, got 0\.4"):
        cache.retention = 0.4
    cache.retention = cache.retention
    assert cache.plan is plan


def test_reset_keeps_memory_and_level():
    model = attached()
    cache, dynamic = twins(model, levels=LEVELS)
    logits_of(model, cache, **PADDED | {"input_ids": tokens(3, 60)})
    cache.retention = dynamic.retention = 0.26
    places = [t.data_ptr() for kv in cache.winnowed.values() for t in kv.tensors]
    cache.reset()
    assert (int(cache.get_seq_length()), cache.retention) == (0, dynamic.retention)
    ids = tokens(3, 60)
    a, b = (logits_of(model, held, chunk=20, input_ids=ids) for held in (cache, dynamic))
    assert close(model, a, b, {"input_ids": ids})
    assert places == [t.data_ptr() for kv in cache.winnowed.values() for t in kv.tensors]


def test_reordered_rows_stay_in_place():
    model = attached()
    cache, dynamic = twins(model, EXACT)
    for held in (cache, dynamic):
        logits_of(model, held, input_ids=TEXT["input_ids"][:, :40])
    places = [t.data_ptr() for t in cache.winnowed[0].tensors]
    for held in (cache, dynamic):
        held.reorder_cache(torch.tensor([1, 0]))
        held.crop(-5)
    assert places == [t.data_ptr() for t in cache.winnowed[0].tensors]
    a, b = (logits_of(model, held, chunk=5, input_ids=tokens(2, 20)) for held in (cache, dynamic))
    assert close(model, a, b)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_full_cache_says_so_and_stays(architecture):
    """Before any layer has taken a token, a sliding one neither."""
    model = attached(architecture)
    cache = static(model, retention=0.5)
    logits_of(model, cache, **TEXT)
    with pytest.raises(ValueError, match="holds 60 of 64 tokens, 5 more do not fit; build it with a larger max_length"):
        logits_of(model, cache, input_ids=tokens(2, 5))
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [60, 60]
    logits_of(model, cache, input_ids=tokens(2, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": None}, "a static cache needs max_length, the tokens it can hold; got None"),
        ({"static": False}, "max_length is for static caches"),
        ({"budget": "1MiB"}, r"a budget lowers the dial .*; give levels=\[...\] and move the dial"),
        ({"levels": [], "retention": None}, r"levels are one or more retentions .*, got \[\] and static=True"),
        ({"levels": [0.5], "static": False, "max_length": None}, r"got \[0.5\] and static=False"),
        ({"levels": [0.5], "retention": 0.5}, "give exactly one of plan, retention, budget and levels"),
        ({"levels": [0.5, 0.01]}, "no plan fits in retention 0.01"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    chosen = {} if settings.keys() & {"budget", "levels"} else {"retention": 0.5}
    with pytest.raises(ValueError, match=message):
        static(attached(), **chosen | settings)


def test_lengths_and_repr():
    model = attached()
    cache = static(model, levels=LEVELS)
    assert cache.is_compileable
    assert cache.get_mask_sizes(5, 0) == (64, 0)
    assert [layer.get_max_cache_shape() for layer in cache.layers] == [64, 64]
    assert not cache.is_initialized
    logits_of(model, cache, **TEXT)
    assert cache.is_initialized
    assert [row["history"] for row in cache.report()] == [50, 50]
    assert repr(cache).startswith(
        "SwanCache(static, max_length=64, levels=[0.5, 0.33, 0.26], retention=0.469, buffer=8"
    )
    assert "tokens=60" in repr(cache)
