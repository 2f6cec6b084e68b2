"""A prompt is read under torch.inference_mode(), and generation goes on outside of it (litgpt#837, vllm#1968).

What is made under inference mode cannot be written to outside, so memory of a cache, bases and calibrations are made
outside of it in whatever mode they are first used.
"""

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache

from swan import SwanAttention, attach, calibrate
from tests.tiny import attached, everything, generated, left_padded, tiny, tokens

KINDS = {
    "dynamic": {},
    "static": {"retention": None, "levels": [1.0], "static": True, "max_length": 128},
    "budget": {"retention": None, "budget": "1MB"},
}
kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
IDS = left_padded(45, 37)["input_ids"]
MASK = left_padded(45, 37)["attention_mask"]


def read(model, cache):
    model(IDS[:, :40], attention_mask=MASK[:, :40], cache=cache)


def offload(model, cache):
    read(model, cache)
    if hasattr(cache, "winnowed"):
        cache.offload()
        cache.layers[0].prefetch()


def repeat_and_select(model, cache):
    read(model, cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 3]))


def reorder(model, cache):
    read(model, cache)
    cache.reorder_cache(torch.tensor([0, 1]))


def crop(model, cache):
    model(IDS[:, :44], attention_mask=MASK[:, :44], cache=cache)
    cache.crop(-4)


def tokens_after(model, cache, use):
    with torch.inference_mode():
        use(model, cache)
    return generated(model, cache, input_ids=IDS, attention_mask=MASK)


@kinds
@pytest.mark.parametrize("use", [read, offload, repeat_and_select, reorder, crop])
def test_a_cache_goes_on_outside(settings, use):
    model = attached()
    expected = tokens_after(model, DynamicCache(config=model.config), use)
    cache = everything(model, **settings)
    assert torch.equal(tokens_after(model, cache, use), expected)
    assert not any(t.is_inference() for kv in cache.winnowed.values() for t in kv.tensors if t is not kv.state.padding)


@kinds
def test_a_cache_goes_on_inside(settings):
    model = attached()
    found = []
    for cache in (everything(model, **settings), DynamicCache(config=model.config)):
        with torch.no_grad():
            read(model, cache)
        with torch.inference_mode():
            found.append(generated(model, cache, input_ids=IDS, attention_mask=MASK))
    assert torch.equal(*found)


@kinds
def test_a_cache_that_was_made_copied_and_repacked_inside(settings):
    model = attached()
    with torch.inference_mode():
        cache = everything(model, **settings | ({"levels": [1.0, 0.5]} if "levels" in settings else {}))
        read(model, cache)
        cache.retention = 0.5
        twins = [copy.deepcopy(cache), pickle.load(io.BytesIO(pickle.dumps(cache)))]
    expected = generated(model, cache, input_ids=IDS, attention_mask=MASK)
    for twin in twins:
        assert torch.equal(generated(model, twin, input_ids=IDS, attention_mask=MASK), expected)
    cache.reset()
    read(model, cache)


def test_a_hybrid_with_static_sliding_layers():
    """Their memory is transformers' own."""
    model, ids = attached("gemma3"), tokens(1, 30)
    expected = generated(model, DynamicCache(config=model.config), input_ids=ids)
    with torch.inference_mode():
        cache = everything(model, static=True, max_length=128)
        model(ids[:, :20], cache=cache)
    assert torch.equal(generated(model, cache, input_ids=ids), expected)


def test_attached_inside_and_trained_outside():
    model = tiny()
    with torch.inference_mode():
        batches = [tokens(2, 90)]
        calibration = calibrate(model, batches)
        attach(model, calibration)
    assert calibration.effects is not None  # measured by a backward pass
    loss = model(tokens(2, 20), labels=tokens(2, 20)).loss
    loss.backward()
    assert torch.equal(calibration.layers[0].key_basis, calibrate(tiny(), [tokens(2, 90)]).layers[0].key_basis)


def test_own_models():
    with torch.inference_mode():
        x = torch.randn(1, 30, 32)
        model = torch.nn.Sequential(SwanAttention(32, heads=4))
        calibration = calibrate(model, [x])
    model = torch.nn.Sequential(SwanAttention(32, heads=4))
    attach(model, calibration)
    model(torch.randn(1, 5, 32)).sum().backward()
