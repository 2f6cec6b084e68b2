"""Masks that are not causal, or numbers, given to forward or made by a model (transformers#27493, #46507, #27539).

Also images whose tokens see each other both ways (transformers#39389, #40917). A mask is used as it is, or refused.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from swan import attach, calibrate
from swan.integrations.transformers import cache_keyword
from tests.cases.images import gemma3, paligemma, with_image
from tests.tiny import attached, everything, generated, tiny, tokens

IDS = tokens(2, 30)
CAUSAL = torch.ones(30, 30, dtype=torch.bool).tril()
COLUMNS = torch.arange(30)
MASKS = {
    "a prefix seen both ways": CAUSAL | ((COLUMNS < 10) & (COLUMNS[:, None] < 10)),
    "all seen both ways": torch.ones_like(CAUSAL),
    "blocks seen both ways": CAUSAL | (COLUMNS[:, None] // 5 == COLUMNS // 5),
    "two texts in a row": CAUSAL & (COLUMNS[:, None] // 14 == COLUMNS // 14),
    "branches of a tree": CAUSAL & ~((COLUMNS >= 3) & (COLUMNS < 8) & (COLUMNS[:, None] >= 20)),
    "a window": CAUSAL & (COLUMNS[:, None] - COLUMNS < 6),
    "nothing but itself": torch.eye(30, dtype=torch.bool),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
CACHES = {
    "chunk": {},
    "windowed": {"prefill": "windowed"},
    "static": {"static": True, "max_length": 30},
    "budget": {"retention": None, "budget": "1MB"},
}
caches = pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES)


@torch.no_grad()
def logits(model, cache, mask, chunks=(30,), ids=IDS):
    parts, start = [], 0
    for stop in torch.tensor(chunks).cumsum(0).tolist():
        columns = mask.shape[-1] if getattr(cache, "static", False) else stop
        seen = mask[..., start:stop, :columns].expand(ids.shape[0], -1, -1, -1)
        given = {"attention_mask": seen, "position_ids": torch.arange(start, stop)[None]}
        parts.append(model(ids[:, start:stop], **given, **{cache_keyword(model): cache}).logits)
        start = stop
    return torch.cat(parts, dim=1)


@masks
@caches
@pytest.mark.parametrize("chunks", [(30,), (12, 13, 1, 1, 1, 1, 1)], ids=["at once", "in chunks"])
def test_a_boolean_mask(mask, settings, chunks):
    model = attached()
    expected = logits(model, DynamicCache(config=model.config), mask[None, None], chunks)
    assert (logits(model, everything(model, **settings), mask[None, None], chunks) - expected).abs().max() < 1e-4


@masks
@pytest.mark.parametrize("hiding", [torch.finfo(torch.float32).min, -torch.inf, -1e4, -1e9, -65504.0])
def test_a_mask_of_numbers(mask, hiding):
    model = attached()
    numbers = torch.zeros(1, 1, 30, 30).masked_fill(~mask, hiding)
    expected = logits(model, DynamicCache(config=model.config), numbers)
    assert (logits(model, everything(model), numbers) - expected).abs().max() < 1e-4


def test_masks_of_rows_and_heads():
    model = attached()
    mask = torch.stack([CAUSAL, MASKS["a prefix seen both ways"]])[:, None] & (torch.rand(2, 4, 30, 30) > 0.3)
    mask = mask | torch.eye(30, dtype=torch.bool)
    expected = logits(model, DynamicCache(config=model.config), mask)
    assert (logits(model, everything(model), mask) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("bias", [0.5, -3.0, -500.0, torch.nan])
def test_numbers_that_change_scores_are_refused(bias):
    model = attached()
    cache = everything(model)
    logits(model, cache, CAUSAL[None, None, :20, :20], (20,), IDS[:, :20])
    held = [t.clone() for kv in cache.winnowed.values() for t in kv.tensors]
    numbers = torch.zeros(1, 1, 10, 30).masked_fill(~CAUSAL[20:], -torch.inf)
    numbers[..., 3] = bias
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"mask of torch\.float32 that changes scores .* a boolean mask"),
    ):
        model(IDS[:, 20:], attention_mask=numbers.expand(2, -1, -1, -1), cache=cache)
    assert cache.get_seq_length() == 20
    kept = [t for kv in cache.winnowed.values() for t in kv.tensors]
    assert all(map(torch.equal, kept, held))


@caches
def test_a_model_whose_tokens_see_each_other_both_ways(settings):
    """A config may say so of a decoder; the mask is None then."""
    model = attached(is_causal=False)
    with torch.no_grad():
        expected, found = (
            torch.cat([model(IDS[:, :20], cache=cache).logits, model(IDS[:, 20:], cache=cache).logits], dim=1)
            for cache in (DynamicCache(config=model.config), everything(model, **settings))
        )
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("build", [paligemma, gemma3])
@pytest.mark.parametrize("settings", [{}, {"prefill": "windowed"}, {"static": True, "max_length": 64}])
def test_tokens_of_an_image_see_each_other(build, settings):
    model = build()
    inputs = with_image(model)
    attach(model, calibrate(model, [tokens(2, 80).clamp(min=10)], progress=False))
    new = (lambda: everything(model, **settings)), (lambda: DynamicCache(config=model.config))
    with torch.no_grad():
        found, expected = (model(**inputs, cache=cache()).logits for cache in new)
    assert (found - expected).abs().max() < 1e-4
    # For a static cache `generate` makes the mask of PaliGemma itself: not as the model does.
    dense = StaticCache(model.config, max_cache_len=64) if "static" in settings else DynamicCache(config=model.config)
    found, expected = (generated(model, cache, **inputs) for cache in (everything(model, **settings), dense))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", ["boolean", "numbers"])
def test_calibration_sees_what_the_model_sees(form):
    model = tiny()
    mask = MASKS["a prefix seen both ways"]
    ids = tokens(2, 30)
    padded = mask[None, None].expand(2, 1, -1, -1).clone()
    padded[0, :, :, :4] = False
    given = padded if form == "boolean" else torch.zeros(padded.shape).masked_fill(~padded, -torch.inf)
    found = calibrate(model, [{"input_ids": ids, "attention_mask": given}], progress=False)
    assert found.tokens == 56
    causal = calibrate(model, [{"input_ids": ids, "attention_mask": padded & CAUSAL}], progress=False)
    assert not torch.allclose(found.moments[1].k, causal.moments[1].k)


def test_effects_of_masks_for_rows_and_heads():
    model, ids = tiny(), tokens(2, 90)
    causal = torch.ones(90, 90, dtype=torch.bool).tril()
    plain = calibrate(model, [ids[:1]], progress=False)
    for shape in ((1, 1), (1, 4)):
        given = {"input_ids": ids[:1], "attention_mask": causal.expand(*shape, -1, -1)}
        effects = calibrate(model, [given], progress=False).effects
        torch.testing.assert_close(effects.keys, plain.effects.keys, rtol=1e-2, atol=0)
