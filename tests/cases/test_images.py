"""A model that reads images, calibrated on what it will see (llm-compressor#1577, #1524).

Its language model is one that swan supports; its tower for images has attention of its own, which stays as it is.
"""

import pytest
import torch
from transformers import DynamicCache

from swan import attach, calibrate, detach, from_pretrained, save_pretrained
from swan.calibration.capture import attention_layers
from tests.cases.images import llava, llava_with_siglip, with_image
from tests.tiny import everything, generated

models = pytest.mark.parametrize("build", [llava, llava_with_siglip])


@models
@pytest.mark.parametrize("settings", [{}, {"prefill": "windowed"}, {"static": True, "max_length": 128}])
def test_answers_to_an_image_are_those_of_the_dense_cache(build, settings):
    model = build()
    inputs = with_image(model, 40)
    expected = generated(model, DynamicCache(config=model.config), **inputs)
    attach(model, calibrate(model, [inputs], progress=False))
    assert torch.equal(generated(model, everything(model, **settings), **inputs), expected)


@models
@pytest.mark.parametrize("text", ["eager", "sdpa"])
@pytest.mark.parametrize("vision", ["eager", "sdpa"])
def test_the_tower_keeps_its_attention(build, text, vision):
    model = build()
    model.set_attn_implementation({"text_config": text, "vision_config": vision})
    inputs = with_image(model, 40)

    def implementations():
        return [model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation]

    calibration = calibrate(model, [inputs], progress=False)
    assert implementations() == [text, vision]
    attach(model, calibration)
    assert implementations() == ["swan", vision]
    generated(model, everything(model), **inputs)
    detach(model)
    assert implementations() == [text, vision]


def test_layers_of_a_tower_are_no_layers_of_the_decoder():
    model = llava()
    towers = model.model.vision_tower.encoder.layers if hasattr(model.model.vision_tower, "encoder") else None
    towers = model.model.vision_tower.vision_model.encoder.layers if towers is None else towers
    for index, layer in enumerate(towers):
        layer.self_attn.layer_idx = index  # as those of some models have it
    names = {type(layer).__name__ for layer in attention_layers(model).values()}
    assert names == {"LlamaAttention"}


def test_effects_are_measured_on_images_too():
    model = llava()
    batches = [with_image(model, 100, start) for start in (5, 90)] + [with_image(model, 80, rows=2)]
    batches.append({"input_ids": torch.randint(10, 97, (1, 90))})
    effects = calibrate(model, batches, progress=False).effects
    assert effects is not None and effects.keys.isfinite().all()


def test_a_folder_is_loaded_as_what_it_is(tmp_path):
    model = llava()
    inputs = with_image(model, 40)
    attach(model, calibrate(model, [inputs], progress=False))
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(generated(again, everything(again), **inputs), generated(model, everything(model), **inputs))
