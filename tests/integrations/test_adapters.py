"""LoRA adapters and quantized weights: swan changes nothing of them, and they nothing of swan."""

import copy

import peft
import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import DynamicCache

from swan import SwanCache, attach, calibrate, detach, from_pretrained, save_pretrained
from swan.integrations.transformers import is_attached
from tests.tiny import everything, generated, left_padded, logits_of, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
TEXT = {"input_ids": tokens(1, 40)}
PADDED = {name: t for name, t in left_padded(40, 3, 21).items() if name != "position_ids"}


def with_adapter(model=None):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(tiny() if model is None else model, config).eval()


def test_a_model_with_an_adapter_is_exact():
    model = with_adapter()
    attach(model, calibrate(model, [tokens(2, 40, seed=1)], progress=False))
    assert is_attached(model)
    expected = generated(model, DynamicCache(), **PADDED)
    assert not torch.equal(expected, generated(tiny(), DynamicCache(), **PADDED))
    assert torch.equal(generated(model, everything(model), **PADDED), expected)


def test_the_adapter_is_switched_while_attached():
    model = with_adapter()
    attach(model, calibrate(model, [tokens(2, 40, seed=1)], progress=False))
    with model.disable_adapter():
        assert torch.equal(generated(model, everything(model), **TEXT), generated(tiny(), DynamicCache(), **TEXT))


def test_an_adapter_comes_to_an_attached_model():
    base = tiny()
    attach(base, calibrate(base, [tokens(2, 40, seed=1)], progress=False))
    model = with_adapter(base)
    assert torch.equal(generated(model, everything(model), **TEXT), generated(with_adapter(), DynamicCache(), **TEXT))
    detach(model)
    assert torch.equal(logits_of(model, **TEXT), logits_of(with_adapter(), **TEXT))


def test_adapters_are_not_folded():
    model = with_adapter()
    calibration = calibrate(model, [tokens(2, 40, seed=1)], progress=False)
    with pytest.raises(ValueError, match=r"as v_proj, got peft.*Linear; attach with fold=False"):
        attach(model, calibration, fold=True)


def test_an_adapter_is_not_written_as_a_model(tmp_path):
    model = with_adapter()
    attach(model, calibrate(model, [tokens(2, 40, seed=1)], progress=False))
    with pytest.raises(ValueError, match="writes its adapter alone; save into the folder of its base model"):
        save_pretrained(model, tmp_path)
    assert not any(tmp_path.iterdir())
    tiny().save_pretrained(tmp_path)
    save_pretrained(model, tmp_path)
    assert is_attached(from_pretrained(tmp_path))


def quantized():
    model = copy.deepcopy(tiny())
    quantize_(model, Int8WeightOnlyConfig())
    return model


def test_quantized_weights_are_exact_and_come_back():
    model = quantized()
    before = logits_of(model, **TEXT)
    attach(model, calibrate(model, [tokens(2, 40, seed=1)], progress=False))
    assert torch.equal(generated(model, everything(model), **PADDED), generated(model, DynamicCache(), **PADDED))
    out = generated(model, SwanCache(model, retention=0.33, buffer=8), **PADDED)
    assert out.shape == (3, 52)
    detach(model)
    assert torch.equal(logits_of(model, **TEXT), before)


def test_quantized_weights_are_not_folded():
    model = quantized()
    calibration = calibrate(model, [tokens(2, 40, seed=1)], progress=False)
    with pytest.raises(ValueError, match=r"fold=True needs a plain .* as v_proj, got torchao"):
        attach(model, calibration, fold=True)
