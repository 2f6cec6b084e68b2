"""Released Phi-3.5-mini and Phi-4-mini have windows wider than their positions, which hide nothing (trl#7276)."""

import pytest
import torch
from transformers import DynamicCache

from swan import SwanCache, attach, calibrate
from tests.tiny import attached, calibration_of, everything, generated, left_padded, tiny, tokens

# Positions and windows as released, of Phi-3.5-mini, Phi-4-mini, Phi-3-mini-128k; and one as wide as the positions.
WIDE = [(131072, 262144), (131072, 131072), (512, 512)]
PADDED = {name: t for name, t in left_padded(40, 21).items() if name != "position_ids"}


@pytest.mark.parametrize(("positions", "window"), WIDE)
@pytest.mark.parametrize("architecture", ["phi3", "mistral", "starcoder2"])
@pytest.mark.parametrize("settings", [{}, {"static": True, "max_length": 128}])
def test_a_window_that_hides_nothing(architecture, positions, window, settings):
    model = attached(architecture, max_position_embeddings=positions, sliding_window=window)
    expected = generated(model, DynamicCache(config=model.config), **PADDED)
    cache = everything(model, **settings)
    assert list(cache.winnowed) == [0, 1]
    assert torch.equal(generated(model, cache, **PADDED), expected)


def test_its_layers_have_effects():
    model = tiny("phi3", max_position_embeddings=131072, sliding_window=262144)
    assert calibrate(model, [tokens(2, 90)], progress=False).effects.keys.isfinite().all()


def test_hybrids_with_such_windows():
    """Qwen2 counts a window in its upper layers only."""
    settings = {"use_sliding_window": True, "max_window_layers": 1, "max_position_embeddings": 512}
    wide = attached("qwen2", sliding_window=512, **settings)
    assert list(SwanCache(wide, 0.5).winnowed) == [0, 1]
    narrow = attached("qwen2", sliding_window=16, **settings)
    cache = everything(narrow)
    assert list(cache.winnowed) == [0]
    expected = generated(narrow, DynamicCache(config=narrow.config), **PADDED)
    assert torch.equal(generated(narrow, cache, **PADDED), expected)


def test_a_window_below_the_positions_hides():
    """That of Mistral 7B v0.1, Phi-3-mini-4k, Starcoder2."""
    for architecture in ("mistral", "phi3", "starcoder2"):
        model = tiny(architecture, max_position_embeddings=512, sliding_window=511)
        calibration = calibration_of(model)
        with pytest.raises(ValueError, match="every layer attends to a sliding window only"):
            attach(model, calibration)


def test_beyond_its_positions_the_mask_hides():
    model, ids = attached("phi3", max_position_embeddings=24, sliding_window=24), tokens(1, 40)
    expected = generated(model, DynamicCache(config=model.config), input_ids=ids)
    assert torch.equal(generated(model, everything(model), input_ids=ids), expected)
