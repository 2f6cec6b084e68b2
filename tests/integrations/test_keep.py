"""`SwanCache` with `keep`: tokens that drew least attention are dropped, whatever is done with the cache."""

import math

import pytest
import torch

from swan import Plan, SwanCache
from swan.integrations.transformers import cache_keyword
from tests.tiny import attached, calibration_of, generated, left_padded, logits_of, tokens

TEXT = {"input_ids": tokens(2, 300)}
NEXT = {"input_ids": tokens(2, 9, seed=9)}


@pytest.fixture(scope="module")
def model():
    return attached()


def kept(model, keep=0.5, **settings):
    return SwanCache(model, **{"retention": 0.5, "keep": keep, "buffer": 32, "sinks": 2} | settings)


def step(model, cache, **inputs):
    with torch.no_grad():
        return model(**(inputs or NEXT), **{cache_keyword(model): cache}).logits


@pytest.mark.parametrize("keep", [0.25, 0.8])
def test_the_history_holds_the_share(model, keep):
    cache = kept(model, keep)
    logits_of(model, cache, chunk=50, **TEXT)
    for kv in cache.winnowed.values():  # the last chunk filled a page
        assert kv.history_length == math.ceil(keep * (300 - 32 - 2))
    assert cache.get_seq_length() == 300
    assert all(row["keep"] == keep and row["dropped"] == cache.dropped > 0 for row in cache.report())
    assert f"keep={keep:g}, buffer=32" in repr(cache)


def test_windowed_the_chunks_do_not_matter():
    """In float64: a rounding in float32 may turn a choice between tokens of nearly one score."""
    model = attached().double()
    outs = [logits_of(model, kept(model, prefill="windowed"), chunk=chunk, **TEXT) for chunk in (300, 77, 1)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-2, atol=1e-3)


def test_nothing_is_dropped_at_one(model):
    whole, all_kept = SwanCache(model, 0.5, buffer=32, sinks=2), kept(model, 1.0)
    for cache in (whole, all_kept):
        logits_of(model, cache, chunk=50, **TEXT)
    torch.testing.assert_close(step(model, all_kept), step(model, whole))
    assert all_kept.dropped == 0


def test_generates_with_padding_and_beams(model):
    inputs = left_padded(150, 170)
    del inputs["position_ids"]
    text = generated(model, kept(model), **inputs, max_new_tokens=80)
    assert text.shape == (2, 250)
    beams = generated(model, kept(model), **inputs, max_new_tokens=80, num_beams=3)
    assert beams.shape == (2, 250)


def test_goes_on_from_a_file(model, tmp_path):
    cache = kept(model)
    logits_of(model, cache, chunk=50, **TEXT)
    cache.save(tmp_path / "cache")
    found = SwanCache.load(tmp_path / "cache", model)
    assert found.plan.keep == 0.5 and found.dropped == cache.dropped > 0
    for _ in range(10):  # over the end of a page
        assert torch.equal(step(model, found), step(model, cache))
    assert found.dropped == cache.dropped


def test_the_dial_moves(model):
    cache = kept(model)
    logits_of(model, cache, chunk=50, **TEXT)
    before = cache.nbytes
    cache.retention = 0.3
    assert cache.nbytes < before and cache.plan.keep == 0.5
    for _ in range(10):
        step(model, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    logits_of(model, cache, chunk=50, **TEXT)
    assert cache.dropped > 0


def test_crop_and_masks_are_refused_with_a_reason(model):
    cache = kept(model)
    logits_of(model, cache, chunk=300, **TEXT)
    with pytest.raises(ValueError, match="some were dropped for the sake of later ones"):
        cache.crop(-150)
    dense_too = kept(model, exclude=[0])
    logits_of(model, dense_too, chunk=300, **TEXT)
    with pytest.raises(ValueError, match="some were dropped for the sake of later ones"):
        dense_too.crop(-150)
    assert [int(layer.get_seq_length()) for layer in dense_too.layers] == [300, 300]
    cache.crop(-3)
    mask = torch.ones(2, 1, 9, 306, dtype=torch.bool).tril(297)
    mask[..., 40] = False
    with pytest.raises(ValueError, match="a mask can hide left padding"):
        step(model, cache, **NEXT, attention_mask=mask)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"retention": None, "levels": [0.5], "static": True, "max_length": 99}, "a static cache keeps all its tokens"),
        ({"keep": 1.5}, "above 0 and at most 1, got 1.5"),
    ],
)
def test_what_does_not_go_with_it(model, settings, reason):
    with pytest.raises(ValueError, match=reason):
        kept(model, **settings)


def test_a_plan_has_its_own(model):
    plan = Plan.for_retention(0.5, calibration_of(model), buffer=32, sinks=2, keep=0.25)
    with pytest.raises(ValueError, match=r"the plan says which tokens stay \(keep=0.25\)"):
        SwanCache(model, plan, keep=0.5)
    assert Plan.from_json(plan.to_json()) == plan
    d = 16
    assert plan.share == pytest.approx(0.25 * (plan.retention + 1 / (2 * 2 * d)))
    assert SwanCache(model, plan).winnowed[0].keep == 0.25
    assert [cache.keep for cache in plan.caches()] == [0.25] * 2
    for wrong in ("0.5", 2):
        text = plan.to_json().replace('"keep": 0.25', f'"keep": {wrong!r}'.replace("'", '"'))
        with pytest.raises(ValueError, match="keep is the share of tokens that stay"):
            Plan.from_json(text)
