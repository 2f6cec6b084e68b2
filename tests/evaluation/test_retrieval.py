"""Needle retrieval: cases from a text, scores on tiny models and on real ones."""

import random
import re

import pytest
import torch
from transformers import DynamicCache

from swan import Plan, SwanCache, attach, calibrate
from swan.evaluation.models import load_model
from swan.evaluation.retrieval import KEYS, NeedleCase, evaluate_needles, needle_cases, summarize_needles
from swan.evaluation.texts import calibration_text, evaluation_text, token_windows
from swan.integrations.transformers import cache_keyword
from tests.tiny import attached, everything, generated, tiny, tokens

# Cases


class Characters:
    """A tokenizer of a token for each character, after a bos token where asked for."""

    bos_token_id = 0

    def __init__(self, bos=False):
        self.bos = bos

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": [0] * (self.bos and add_special_tokens) + [ord(character) for character in text]}

    @staticmethod
    def decode(ids):
        return "".join(map(chr, ids))


HAYSTACK = "".join(random.Random(0).choices("abcdefgh .", k=60_000))


@pytest.mark.parametrize("needles", [1, 2, 5])
def test_a_case_can_be_answered_from_its_context(needles):
    cases = needle_cases(Characters(), HAYSTACK, lengths=(400, 700), cases=20, needles=needles)
    for case in cases:
        context, question, answer = map(Characters.decode, (case.context, case.question, case.answer))
        key = question.partition("number of ")[2].partition("?")[0]
        sentence = f"\nThe magic number of {key} is{answer}.\n"
        assert question.endswith(f"magic number of {key} is") and key in KEYS
        assert len(answer) == 8 and int(answer) >= 10**6
        assert len(context) == case.length
        assert context.count(sentence) == 1
        assert context.count("magic number") == needles
        before, after = (re.sub(r"\nThe magic.*\n", "", part) for part in context.split(sentence))
        assert len(before) == round(case.depth * len(before + after))


def test_cases_are_balanced_and_differ():
    cases = needle_cases(Characters(), HAYSTACK, lengths=(400, 700), depths=5, cases=30)
    assert [case.length for case in cases] == [400] * 15 + [700] * 15
    for length in (400, 700):
        depths = sorted(case.depth for case in cases if case.length == length)
        assert depths == pytest.approx(sorted([0.1, 0.3, 0.5, 0.7, 0.9] * 3))
    assert len({case.context for case in cases}) == 2 * 8  # two in each, the fifteenth alone
    assert len({case.question for case in cases}) == len({case.answer for case in cases}) == 30
    assert len({case.context[:30] for case in cases}) == 16  # other stretches of the haystack


def test_cases_follow_the_seed():
    first, again, other = (needle_cases(Characters(), HAYSTACK, lengths=(400,), cases=10, seed=s) for s in (0, 0, 1))
    assert first == again
    assert not {case.context for case in first} & {case.context for case in other}


def test_context_begins_as_the_tokenizer_does():
    (case, *_) = needle_cases(Characters(bos=True), HAYSTACK, lengths=(400,), cases=5)
    assert case.context[0] == 0 and 0 not in case.context[1:] + case.question + case.answer
    assert len(case.context) == 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": 12}, "multiple of lengths x depths = 1 x 5, got 12"),
        ({"cases": 0}, "got 0"),
        ({"lengths": ()}, "= 0 x 5"),
        ({"needles": 6}, "needles=6 and depths=5"),
        ({"needles": 0}, "needles=0"),
        ({"lengths": (60,)}, "no context of 60 tokens with 2 needles"),
        ({"lengths": (50_000,)}, "pass a longer haystack"),
    ],
)
def test_wrong_counts(changes, message):
    with pytest.raises(ValueError, match=message):
        needle_cases(Characters(), HAYSTACK, **{"lengths": (400,), "cases": 5} | changes)


# Scores


def case_of(seed, answer, length=90):
    ids = tuple(tokens(1, length + 6, seed)[0].tolist())
    return NeedleCase(ids[:length], ids[length:], tuple(answer), length, 0.5)


def answered(model, cache=None, seed=0):
    """Make a case with the answer that a model gives."""
    case = case_of(seed, ())
    ids = torch.tensor([case.context + case.question])
    answer = generated(model, cache, input_ids=ids, max_new_tokens=4)[0, ids.shape[1] :].tolist()
    return case_of(seed, answer)


def dense(model):
    return lambda: DynamicCache(config=model.config)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_found_is_what_greedy_decoding_gives(architecture):
    model = tiny(architecture)
    right = answered(model)
    wrong = case_of(0, (*right.answer[:-1], right.answer[-1] - 1))  # the same context and question
    rows = evaluate_needles(model, [right, wrong, right], dense(model), chunk=40, progress=False)
    assert [row["found"] for row in rows] == [True, False, True]
    assert rows[0] == pytest.approx(rows[2])  # asked on a copy and on the cache itself
    assert rows[0]["nll"] < rows[1]["nll"]


def test_nll_is_that_of_the_answer():
    model, case = tiny(), case_of(0, (5, 6, 7))
    (row,) = evaluate_needles(model, [case], dense(model), progress=False)
    ids = torch.tensor([case.context + case.question + case.answer])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, -4:-1], ids[0, -3:])
    assert row == {"length": 90, "depth": 0.5, "found": False, "nll": pytest.approx(expected.item(), rel=1e-5)}


def test_everything_kept_equals_dense():
    model = attached()
    cases = [answered(model, seed=seed) for seed in range(3)]
    rows = evaluate_needles(model, cases, lambda: everything(model), chunk=40, progress=False)
    assert all(row["found"] for row in rows)
    expected = evaluate_needles(model, cases, dense(model), progress=False)
    assert [row["nll"] for row in rows] == pytest.approx([row["nll"] for row in expected], rel=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_compressed_as_if_decoded(architecture):
    """In windowed form neither chunks nor the single forward of question and answer change the score."""
    model = attached(architecture).double()  # in float32 a kernel rounds queries: steps of 1e-4

    def windowed():
        return SwanCache(model, retention=0.3, buffer=8, sinks=2, prefill="windowed")

    case = answered(model, windowed())
    rows = [evaluate_needles(model, [case] * 2, windowed, chunk=chunk, progress=False) for chunk in (1, 17, 90)]
    assert all(row["found"] for pair in rows for row in pair)
    assert [row["nll"] for pair in rows for row in pair] == pytest.approx([rows[0][0]["nll"]] * 6, rel=1e-4)
    (other,) = evaluate_needles(model, [case], dense(model), progress=False)
    assert other["nll"] != pytest.approx(rows[0][0]["nll"], rel=1e-4)


def test_a_context_is_read_once_and_only_last_logits_are_made(monkeypatch):
    model, shapes = tiny(), []
    forward = model.forward

    def counting(input_ids, logits_to_keep=0, **kwargs):
        shapes.append((input_ids.shape[1], logits_to_keep))
        return forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

    keyword = cache_keyword(model)
    monkeypatch.setattr("swan.integrations.transformers.cache_keyword", lambda model: keyword)
    monkeypatch.setattr(model, "forward", counting)
    cases = [case_of(seed, (5, 6, 7)) for seed in (0, 0, 1)]
    assert len(evaluate_needles(model, cases, dense(model), chunk=64, progress=False)) == 3
    assert shapes == [(64, 1), (26, 1), (8, 3), (8, 3), (64, 1), (26, 1), (8, 3)]


def test_chunk_is_positive():
    with pytest.raises(ValueError, match="chunk >= 1, got 0"):
        evaluate_needles(tiny(), [], DynamicCache, chunk=0)


def test_summary():
    values = [(1024, 0.1, True, 1.0), (1024, 0.9, False, 2.0), (2048, 0.1, True, 3.0)]
    summary = summarize_needles([dict(zip(("length", "depth", "found", "nll"), row, strict=True)) for row in values])
    assert summary == {
        "cases": 3,
        "found": 2,
        "nll": 2.0,
        "by_length": [
            {"length": 1024, "cases": 2, "found": 1, "nll": 1.5},
            {"length": 2048, "cases": 1, "found": 1, "nll": 3.0},
        ],
        "by_depth": [
            {"depth": 0.1, "cases": 2, "found": 2, "nll": 2.0},
            {"depth": 0.9, "cases": 1, "found": 0, "nll": 2.0},
        ],
    }
    with pytest.raises(ValueError, match="at least one row"):
        summarize_needles([])


# Real models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models_find_needles(name):
    """The dense cache finds nearly all, half the bytes as well; without a history only sliding layers see a needle."""
    model, tokenizer = load_model(name)
    cases = needle_cases(tokenizer, evaluation_text(), lengths=(1024,), cases=10)
    assert tokenizer.decode(cases[0].context).count("The magic number of") == 2
    calibration = calibrate(model, token_windows(calibration_text(), tokenizer, 2, 1024).split(1), progress=False)
    nothing = Plan((None,) * len(calibration.dims), buffer=64)

    def found(make_cache):
        return summarize_needles(evaluate_needles(model, cases, make_cache, progress=False))["found"]

    assert found(dense(model)) >= 9
    attach(model, calibration)
    assert found(lambda: SwanCache(model, retention=0.5, buffer=64)) >= 9
    assert found(lambda: SwanCache(model, nothing)) <= 2
