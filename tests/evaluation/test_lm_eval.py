"""The model `swan` of lm-evaluation-harness: what it scores is what decoding gives, what it generates is generate's."""

import functools
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from swan import Plan, SwanCache, attach, calibrate, from_pretrained, save_pretrained
from swan.evaluation import calibrations, lm_eval
from swan.evaluation.lm_eval import SwanLM
from swan.evaluation.models import model_folder
from tests.tiny import generated, logits_of, save_with_words

CONTEXT = ("In the beginning there was a cache, and the cache was without form, and void; " * 4).strip()
SETTINGS = {"buffer": 8, "sinks": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a tiny model with a real tokenizer and a calibration beside it."""
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = save_with_words(path)
    ids = tokenizer(CONTEXT, return_tensors="pt").input_ids
    attach(model, calibrate(model, [ids], progress=False))
    save_pretrained(model, path)
    return path


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_it_is_registered():
    assert get_model("swan") is SwanLM


@pytest.mark.parametrize("retention", [0.33, "dense"])
def test_it_scores_what_decoding_gives(folder, retention):
    lm = SwanLM(str(folder), retention=retention, batch_size=1, device="cpu", **SETTINGS)
    (score, _), (other, _) = lm.loglikelihood(
        [request("loglikelihood", CONTEXT, text) for text in (" It had no keys.", " It was empty")]
    )
    model = from_pretrained(folder)
    ids = lm.tokenizer(CONTEXT + " It had no keys.", return_tensors="pt").input_ids
    start = len(lm.tokenizer(CONTEXT).input_ids)
    cache = None if retention == "dense" else SwanCache(model, retention=retention, prefill="windowed", **SETTINGS)
    logits = logits_of(model, cache, None if cache is None else 1, input_ids=ids[:, :-1])
    scores = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, start - 1 :, 0]
    assert score == pytest.approx(scores.sum().item(), abs=2e-2 if cache is not None else 1e-3)
    assert other != score


def test_pruning_shows_in_the_scores(folder):
    scores = {}
    for retention in ("dense", 1.0, 0.2):
        lm = SwanLM(str(folder), retention=retention, batch_size=1, device="cpu", **SETTINGS)
        scores[retention] = lm.loglikelihood([request("loglikelihood", CONTEXT, " It had no keys.")])[0][0]
    assert scores[1.0] == pytest.approx(scores["dense"], abs=1e-3)
    assert abs(scores[0.2] - scores["dense"]) > 0.01


def test_it_generates_on_the_cache(folder):
    lm = SwanLM(str(folder), retention=0.33, batch_size=2, device="cpu", **SETTINGS)
    arguments = {"until": ["no such text"], "max_gen_toks": 12, "do_sample": False}
    prompts = CONTEXT, CONTEXT[:60]
    texts = lm.generate_until([request("generate_until", text, arguments) for text in prompts])
    model = from_pretrained(folder)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = lm.tokenizer(prompt, return_tensors="pt").input_ids
        cache = SwanCache(model, retention=0.33, prefill="windowed", **SETTINGS)
        expected = generated(model, cache, input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :]
        assert text == lm.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("retention", [0.33, "dense"])
def test_batches_score_what_single_texts_do(folder, retention):
    texts = [request("loglikelihood", CONTEXT[:n], " It had no keys.") for n in (50, 290, 120)]
    scores = [
        SwanLM(str(folder), retention=retention, batch_size=size, device="cpu", **SETTINGS).loglikelihood(texts)
        for size in (1, 3)
    ]
    for (one, _), (batch, _) in zip(*scores, strict=True):
        assert batch == pytest.approx(one, abs=2e-2)


def test_what_is_stored_where_no_retention_is_given(folder, tmp_path):
    lm = SwanLM(str(folder), device="cpu")
    assert lm._given().popitem()[1].retention <= 0.26
    plan = Plan.for_retention(0.9, dims=[(16, 16)] * 2)
    save_pretrained(from_pretrained(folder), folder, plan)
    assert SwanLM(str(folder), device="cpu")._given().popitem()[1].plan == plan
    assert SwanLM(str(folder), retention="0.3", device="cpu")._given().popitem()[1].retention <= 0.3
    save_pretrained(from_pretrained(folder), folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": "adapter"}, "does not take peft; write such a model to a folder first"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"retention": "little"}, "little"),
    ],
    ids=["peft", "dtype", "retention"],
)
def test_options_that_it_does_not_have(folder, options, message):
    with pytest.raises(ValueError, match=message):
        SwanLM(str(folder), **options)


def test_calibrations(folder, tmp_path, monkeypatch):
    file = folder / "swan_calibration.safetensors"
    assert SwanLM(str(folder), calibration=str(file), device="cpu").model.config.vocab_size == 49152
    plain = tmp_path / "plain"
    save_with_words(plain)
    monkeypatch.setattr(calibrations, "calibrated", functools.partial(calibrations.calibrated, tokens=100))
    assert SwanLM(str(plain), device="cpu")._settings["retention"] == 0.26  # calibrated now


def test_the_dtype_is_the_models_own_where_it_is_native(folder, capsys):
    assert SwanLM(str(folder), retention="dense", device="cpu").model.dtype == torch.float32
    assert "swan: dtype float32, the model's own" in capsys.readouterr().err
    assert SwanLM(str(folder), retention="dense", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert "swan:" not in capsys.readouterr().err


def test_the_command_names_folders_of_embedded_models(monkeypatch):
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["x", "run", "--model_args", "retention=0.3,pretrained=smollm2-135m"])
    lm_eval.main()
    assert seen == [["run", "--model_args", f"retention=0.3,pretrained={model_folder('smollm2-135m')}"]]
