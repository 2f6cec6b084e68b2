"""Caches on disk: the same cache comes back, whatever its settings; other files and other models are refused."""

import pytest
import torch

from swan import Graded, LayerPlan, Plan, SwanCache, TopK, attach, calibrate
from swan.calibration.files import read_tensors, write_tensors
from swan.integrations.transformers import cache_keyword
from swan.integrations.transformers.saving import FORMATS
from swan.modules import KVCache
from tests.tiny import attached, everything, generated, left_padded, logits_of, tiny, tokens

TEXT = {"input_ids": tokens(2, 60)}
PADDED = {name: t for name, t in left_padded(60, 11).items() if name != "position_ids"}
NEXT = {"input_ids": tokens(2, 7, seed=9)}
MIXED = LayerPlan(Graded(((4, 16), (8, 4), (4, 0))), TopK(16, 5, bits=4))
SETTINGS = {
    "everything": {"retention": 1.0},
    "retention": {"retention": 0.33},
    "plan": {"plan": Plan((MIXED, LayerPlan(TopK(16, 7, bits=16), TopK(16, 16))), buffer=8, sinks=2)},
    "window": {"plan": Plan((None, MIXED), buffer=8, sinks=2)},
    "budget": {"budget": 16_000, "on_full": "evict"},
    "static": {"retention": 0.33, "static": True, "max_length": 90},
    "levels": {"levels": [0.5, 0.33], "static": True, "max_length": 90},
    "excluded": {"retention": 0.33, "exclude": [0]},
    "kept": {"retention": 0.5, "keep": 0.5},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(scope="module")
def model():
    return attached()


def filled(model, settings, inputs=TEXT):
    cache = SwanCache(model, **({} if "plan" in settings else {"buffer": 8, "sinks": 2}) | settings)
    logits_of(model, cache, chunk=20, **inputs)
    return cache


@each_setting
@pytest.mark.parametrize("inputs", [TEXT, PADDED], ids=["one length", "left-padded"])
@pytest.mark.filterwarnings("ignore:the budget of")
def test_it_is_the_same_cache(model, settings, inputs, tmp_path):
    cache = filled(model, settings, inputs)
    cache.save(tmp_path / "cache.safetensors")
    found = SwanCache.load(tmp_path / "cache.safetensors", model)
    assert repr(found).split("nbytes")[0] == repr(cache).split("nbytes")[0]
    assert found.nbytes <= cache.nbytes
    if "levels" in settings:
        for moved in (cache, found):
            moved.retention = 0.33
    more = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1) if inputs is PADDED else None
    extra = {} if more is None else {"attention_mask": more}
    with torch.no_grad():
        a, b = (model(**NEXT, **{cache_keyword(model): c}, **extra).logits for c in (cache, found))
    assert torch.equal(a, b)


def test_sliding_layers_come_back(tmp_path):
    model = attached("gemma3")
    for static in ({}, {"static": True, "max_length": 90}):
        cache = filled(model, {"retention": 0.5} | static)
        cache.save(tmp_path / "cache.safetensors")
        found = SwanCache.load(tmp_path / "cache.safetensors", model)
        assert torch.equal(*(logits_of(model, c, **NEXT) for c in (cache, found)))


def test_a_prompt_is_read_once(model, tmp_path):
    prompt = tokens(1, 40)
    cache = everything(model)
    logits_of(model, cache, input_ids=prompt)
    cache.save(tmp_path / "prompt.safetensors")
    for seed in (1, 2):
        text = torch.cat([prompt, tokens(1, 4, seed)], dim=1)
        found = SwanCache.load(tmp_path / "prompt.safetensors", model)
        expected = generated(model, everything(model), input_ids=text)
        assert torch.equal(generated(model, found, input_ids=text), expected)


def test_an_empty_cache(model, tmp_path):
    SwanCache(model, retention=0.5).save(tmp_path / "cache.safetensors")
    assert SwanCache.load(tmp_path / "cache.safetensors", model).get_seq_length() == 0


def test_the_file_has_no_room_ahead(model, tmp_path):
    cache = filled(model, {"retention": 0.33})
    cache.save(tmp_path / "cache.safetensors")
    assert (tmp_path / "cache.safetensors").stat().st_size < cache.nbytes + 10_000
    found = SwanCache.load(tmp_path / "cache.safetensors", model)
    kv = found.winnowed[0]
    assert isinstance(kv, KVCache)
    assert kv.state.k_history.shape[2] == kv.history_length


def test_a_full_budget_has_warned_already(model, tmp_path):
    cache = SwanCache(model, budget=30_000, on_full="evict", buffer=8, sinks=2)
    with pytest.warns(UserWarning, match="the oldest tokens"):
        logits_of(model, cache, input_ids=tokens(1, 450))
    cache.save(tmp_path / "cache.safetensors")
    found = SwanCache.load(tmp_path / "cache.safetensors", model)
    logits_of(model, found, input_ids=tokens(1, 100))  # a warning would be an error
    assert found.dropped > cache.dropped > 0


def test_folded_values_are_the_same(tmp_path):
    a, b = attached(), attached(fold=True)
    cache = filled(a, {"retention": 0.5})
    cache.save(tmp_path / "cache.safetensors")
    found = SwanCache.load(tmp_path / "cache.safetensors", b)
    torch.testing.assert_close(logits_of(b, found, **NEXT), logits_of(a, cache, **NEXT), atol=1e-3, rtol=1e-3)


def test_other_bases_are_refused(model, tmp_path):
    filled(model, {"retention": 0.5}).save(tmp_path / "cache.safetensors")
    other = tiny()
    with pytest.raises(ValueError, match="not attached; call swan"):
        SwanCache.load(tmp_path / "cache.safetensors", other)
    attach(other, calibrate(other, [tokens(2, 40, seed=2)], "pca", progress=False))
    with pytest.raises(ValueError, match=r"cache\.safetensors was filled in other bases; attach the model with"):
        SwanCache.load(tmp_path / "cache.safetensors", other)


def test_other_files_are_refused(model, tmp_path):
    path = tmp_path / "cache.safetensors"
    path.write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SwanCache.load(path, model)
    model._swan_attachment.calibration.save(path)
    with pytest.raises(ValueError, match="not a cache of this version"):
        SwanCache.load(path, model)


@pytest.mark.parametrize("fingerprint", [[[8, 8]], [], "text", 3, None])
def test_a_fingerprint_that_is_none_is_refused(model, fingerprint, tmp_path):
    path = tmp_path / "cache.safetensors"
    filled(model, {"retention": 0.5}).save(path)
    metadata, tensors = read_tensors(path, FORMATS, "cache", "")
    write_tensors(tmp_path / "other", tensors, metadata | {"fingerprint": fingerprint})
    with pytest.raises(ValueError, match=r"no whole cache of this model \(its fingerprint is no object\); fill"):
        SwanCache.load(tmp_path / "other", model)


def test_a_layer_that_holds_something_else_leaves_the_file_as_it_was(model, tmp_path):
    path = tmp_path / "cache.safetensors"
    cache = filled(model, {"retention": 0.5, "exclude": [0]})
    cache.save(path)
    before = path.read_bytes()
    cache.layers[0].odd = object()
    with pytest.raises(TypeError, match=r"DynamicLayer\.odd is a object: it cannot be written to a file"):
        cache.save(path)
    assert path.read_bytes() == before


def test_a_file_of_0_1_0_is_refused(model, tmp_path):
    """Its bytes are in another order."""
    path = tmp_path / "cache.safetensors"
    filled(model, {"retention": 0.5}).save(path)
    metadata, tensors = read_tensors(path, FORMATS, "cache", "")
    write_tensors(path, tensors, metadata | {"format": "swan-cache-1"})
    with pytest.raises(ValueError, match=r"not a cache of this version of swan; fill a cache and save it again"):
        SwanCache.load(path, model)
