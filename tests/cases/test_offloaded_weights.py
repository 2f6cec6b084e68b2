"""Layers that accelerate keeps on disk or in CPU memory (accelerate#2129, transformers#48409, TransformerLens#1280).

Their parameters are on `meta` between forwards.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM, DynamicCache

from swan import SwanCache, attach, calibrate, detach, from_pretrained, save_pretrained
from tests.tiny import everything, generated, tiny, tokens

PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
PLACES |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
IDS, TEXT = tokens(1, 40), [tokens(2, 90, seed=1)]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    model = tiny()
    attach(model, calibrate(model, TEXT, progress=False))
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def on_disk(folder, load=AutoModelForCausalLM.from_pretrained):
    return load(folder, device_map=PLACES, offload_folder=folder.parent / "offloaded").eval()


def all_in_cpu_memory(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cpu_offload(model, execution_device=CPU)
    return model


def all_on_disk(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    disk_offload(model, folder.parent / "offloaded", execution_device=CPU, offload_buffers=True)
    return model


offloaded = pytest.mark.parametrize("load", [on_disk, all_in_cpu_memory, all_on_disk])


def expected_tokens():
    return generated(tiny(), DynamicCache(config=tiny().config), input_ids=IDS)


def test_loaded_attached(folder, tmp_path):
    model = on_disk(folder, from_pretrained)
    cache = everything(model)
    assert torch.equal(generated(model, cache, input_ids=IDS), expected_tokens())
    cache.save(tmp_path / "cache")
    assert SwanCache.load(tmp_path / "cache", model).get_seq_length() == 51


@offloaded
@pytest.mark.parametrize("settings", [{}, {"static": True, "max_length": 64}])
def test_attached_and_calibrated_afterwards(folder, load, settings):
    model, plain = load(folder), tiny()
    calibration, same = calibrate(model, TEXT, progress=False), calibrate(plain, TEXT, progress=False)
    for layer, other in zip(calibration.layers, same.layers, strict=True):
        assert torch.equal(layer.key_basis, other.key_basis) and torch.equal(layer.value_basis, other.value_basis)
    torch.testing.assert_close(calibration.effects.keys, same.effects.keys)
    attach(model, calibration)
    assert torch.equal(generated(model, everything(model, **settings), input_ids=IDS), expected_tokens())
    detach(model)
    assert torch.equal(generated(model, DynamicCache(config=model.config), input_ids=IDS), expected_tokens())


def test_attached_before(folder):
    model = from_pretrained(folder)
    cpu_offload(model, execution_device=CPU, offload_buffers=True)
    assert torch.equal(generated(model, everything(model), input_ids=IDS), expected_tokens())


def test_weights_that_are_elsewhere_are_not_folded(folder):
    model = on_disk(folder)
    with pytest.raises(ValueError, match=r"layer 1: the weight of v_proj is offloaded; attach with fold=False"):
        attach(model, calibrate(tiny(), TEXT, progress=False), fold=True)
    attach(model, calibrate(tiny(), TEXT, progress=False))
