"""Past the length at which LongRoPE changes its frequencies, Phi-3 throws a given cache away (transformers#33129).

It then reads the text anew into a dense cache. With a `SwanCache`, the same cache is emptied and takes the text in.
"""

import copy
import inspect
import io
import pickle

import pytest
import torch
from transformers import DynamicCache

from swan import SwanCache, attach, detach
from tests.tiny import attached, calibration_of, everything, generated, tiny, tokens

CHANGE = 64  # tokens
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 8.0}
ROPE |= {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0 + i for i in range(8)]}
ROPE |= {"original_max_position_embeddings": CHANGE}
LONG = {"rope_parameters": ROPE, "original_max_position_embeddings": CHANGE}
CACHES = {
    "dynamic": {},
    "static": {"static": True, "max_length": 256},
    "budget": {"retention": None, "budget": "1MB"},
}


@pytest.fixture
def model():
    return attached("phi3", **LONG)


@pytest.mark.parametrize("prompt", [50, 64, 100])
@pytest.mark.parametrize(
    ("settings", "more"),
    [*((settings, {}) for settings in CACHES.values()), ({}, {"num_beams": 2}), ({}, {"prefill_chunk_size": 16})],
    ids=[*CACHES, "beams", "chunks"],
)
def test_the_cache_is_used_on(model, settings, prompt, more):
    given = {"input_ids": tokens(1, prompt), "max_new_tokens": 40, **more}
    expected = generated(model, DynamicCache(config=model.config), **given)
    cache = everything(model, **settings)
    assert torch.equal(generated(model, cache, **given), expected)
    assert cache.get_seq_length() == prompt + 39


def test_a_budget_is_kept(model):
    cache = SwanCache(model, budget=60_000, buffer=8, sinks=2)
    generated(model, cache, input_ids=tokens(1, 50), max_new_tokens=60)
    assert cache.get_seq_length() == 109 and 0 < cache.nbytes <= 60_000


def test_copies_and_pickles_of_the_model(model):
    ids = tokens(1, 50)
    expected = generated(model, DynamicCache(config=model.config), input_ids=ids, max_new_tokens=40)
    for twin in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
        cache = everything(twin)
        assert torch.equal(generated(twin, cache, input_ids=ids, max_new_tokens=40), expected)
        assert cache.get_seq_length() == 89


def test_the_method_looks_as_it_did():
    model = tiny("phi3", **LONG)
    before = inspect.signature(model.prepare_inputs_for_generation)
    attach(model, calibration_of(model))
    assert inspect.signature(model.prepare_inputs_for_generation) == before
    detach(model)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_a_model_that_leaves_the_cache_without_reading_anew(model, monkeypatch):
    def forgetful(self, input_ids, **_):
        return {"input_ids": input_ids[:, -1:]}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", forgetful)
    cache = everything(model)
    with pytest.raises(ValueError, match=r"Phi3ForCausalLM leaves the cache here .* generate without it"):
        model.prepare_inputs_for_generation(tokens(1, 9), cache=cache, past_key_values=cache)
