"""A model on several devices: each layer's cache is where the layer is. Without a GPU the second one is `meta`."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from swan import Plan, SwanCache, attach, calibrate
from swan.integrations.transformers import cache_keyword
from tests.tiny import calibration_of, forget_mixes, logits_of, tiny, tokens

SECOND = torch.device("cuda" if torch.cuda.is_available() else "meta")


@pytest.fixture
def model():
    """The second layer and all after it are elsewhere, as `device_map` would have it."""
    model = tiny()
    calibration = calibration_of(model)
    attach(model, calibration)
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        module.to(SECOND)
        add_hook_to_module(module, AlignDevicesHook(execution_device=SECOND, io_same_device=False))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"retention": 0.33},
        {"budget": 40_000},
        pytest.param(
            {"levels": [0.5, 0.33], "static": True, "max_length": 90},
            marks=pytest.mark.skipif(SECOND.type == "meta", reason="its counters are tensors with numbers"),
        ),
    ],
    ids=["dynamic", "budget", "static"],
)
def test_each_layer_keeps_its_own(model, settings, tmp_path):
    cache = SwanCache(model, buffer=8, sinks=2, **settings)
    logits = logits_of(model, cache, chunk=20, input_ids=tokens(1, 60))
    assert logits.device.type == SECOND.type
    for index, device in enumerate(("cpu", SECOND.type)):
        assert {t.device.type for t in cache.winnowed[index].tensors} == {device}
    if "budget" not in settings:
        cache.retention = 0.33
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert {t.device.type for t in cache.winnowed[1].tensors} == {SECOND.type}
    logits_of(model, cache, chunk=1, input_ids=tokens(2, 3))


def test_attaching_such_a_model():
    model = tiny()
    calibration = calibration_of(model)
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        module.to(SECOND)
        add_hook_to_module(module, AlignDevicesHook(execution_device=SECOND, io_same_device=False))
    attach(model, calibration)
    assert [layer.self_attn.swan_key_basis.device.type for layer in model.model.layers] == ["cpu", SECOND.type]


@pytest.mark.parametrize(
    "settings",
    [
        {"retention": 0.26},
        {"retention": 0.26, "keep": 0.5},
        {"budget": 60_000, "on_full": "evict"},
        {"levels": [0.5, 0.33], "static": True, "max_length": 190},
        {"retention": 0.26, "exclude": [1]},
    ],
    ids=str,
)
def test_another_default_device_changes_nothing(settings, tmp_path):
    """As after `torch.set_default_device`; the model is elsewhere, and a tensor that is made there has no numbers."""
    found = []
    for device in ("cpu", "meta"):
        forget_mixes()
        model, windows, ids = tiny(), [tokens(1, 120, seed=i) for i in range(2)], tokens(2, 180)
        keyword = cache_keyword(model)
        with torch.device(device), torch.no_grad():
            calibration = calibrate(model, windows, progress=False)
            predicted = Plan.for_retention(0.26, calibration).predicted_kl(calibration)
            attach(model, calibration)
            cache = SwanCache(model, buffer=8, sinks=2, **settings)
            logits = [model(part, **{keyword: cache}).logits for part in ids.split([170, 1, 9], dim=1)]
            if "static" not in settings:
                cache.save(tmp_path / "cache")
                cache = SwanCache.load(tmp_path / "cache", model)
                cache.reorder_cache(torch.tensor([1, 0], device="cpu"))
            logits.append(model(ids[:, :1], **{keyword: cache}).logits)
        found.append([predicted, *logits])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
