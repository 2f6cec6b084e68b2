"""A byte budget: the dial falls as the history grows."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Plan, SwanCache
from swan.integrations.transformers import cache_keyword
from tests.integrations.budgets import BUDGET, DENSE, TEXT, assert_same, budgeted, state, step, watched
from tests.strategies import splits
from tests.tiny import (
    attached,
    forget_mixes,
    generated,
    left_padded,
    live_storages,
    logits_of,
    tokens,
)

DIMS = [(16, 16)] * 2


@pytest.fixture(scope="module")
def model():
    return attached(effects=True)


@pytest.fixture(scope="module")
def hybrid():
    """The first layer has a sliding window of 8 tokens, the second is winnowed."""
    return attached("gemma3", effects=True)


@given(
    splits(300),
    st.integers(20, 200),
    st.integers(1, 3),
    st.sampled_from(["chunk", "windowed"]),
    st.sampled_from(["llama", "gemma3"]),
    st.booleans(),
)
def test_never_more_than_the_budget(chunks, room, rows, prefill, architecture, padded):
    """After every chunk, between its layers, and while histories grow, move and lose tokens."""
    model = attached_once(architecture)
    inputs = left_padded(*[300, 280, 150][:rows]) if padded else {"input_ids": tokens(rows, 300)}
    cache = budgeted(model, rows * room * DENSE, on_full="evict", prefill=prefill)
    start = 0
    with warnings.catch_warnings(), watched(model, cache):
        warnings.simplefilter("ignore", UserWarning)
        for chunk in [*chunks, *[1] * 8]:
            ids, keyword = inputs["input_ids"], {cache_keyword(model): cache}
            now = [c % 300 for c in range(start, start + chunk)]
            given = {"attention_mask": widened(inputs["attention_mask"], start + chunk)} if padded else {}
            with torch.no_grad():
                model(ids[:, now], **given, **keyword)
            assert cache.nbytes <= cache.budget
            start += chunk
    assert cache.get_seq_length() == start


MODELS = {}


def attached_once(architecture):
    if architecture not in MODELS:
        MODELS[architecture] = attached(architecture, effects=True)
    return MODELS[architecture]


def widened(mask, length):
    return torch.nn.functional.pad(mask, (0, max(length - mask.shape[1], 0)), value=1)[:, :length]


def test_what_is_alive_is_within_the_budget(model):
    """By every storage in the process (tests/integrations/test_memory.py asks the allocator, step by step)."""
    forget_mixes()  # small matrices, one for each layout, kept for all caches of the process
    cache = budgeted(model, on_full="evict")
    before, levels = live_storages(), set()
    with pytest.warns(UserWarning, match="the oldest tokens"):
        for start in range(0, 500, 100):
            step(model, cache, TEXT["input_ids"][:, start : start + 99])
            step(model, cache, TEXT["input_ids"][:, start + 99 : start + 100])
            forget_mixes()
            alive = sum(size for _, size in live_storages().items() - before.items())
            assert alive == cache.nbytes <= BUDGET
            levels.add(cache.retention)
    assert len(levels) > 1


def test_the_budget_is_used(model):
    """Measured when the first token is dropped: of 2 layers a piece that exists twice is much, and so are 64 tokens."""
    cache = budgeted(model, on_full="evict")
    with pytest.warns(UserWarning, match="the oldest tokens"):
        while not cache.dropped:
            used = cache.nbytes / BUDGET
            step(model, cache, tokens(1, 5))
    assert used > 0.7


def test_a_level_that_is_not_needed_is_not_applied(model):
    cache = budgeted(model, 10**9)
    expected = step(model, SwanCache(model, retention=1.0, buffer=8, sinks=2), TEXT["input_ids"])
    assert torch.equal(step(model, cache, TEXT["input_ids"]), expected)
    assert (cache.retention, cache.dropped) == (1.0, 0)


def test_a_long_text_goes_straight_to_its_level(model):
    """Nothing was packed at another level before: the cache is one that has always had this one."""
    cache = budgeted(model)
    step(model, cache, TEXT["input_ids"][:, :200])
    assert cache.retention < 0.5
    fresh = SwanCache(model, retention=cache.retention, buffer=8, sinks=2)
    step(model, fresh, TEXT["input_ids"][:, :200])
    assert cache.plan == fresh.plan
    for kv, other in zip(cache.winnowed.values(), fresh.winnowed.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kv.tensors, other.tensors, strict=True))
    # A cache of the next level does not fit: itself, the largest part of a layer once more, and columns with padding.
    higher = [plan for plan in Plan.levels(dims=DIMS, buffer=8, sinks=2) if plan.retention > cache.retention]
    next_one = SwanCache(model, higher[-1])
    step(model, next_one, TEXT["input_ids"][:, :200])
    assert next_one.nbytes + largest_part(next_one) + 2 * 8 * (8 + 2 + 1) > BUDGET


def largest_part(cache):
    """Bytes of the keys or of the values of a history of one row."""
    parts = []
    for kv in cache.winnowed.values():
        layer, history = kv.plan_layer, kv.nbytes - 2 * 2 * (8 + 2) * 16 * 4  # without buffer and sinks
        sizes = [layout.vector_bytes(itemsize=4) for layout in (layer.keys, layer.values)]
        parts.append(history * max(sizes) // sum(sizes))
    return max(parts)


@pytest.mark.parametrize("chunks", [[60], [60, 1]], ids=["chunk", "step"])
def test_a_sliding_layer_counts_as_what_it_holds(hybrid, chunks):
    """To the byte: what the cache and its largest part need is enough for the highest level, one byte less is not."""

    def filled(budget):
        cache = budgeted(hybrid, budget)
        for size in chunks:
            step(hybrid, cache, TEXT["input_ids"][:, :size])
        return cache

    cache = filled(10**9)
    needed = cache.nbytes + cache.winnowed[1].state.k_history.nbytes + 8  # of padding that might have come
    assert filled(needed).retention == 1
    assert filled(needed - 1).retention < 1


def test_a_cropped_layer_still_holds_its_memory(model):
    """Cropped tokens of a dense layer are freed with the next tokens: the dial cannot rise into it before."""
    cache = budgeted(model, 10**9, exclude=[0])
    cache.retention = 0.5
    step(model, cache, TEXT["input_ids"][:, :300])
    cache.crop(-290)
    raised = copy.deepcopy(cache)
    raised.retention = 1.0
    cache.set_budget(raised.nbytes - 1)
    with pytest.raises(ValueError, match="retention 1 would need"):
        cache.retention = 1.0
    assert cache.nbytes <= cache.budget


@pytest.mark.parametrize("chunk", [4, 40])
def test_a_budget_is_a_dial_that_moves_by_itself(model, chunk):
    cache, dialled = budgeted(model), SwanCache(model, retention=1.0, buffer=8, sinks=2)
    moves = 0
    for start in range(0, 280, chunk):
        ids = TEXT["input_ids"][:, start : start + chunk]
        found = step(model, cache, ids)
        moves += cache.retention < dialled.retention
        dialled.retention = cache.retention
        assert torch.equal(found, step(model, dialled, ids))
        assert cache.nbytes == dialled.nbytes
    assert moves > 2


def test_generation_within_a_budget(model):
    ids = generated(model, budgeted(model), input_ids=TEXT["input_ids"][:, :60], max_new_tokens=100)
    assert ids.shape == (1, 160)


def test_the_dial_of_a_budget(model):
    cache = budgeted(model)
    cache.retention = 0.5  # before the first token
    assert cache.retention <= 0.5
    cache.retention = 1.0
    step(model, cache, TEXT["input_ids"][:, :150])
    level = cache.retention
    before = state(cache)
    with pytest.raises(ValueError, match=rf"retention 1 would need \d+ bytes, the budget is {BUDGET}; .* stays at"):
        cache.retention = 1.0
    assert_same(cache, before)
    cache.retention = 0.21
    assert cache.retention <= 0.21
    step(model, cache, TEXT["input_ids"][:, 150:151])  # it does not rise by itself
    assert cache.retention <= 0.21
    cache.retention = level  # fits
    assert cache.retention == level
    assert cache.nbytes <= BUDGET


def test_reset_begins_at_the_highest_level(model):
    cache = budgeted(model, on_full="evict")
    with pytest.warns(UserWarning, match="the oldest tokens"):
        first = step(model, cache, TEXT["input_ids"][:, :400])
    assert cache.retention < 0.21
    cache.reset()
    assert (cache.retention, cache.nbytes, cache.dropped, cache.get_seq_length()) == (1.0, 0, 0, 0)
    assert torch.equal(step(model, cache, TEXT["input_ids"][:, :400]), first)  # and warns no more


def test_reset_of_a_hybrid_cache(hybrid):
    cache = budgeted(hybrid)
    expected = logits_of(hybrid, cache, chunk=20, input_ids=TEXT["input_ids"][:, :100])
    cache.reset()
    assert (cache.retention, cache.nbytes, cache.get_seq_length()) == (1.0, 0, 0)
    assert torch.equal(logits_of(hybrid, cache, chunk=20, input_ids=TEXT["input_ids"][:, :100]), expected)


def test_what_it_shows(model):
    cache = budgeted(model, on_full="evict")
    with pytest.warns(UserWarning, match="the oldest tokens"):
        step(model, cache, TEXT["input_ids"])
    assert repr(cache).startswith(
        f"SwanCache(budget={BUDGET}, on_full='evict', retention={cache.retention:.3g}, buffer=8"
    )
    for row in cache.report():
        assert (row["budget"], row["dropped"], row["retention"]) == (BUDGET, cache.dropped, cache.retention)
        assert row["history"] + row["dropped"] + 8 + 2 == row["tokens"] == 500


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1000, 1000),
        ("512B", 512),
        ("500kB", 500_000),
        ("64MiB", 64 * 2**20),
        (" 1.5 GB ", 1_500_000_000),
        ("0.5KiB", 512),
        ("2GiB", 2**31),
        ("1TB", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes(model, text, size):
    assert budgeted(model, text).budget == size


@pytest.mark.parametrize(
    "text", ["64", "MiB", "64 MB!", "-1MB", "1e3kB", "64Mb", "64mib", "1,5GB", "", 1.5, True, None, b"1kB"], ids=repr
)
def test_what_is_not_a_size(model, text):
    message = "give exactly one of" if text is None else "a number of bytes or text like '64MiB' in B, kB, MB, GB"
    with pytest.raises(ValueError, match=message):
        budgeted(model, text)


@pytest.mark.parametrize("text", [0, -5, "0MB", "0.1B"])
def test_a_budget_of_nothing(model, text):
    with pytest.raises(ValueError, match="at least one byte, got"):
        budgeted(model, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give exactly one of plan, retention, budget and levels"),
        ({"retention": 0.5, "budget": 1000}, "give exactly one of plan, retention, budget and levels"),
        ({"plan": Plan.for_retention(0.5, dims=DIMS), "budget": 1000}, "give exactly one of"),
        ({"budget": 1000, "on_full": "drop"}, "'raise', or 'evict' with a budget; got 'drop' and budget=1000"),
        ({"retention": 0.5, "on_full": "evict"}, "'raise', or 'evict' with a budget; got 'evict' and budget=None"),
    ],
    ids=["none", "two", "plan", "drop", "evict"],
)
def test_settings_that_do_not_fit(model, settings, message):
    with pytest.raises(ValueError, match=message):
        SwanCache(model, **settings)
