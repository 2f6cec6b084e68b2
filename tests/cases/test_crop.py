"""Layers that keep a window or a state cannot always forget tokens; static sliding ones would lose some in silence.

Where they cannot, `SwanCache.crop` says so before anything has changed.
"""

import pytest
import torch
from transformers import DynamicCache

from swan import SwanCache
from tests.tiny import attached, everything, generated, greatest_difference, logits_of, tokens

IDS = tokens(1, 30)


def state_of(cache):
    kept = [cache.get_seq_length()]
    for layer in cache.layers:
        owner = layer.kv.state if hasattr(layer, "kv") else layer
        kept += [t.clone() for t in vars(owner).values() if isinstance(t, torch.Tensor)]
    return kept


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        (
            "gemma3",
            {"static": True, "max_length": 64},
            "layer 0, a StaticSlidingWindowLayer .* use a dynamic cache",
        ),
        ("gemma3", {}, r"layer 0, a DynamicSlidingWindowLayer .* call cache\.activate_past_recording\(\) before"),
        ("lfm2", {}, r"layer 0, a LinearAttentionLayer .* call cache\.activate_past_recording\(\) before"),
        ("qwen3-next", {}, "layer 0, a LinearAttentionLayer .* its state holds them for good"),
    ],
)
@pytest.mark.parametrize("remove", [-3, -1, 0, 20])
def test_refused_before_anything_changes(architecture, settings, reason, remove):
    model = attached(architecture)
    cache = everything(model, **settings)
    logits_of(model, cache, input_ids=IDS)
    before = state_of(cache)
    with pytest.raises(ValueError, match=reason):
        cache.crop(remove)
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(before, state_of(cache), strict=True)
    )


@pytest.mark.parametrize("settings", [{}, {"static": True, "max_length": 64}, {"exclude": [1]}])
@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
@pytest.mark.parametrize("remove", [-3, 4])
def test_a_window_that_has_not_moved_forgets(architecture, settings, remove):
    if architecture == "gemma3" and "exclude" in settings:
        settings = {}
    model = attached(architecture)
    cache = everything(model, **settings)
    logits_of(model, cache, input_ids=IDS[:, :7])
    cache.crop(remove)
    found = logits_of(model, cache, chunk=5, input_ids=IDS[:, 4:], position_ids=torch.arange(4, 30)[None])
    dense = DynamicCache(config=model.config)
    logits_of(model, dense, input_ids=IDS[:, :4])
    expected = logits_of(model, dense, chunk=5, input_ids=IDS[:, 4:], position_ids=torch.arange(4, 30)[None])
    assert greatest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("architecture", ["gemma3", "lfm2"])
def test_what_is_recorded_is_forgotten(architecture):
    model = attached(architecture)
    ids = tokens(1, 12).repeat(1, 3)
    expected = generated(model, DynamicCache(config=model.config), input_ids=ids)
    cache = SwanCache(model, 1.0, buffer=8, sinks=2)
    found = generated(model, cache, input_ids=ids, prompt_lookup_num_tokens=4, eos_token_id=-1)
    assert torch.equal(found, expected)
