"""Inputs that are no batches, given to functions that calibrate and evaluate: answered before a model runs."""

import pytest
import torch
from transformers import AutoTokenizer

from swan import calibrate
from swan.evaluation.bench.model import bench_model
from swan.evaluation.models import model_folder
from swan.evaluation.perplexity import Setting, evaluate
from swan.evaluation.retrieval import needle_cases
from swan.evaluation.texts import token_windows
from tests.tiny import calibration_of, tiny, tokens

MODEL = tiny()
IDS = tokens(2, 20)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ("some text", TypeError, r"batches must be several, .*, got one str; put it into a list"),
        (b"some text", TypeError, "got one bytes; put it into a list"),
        (IDS, TypeError, "got one Tensor; put it into a list"),
        ({"input_ids": IDS}, TypeError, "got one dict; put it into a list"),
        (None, TypeError, "got one NoneType"),
        (7, TypeError, "got one int"),
        ([], ValueError, "no batch came; give calibrate at least one"),
        (
            ["some text"],
            TypeError,
            r"a batch is a tensor of token ids \[rows, tokens\], or what tokenizer\(text, return_",
        ),
        ([b"some text"], TypeError, "a batch is .*, got bytes"),
        ([[1, 2, 3]], TypeError, "a batch is .*, got list"),
        ([None], TypeError, "a batch is .*, got NoneType"),
        (IDS[0], TypeError, "got one Tensor"),
        ([IDS[0]], ValueError, r"token ids are integers \[rows, tokens\], got torch.int64 \[20\]"),
        ([IDS.float()], ValueError, r"token ids are integers \[rows, tokens\], got torch.float32 \[2, 20\]"),
        ([IDS[:, :0]], ValueError, "a batch holds no tokens; leave out empty texts"),
        ([{"input_ids": IDS[:, :0]}], ValueError, "a batch holds no tokens"),
        ([{"input_ids": IDS.tolist()}], TypeError, r"input_ids must be a tensor, got list; a tokenizer gives one by"),
        ([{"text": "some"}], ValueError, "a batch needs input_ids or inputs_embeds, got text"),
        ([{}], ValueError, "a batch needs input_ids or inputs_embeds, got nothing"),
        ([IDS + 90], ValueError, "token ids run from 93 to .*, the model has 97; is the tokenizer of another model"),
        ([{"input_ids": IDS - 9}], ValueError, "token ids run from -6"),
        ([{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}], ValueError, "saw no tokens"),
    ],
)
def test_calibrate(batches, error, message):
    with pytest.raises(error, match=message):
        calibrate(MODEL, batches, progress=False)
    assert MODEL.config._attn_implementation == "sdpa"


def test_calibrate_with_what_a_tokenizer_gives(tokenizer):
    model = tiny(vocab_size=len(tokenizer))
    for text in ("some text", ["some text", "some more text here"]):
        encoded = tokenizer(text)
        with pytest.raises(TypeError, match="got one BatchEncoding; put it into a list"):
            calibrate(model, encoded, progress=False)
        with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
            calibrate(model, [encoded], progress=False)
    with pytest.raises(ValueError, match="a batch holds no tokens"):
        calibrate(model, [tokenizer("", return_tensors="pt")], progress=False)
    assert calibrate(model, [tokenizer("some text", return_tensors="pt")], progress=False).tokens == 2


def test_calibrate_with_embeddings():
    embeds = MODEL.get_input_embeddings()(IDS).detach()
    same = calibrate(MODEL, [IDS], progress=False)
    assert torch.equal(calibrate(MODEL, [{"inputs_embeds": embeds}], progress=False).moments[0].k, same.moments[0].k)


def test_calibrate_without_a_head():
    with pytest.warns(UserWarning, match="effects were not measured: LlamaModel has no head"):
        assert calibrate(MODEL.model, [tokens(1, 90)], progress=False).tokens == 90


@pytest.mark.parametrize(
    ("windows", "error", "message"),
    [
        ("some text", TypeError, r"token ids are a tensor \[rows, tokens\], .*, got str"),
        ([IDS], TypeError, "got list"),
        ({"input_ids": IDS}, TypeError, "got dict"),
        (IDS[0], ValueError, r"token ids are integers \[rows, tokens\], got torch.int64 \[20\]"),
        (IDS + 90, ValueError, "the model has 97"),
        (IDS[:, :1], ValueError, "at least two tokens"),
        (IDS[:0], ValueError, "at least two tokens"),
    ],
)
def test_evaluate(windows, error, message):
    with pytest.raises(error, match=message):
        evaluate(MODEL, windows, [Setting()], calibration_of(MODEL), progress=False)


@pytest.mark.parametrize("prompt", ["some text", IDS[0], IDS + 90])
def test_bench_model(prompt):
    with pytest.raises((TypeError, ValueError), match="token ids"):
        bench_model(MODEL, prompt, calibration_of(MODEL), progress=False)


@pytest.mark.parametrize("text", [b"some text", ["some text"], None, IDS])
def test_texts(text, tokenizer):
    with pytest.raises(TypeError, match="token_windows cuts a text, got"):
        token_windows(text, tokenizer, 1, 8)
    with pytest.raises(TypeError, match="a haystack is a text, got"):
        needle_cases(tokenizer, text)
    with pytest.raises(ValueError, match="expected a text of at least"):
        token_windows("", tokenizer, 1, 8)
