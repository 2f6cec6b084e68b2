"""A byte budget: the dial falls as the history grows, and what a full one does."""

import copy
import itertools
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import swan.modules.cache
from swan import Plan, SwanCache
from swan.integrations.transformers import cache_keyword
from tests.strategies import splits
from tests.tiny import (
    attached,
    float32_bound,
    forget_mixes,
    generated,
    left_padded,
    live_storages,
    logits_of,
    tokens,
)

TEXT = {"input_ids": tokens(1, 500)}
DIMS = [(16, 16)] * 2
DENSE = 2 * 2 * 2 * 16 * 4  # bytes of a token in two layers with two heads of keys and values
BUDGET = 60 * DENSE  # too little for any history at level 1; the least level holds some 400 tokens


@pytest.fixture(scope="module")
def model():
    return attached()


@pytest.fixture(scope="module")
def hybrid():
    """The first layer has a sliding window of 8 tokens, the second is winnowed."""
    return attached("gemma3")


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
    original = swan.modules.cache._resized

    def check(*_):
        assert cache.nbytes <= cache.budget

    def resized(history, capacity, stored):
        new = original(history, capacity, stored)
        assert cache.nbytes + new.nbytes <= cache.budget
        return new

    hooks = [layer.register_forward_hook(check) for layer in model.model.layers]
    swan.modules.cache._resized = resized
    try:
        yield
    finally:
        swan.modules.cache._resized = original
        for hook in hooks:
            hook.remove()


# Never more than the budget -----------------------------------------------------------------------


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
        MODELS[architecture] = attached(architecture)
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
    """When the first token is dropped: 2 layers are few, so a part that exists twice is much, and so are 64 tokens."""
    cache = budgeted(model, on_full="evict")
    with pytest.warns(UserWarning, match="the oldest tokens"):
        while not cache.dropped:
            used = cache.nbytes / BUDGET
            step(model, cache, tokens(1, 5))
    assert used > 0.7


# Which level, and when ----------------------------------------------------------------------------


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
    higher = [plan for plan in Plan.levels(dims=DIMS, buffer=8, sinks=2) if plan.retention > cache.retention]
    assert SwanCache(model, higher[-1]).retention > cache.retention
    assert budgeted(model)._needed(higher[-1], 200, rows=1, itemsize=4) > BUDGET


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
    cache.retention = 0.2
    assert cache.retention <= 0.2
    step(model, cache, TEXT["input_ids"][:, 150:151])  # it does not rise by itself
    assert cache.retention <= 0.2
    cache.retention = level  # fits
    assert cache.retention == level
    assert cache.nbytes <= BUDGET


def test_reset_begins_at_the_highest_level(model):
    cache = budgeted(model, on_full="evict")
    with pytest.warns(UserWarning, match="the oldest tokens"):
        first = step(model, cache, TEXT["input_ids"][:, :400])
    assert cache.retention < 0.2
    cache.reset()
    assert (cache.retention, cache.nbytes, cache.dropped, cache.get_seq_length()) == (1.0, 0, 0, 0)
    assert torch.equal(step(model, cache, TEXT["input_ids"][:, :400]), first)  # and warns no more


def test_reset_of_a_hybrid_cache(hybrid):
    cache = budgeted(hybrid)
    expected = logits_of(hybrid, cache, chunk=20, input_ids=TEXT["input_ids"][:, :100])
    cache.reset()
    assert (cache.retention, cache.nbytes, cache.get_seq_length()) == (1.0, 0, 0)
    assert torch.equal(logits_of(hybrid, cache, chunk=20, input_ids=TEXT["input_ids"][:, :100]), expected)


# Full ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 400])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_full_budget_raises_and_changes_nothing(architecture, chunk):
    """Nor in sliding layers, which come first."""
    model = attached(architecture)
    cache = budgeted(model, BUDGET // (1 if architecture == "llama" else 2))
    step(model, cache, TEXT["input_ids"][:, :200])
    message = (
        rf"the budget of {cache.budget} bytes is full: 1 x \d+ tokens need \d+ bytes at the least retention, 0.188; "
        r"give a larger budget, on_full='evict', which drops the oldest tokens, a shorter text"
    )
    with pytest.raises(ValueError, match=message):
        for _ in range(400):
            before = state(cache)
            step(model, cache, TEXT["input_ids"][:, :chunk])
    assert_same(cache, before)
    if chunk > 1:
        step(model, cache, TEXT["input_ids"][:, :1])  # goes on with what fits
        assert cache.get_seq_length() == 201


def test_a_budget_below_the_buffer(model):
    for on_full, length in itertools.product(("raise", "evict"), (1, 100)):
        cache = budgeted(model, 4000, on_full=on_full)
        message = (
            rf"is full: buffer and sinks of 1 x {length} tokens alone need \d+ bytes .* a larger budget, fewer rows"
        )
        with pytest.raises(ValueError, match=message):
            step(model, cache, TEXT["input_ids"][:, :length])
        assert (cache.nbytes, cache.retention) == (0, 1.0)


def sixteen_bits_only(cache):
    """Its least level loses nothing, so that only eviction changes what it computes."""
    cache._levels = cache._levels[:1]
    return cache


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    "chunks", [[1] * 200, [150, *[1] * 50], [30, 7, 60, 3, 100]], ids=["steps", "prompt", "chunks"]
)
def test_eviction_is_a_mask_over_the_dropped_tokens(model, chunks, padded):
    """Of a model without a cache; positions stay what they were."""
    text = left_padded(200, 160, seed=3) if padded else {"input_ids": tokens(2, 200, seed=3)}
    cache = sixteen_bits_only(budgeted(model, 2 * 220 * DENSE, on_full="evict", prefill="windowed"))
    real = text.get("attention_mask", torch.ones(2, 200)).bool()
    first = real.int().argmax(-1)  # of each row
    column = torch.arange(200)
    visible = (column[:, None] >= column) & real[:, None, :]
    found, start = [], 0
    with pytest.warns(UserWarning, match="the oldest tokens") as warned:
        for chunk in chunks:
            now = slice(start, start + chunk)
            given = {name: t[:, : now.stop] if name == "attention_mask" else t[:, now] for name, t in text.items()}
            found.append(logits_of(model, cache, **given))
            gone = (column >= 2) & (column < 2 + cache.dropped)
            sinks = (column >= first[:, None]) & (column < first[:, None] + 2)
            # What is dropped, but in the window of a query, it still sees.
            recent = column > column[now, None] - 8
            visible[:, now] &= ~gone | sinks[:, None] | recent
            start += chunk
    assert len(warned) == 1
    assert cache.dropped % 64 == 0
    assert cache.dropped > 0
    text = {name: t for name, t in text.items() if name != "attention_mask"}
    mask = torch.zeros(2, 1, 200, 200).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    expected = logits_of(model, **text, attention_mask=mask)
    difference = (torch.cat(found, dim=1) - expected)[real]
    assert difference.abs().max() < float32_bound(model, **text, attention_mask=mask)
    assert cache.get_seq_length() == 200


def test_eviction_moves_memory_once_in_64_steps(model):
    cache = budgeted(model, on_full="evict")
    with pytest.warns(UserWarning, match="the oldest tokens"):
        step(model, cache, TEXT["input_ids"])
    dropped, places = [], set()
    for i in range(200):
        step(model, cache, TEXT["input_ids"][:, i : i + 1])
        dropped.append(cache.dropped)
        places.add(cache.winnowed[0].k_history.tensors[0].data_ptr())
    assert len(set(dropped)) <= 200 // 64 + 2
    assert all(b - a in (0, 64) for a, b in itertools.pairwise(dropped))


def test_one_warning_for_each_cache(model):
    for _ in range(2):
        cache = budgeted(model, on_full="evict")
        with pytest.warns(UserWarning, match=rf"the budget of {BUDGET} bytes is full .* a larger budget") as warned:
            logits_of(model, cache, chunk=50, **TEXT)
            logits_of(model, cache, chunk=50, **TEXT)
        assert len(warned) == 1


def test_a_draft_can_be_taken_back_after_eviction(model):
    cache = budgeted(model, on_full="evict")
    with pytest.warns(UserWarning, match="the oldest tokens"):
        step(model, cache, TEXT["input_ids"])
    twin = copy.deepcopy(cache)
    step(model, cache, tokens(1, 4, seed=5))
    cache.crop(-4)
    ids = tokens(1, 1, seed=6)
    assert cache.get_seq_length() == twin.get_seq_length()
    assert torch.isfinite(step(model, cache, ids)).all()
    cache.crop(-cache.get_seq_length())
    assert (cache.dropped, cache.nbytes) == (0, 0)


# Rows ---------------------------------------------------------------------------------------------

MORE_ROWS = {
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0, 0, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([0, 0, 0])),
}


@pytest.mark.parametrize("operation", MORE_ROWS)
@pytest.mark.parametrize(("architecture", "budget"), [("llama", 70_000), ("gemma3", 50_000)])
def test_more_rows_lower_the_level_first(architecture, budget, operation):
    model = attached(architecture)
    cache = budgeted(model, budget)
    step(model, cache, TEXT["input_ids"][:, :180])
    before = cache.retention
    dialled = SwanCache(model, retention=before, buffer=8, sinks=2)
    step(model, dialled, TEXT["input_ids"][:, :180])
    with watched(model, cache):
        MORE_ROWS[operation](cache)
    assert cache.nbytes <= cache.budget
    assert cache.retention < before
    dialled.retention = cache.retention
    MORE_ROWS[operation](dialled)
    ids = tokens(3, 1)
    assert torch.equal(step(model, cache, ids), step(model, dialled, ids))
    assert cache.nbytes <= cache.budget


@pytest.mark.parametrize("operation", MORE_ROWS)
def test_more_rows_than_fit(model, operation):
    cache = budgeted(model)
    step(model, cache, TEXT["input_ids"][:, :180])
    assert cache.nbytes > BUDGET / 2
    before = state(cache)
    with pytest.raises(ValueError, match="is full: 3 x 180 tokens need"):
        MORE_ROWS[operation](cache)
    assert_same(cache, before)
    evicting = budgeted(model, on_full="evict")
    step(model, evicting, TEXT["input_ids"][:, :180])
    with pytest.warns(UserWarning, match="the oldest tokens"):
        MORE_ROWS[operation](evicting)
    assert (evicting.winnowed[0].buffer.keys.shape[0], evicting.get_seq_length()) == (3, 180)
    assert evicting.dropped > 0
    assert evicting.nbytes <= BUDGET
    step(model, evicting, tokens(3, 1))
    assert evicting.nbytes <= BUDGET


def test_fewer_rows_and_an_empty_cache(model):
    cache = budgeted(model)
    cache.batch_repeat_interleave(3)
    step(model, cache, tokens(2, 50))
    level = cache.retention
    cache.batch_select_indices(torch.tensor([False, True]))
    assert (cache.retention, cache.winnowed[0].buffer.keys.shape[0]) == (level, 1)


def test_beams_within_a_budget(model):
    cache = budgeted(model, 4 * BUDGET)
    with watched(model, cache):
        ids = generated(model, cache, input_ids=TEXT["input_ids"][:, :60], num_beams=3, max_new_tokens=60)
    assert ids.shape == (1, 120)
    assert cache.retention < 1


def test_another_batch_or_dtype_changes_nothing(model):
    cache = budgeted(model)
    step(model, cache, TEXT["input_ids"][:, :50])
    before = state(cache)
    with pytest.raises(ValueError, match=r"reset\(\) it for another batch"):
        step(model, cache, tokens(3, 100))
    with pytest.raises(TypeError, match=r"reset\(\) it to change"):
        step(copy.deepcopy(model).half(), cache, tokens(1, 100))
    assert_same(cache, before)


# What it shows, and what it refuses ---------------------------------------------------------------


def test_what_it_shows(model):
    cache = budgeted(model, on_full="evict")
    with pytest.warns(UserWarning, match="the oldest tokens"):
        step(model, cache, TEXT["input_ids"])
    assert repr(cache).startswith(f"SwanCache(budget={BUDGET}, on_full='evict', retention=0.188, buffer=8")
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
