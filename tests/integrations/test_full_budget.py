"""A full budget: what does not fit, old tokens that are dropped, and more rows."""

import copy
import itertools

import pytest
import torch

from swan import SwanCache
from tests.integrations.budgets import BUDGET, DENSE, TEXT, assert_same, budgeted, state, step, watched
from tests.tiny import (
    attached,
    float32_bound,
    generated,
    left_padded,
    logits_of,
    tokens,
)


@pytest.fixture(scope="module")
def model():
    return attached(effects=True)


@pytest.mark.parametrize("chunk", [1, 400])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_full_budget_raises_and_changes_nothing(architecture, chunk):
    """Nor in sliding layers, which come first."""
    model = attached(architecture, effects=True)
    cache = budgeted(model, BUDGET // (1 if architecture == "llama" else 2))
    step(model, cache, TEXT["input_ids"][:, :200])
    message = (
        rf"the budget of {cache.budget} bytes is full: 1 x \d+ tokens need \d+ bytes at the least retention, "
        rf"{cache.dial.levels[-1].retention:.3g}; "
        r"give a larger budget, on_full='evict', which drops tokens, a shorter text"
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


def scored(model, tokens=40, keep=1.0):
    """A cache with room for so many dense tokens beside its queries, which chooses what it drops."""
    queries = 2 * 4 * 64 * 16 * 4
    return budgeted(model, queries * 3 // 2 + tokens * DENSE, on_full="evict", keep=keep)


def sixteen_bits_only(cache):
    """Its least level loses nothing, so that only eviction changes what it computes."""
    cache.dial.levels = cache.dial.levels[:1]
    return cache


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    "chunks", [[1] * 200, [150, *[1] * 50], [30, 7, 60, 3, 100]], ids=["steps", "prompt", "chunks"]
)
def test_eviction_is_a_mask_over_the_dropped_tokens(model, chunks, padded):
    """The mask is that of a model without a cache; positions stay the same."""
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
    dropped, places = [], []
    for i in range(200):
        step(model, cache, TEXT["input_ids"][:, i : i + 1])
        dropped.append(cache.dropped)
        places.append([t.data_ptr() for kv in cache.winnowed.values() for t in kv.tensors])
    assert len(set(dropped)) in (200 // 64, 200 // 64 + 1, 200 // 64 + 2)
    assert all(b - a in (0, 64) for a, b in itertools.pairwise(dropped))
    # While it moves a history exists twice, so the new place is another one; later it may be the old one again.
    moved = [[a != b for a, b in itertools.pairwise(one)] for one in zip(*places, strict=True)]
    still, with_evictions = [False] * 199, [a != b for a, b in itertools.pairwise(dropped)]
    assert all(one in (still, with_evictions) for one in moved)
    assert with_evictions in moved


@pytest.mark.parametrize("keep", [1, 0.6])
@pytest.mark.parametrize("chunks", [[1] * 300, [260, *[1] * 40], [130, 170]], ids=["steps", "prompt", "chunks"])
def test_eviction_by_score_fits_in_the_budget(model, keep, chunks, tmp_path):
    """Queries and scores count; saved, it is the same cache."""
    cache, start = scored(model, tokens=34 if keep == 1 else 25, keep=keep), 0
    with watched(model, cache), pytest.warns(UserWarning, match="the tokens that drew least attention are dropped"):
        for chunk in chunks:
            step(model, cache, TEXT["input_ids"][:, start : start + chunk])
            start += chunk
            assert cache.nbytes <= cache.budget
    assert cache.dropped > (1 - keep) * 300 and cache.get_seq_length() == 300
    cache.save(tmp_path / "cache.safetensors")
    found = SwanCache.load(tmp_path / "cache.safetensors", model)
    settings = [(each.on_full, each.budget, each.plan, each.dropped) for each in (found, cache)]
    assert settings[0] == settings[1]


def test_eviction_by_score_drops_what_each_layer_would_drop_next(model):
    cache, start = scored(model), 0
    with pytest.warns(UserWarning, match="the tokens that drew least attention"):
        while cache.dropped == 0:
            twins, start = copy.deepcopy(cache.winnowed), start + 1
            cache.byte_budget.make_room(cache, 1, 1, 4)
            if cache.dropped == 0:
                step(model, cache, TEXT["input_ids"][:, start - 1 : start])
    for index, kv in cache.winnowed.items():
        expected, oldest = twins[index], copy.deepcopy(twins[index])
        oldest.state.scores = None
        for each in (expected, oldest):
            each.evict(64)
            each.repack(kv.plan_layer)
        assert torch.equal(kv.state.scores, expected.state.scores)
        keys, same, other = (x.state.k_history.tokens(0, kv.history_length).planes[0] for x in (kv, expected, oldest))
        assert torch.equal(keys, same) and not torch.equal(keys, other)


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


MORE_ROWS = {
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0, 0, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([0, 0, 0])),
}


@pytest.mark.parametrize("operation", MORE_ROWS)
@pytest.mark.parametrize(("architecture", "budget"), [("llama", 70_000), ("gemma3", 50_000)])
def test_more_rows_lower_the_level_first(architecture, budget, operation):
    model = attached(architecture, effects=True)
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
    assert (evicting.winnowed[0].state.k_recent.shape[0], evicting.get_seq_length()) == (3, 180)
    assert evicting.dropped > 0
    assert evicting.retention == evicting.dial.levels[-1].retention  # only the least level drops tokens
    assert evicting.nbytes <= BUDGET
    step(model, evicting, tokens(3, 1))
    assert evicting.nbytes <= BUDGET


def test_fewer_rows_and_an_empty_cache(model):
    cache = budgeted(model)
    cache.batch_repeat_interleave(3)
    step(model, cache, tokens(2, 50))
    level = cache.retention
    cache.batch_select_indices(torch.tensor([False, True]))
    assert (cache.retention, cache.winnowed[0].state.k_recent.shape[0]) == (level, 1)


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
