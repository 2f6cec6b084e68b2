"""One request computes NaN, its tokens are forgotten, the next is a good one (vllm#50002, exllamav3#316).

With transformers' own caches it is as if nothing had been; so it is with a `SwanCache`.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from swan import Graded, KVCache, LayerPlan, Plan, TopK
from swan.integrations.transformers import cache_keyword
from tests.tiny import attached, everything, tokens

EXACT = Plan([LayerPlan(TopK(16, 9, bits=16), TopK(16, 7, bits=16, positions="index"))] * 2, buffer=8, sinks=2)
STATIC = {"static": True, "max_length": 96}
CACHES = {
    "dynamic": {},
    "dynamic, windowed": {"prefill": "windowed"},
    "dynamic, packed": {"retention": 0.4},
    "top-k": {"plan": EXACT, "retention": None},
    "static": STATIC,
    "static, windowed": STATIC | {"prefill": "windowed"},
    "static, packed": STATIC | {"retention": None, "levels": [0.4]},
    "static, top-k": STATIC | {"plan": EXACT, "retention": None},
}
caches = pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES)
GOOD = tokens(2, 30)


def embeddings(model, ids, bad):
    """Numbers that are not finite from the fourth token on; for 1.0 they are, as if nothing had been."""
    embeds = model.get_input_embeddings()(ids).detach().clone()
    embeds[:, 3:] = bad
    return embeds


@torch.no_grad()
def logits(model, cache, **inputs):
    return model(**inputs, **{cache_keyword(model): cache}).logits


@caches
@pytest.mark.parametrize("remaining", [0, 1, 3, 25, 30])
def test_after_crop(settings, remaining):
    model, found = attached(), []
    for bad in (torch.nan, torch.inf, 1.0):
        cache = everything(model, **settings)
        logits(model, cache, input_ids=GOOD)
        logits(model, cache, inputs_embeds=embeddings(model, tokens(2, 30, seed=4), bad))
        cache.crop(remaining - 60)
        found.append(torch.cat([logits(model, cache, input_ids=t) for t in GOOD.split([1, 9, 1, 19], dim=1)], dim=1))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


@caches
def test_after_reset(settings):
    model, found = attached(), []
    for bad in (torch.nan, torch.inf, 1.0):
        cache = everything(model, **settings)
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[0, :7] = 0
        logits(model, cache, inputs_embeds=embeddings(model, tokens(2, 40), bad), attention_mask=mask)
        cache.reset()
        found.append(torch.cat([logits(model, cache, input_ids=t) for t in GOOD.split([1, 9, 1, 19], dim=1)], dim=1))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


def test_with_caches_of_transformers():
    model = attached()
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=96)):
        logits(model, cache, inputs_embeds=embeddings(model, tokens(2, 40), torch.nan))
        cache.crop(-40)
        assert logits(model, cache, input_ids=GOOD).isfinite().all()


@pytest.mark.parametrize("static", [{}, {"static": True, "max_length": 64}], ids=["dynamic", "static"])
def test_padded_rows_whose_sinks_are_forgotten(static):
    """Each row's sinks begin after its padding."""
    found = []
    for bad in (torch.nan, 1.0):
        cache = KVCache(LayerPlan(TopK(16, 9), TopK(16, 7)), buffer=4, sinks=3, **static)
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
        k[:, :, 6:], v[:, :, 6:] = bad, bad
        padding = torch.tensor([5, 0])
        cache(q, k, v, padding=padding)
        cache.crop(6)
        found.append(cache(*torch.randn(3, 2, 2, 12, 16), padding=padding))
    assert found[0][:, :, 1:].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize("layout", [TopK(16, 9), Graded(((16, 8),))], ids=["top-k", "graded"])
def test_what_a_mask_reads_is_forgotten(layout):
    """With a mask all room of a static cache is read, and the slot that takes sinks when they leave the ring."""
    cache = KVCache(LayerPlan(layout, layout), buffer=4, sinks=3, static=True, max_length=40)
    cache(torch.full((1, 4, 20, 16), torch.nan), *torch.full((2, 1, 2, 20, 16), torch.nan))
    cache.crop(0)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    for part in range(0, 12, 6):
        q, k, v = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
        assert cache(q, k, v, mask=mask[:, :, part : part + 6, : part + 6]).isfinite().all()
