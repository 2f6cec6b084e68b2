"""Tokens that an engine generates with swan in it: those of vLLM's own attention, or of swan in transformers."""

import functools

import pytest
import torch

import swan
from tests.tiny import cache_keyword
from tests.vllm.engine import run
from tests.vllm.served import BUFFER, SINKS, prompts

LENGTHS = (1, 5, 63, 64, 65, 150, 200)
PACKED = 0.4  # a retention that loses something


def job(*texts: list[int], tokens: int = 20) -> dict:
    return {"prompts": list(texts), "tokens": tokens}


@pytest.fixture(scope="module")
def stock(served):
    """Tokens of vLLM's own attention."""
    return run(served.folder, [job(*prompts(*LENGTHS))])["jobs"][0]["tokens"]


@pytest.fixture(scope="module")
def packed(served):
    """Tokens at a retention that loses something: each prompt alone, then all together, then all again."""
    texts = prompts(*LENGTHS)
    jobs = [*(job(text) for text in texts), job(*texts), job(*texts)]
    return run(served.folder, jobs, served.settings(PACKED))["jobs"]


def test_without_loss_tokens_are_those_of_stock(served, stock):
    """At retention 1, where most tokens are read from packed pages."""
    found = run(served.folder, [job(*prompts(*LENGTHS))], served.settings(1.0))
    assert found["jobs"][0]["tokens"] == stock


def test_a_window_longer_than_the_sequence_gives_the_tokens_of_stock(served, stock):
    found = run(served.folder, [job(*prompts(*LENGTHS))], served.settings(PACKED, buffer=512))
    assert found["jobs"][0]["tokens"] == stock


def test_packed_tokens_are_those_of_transformers(served, packed):
    """Read token by token there, which is the windowed form."""
    model, calibration = served.network, swan.Calibration.load(served.calibration)
    plan = swan.Plan.for_retention(PACKED, calibration, buffer=BUFFER, sinks=SINKS, by_head=False)  # as pages hold it
    swan.attach(model, calibration)
    try:
        for text, got in zip(prompts(*LENGTHS), packed, strict=False):
            cache = swan.SwanCache(model, plan, prefill="windowed")
            assert generated(model, text, cache, len(got["tokens"][0])) == got["tokens"][0]
    finally:
        swan.detach(model)


@torch.no_grad()
def generated(model, text, cache, tokens):
    step = functools.partial(model, **{cache_keyword(model): cache})
    ids, logits = [], step(torch.tensor([text])).logits
    for _ in range(tokens):
        ids.append(int(logits[0, -1].argmax()))
        logits = step(torch.tensor([ids[-1:]])).logits
    return ids


def test_packing_changes_tokens(stock, packed):
    """Or the tests beside this one would say nothing."""
    assert packed[len(LENGTHS)]["tokens"] != stock


def test_requests_together_give_what_each_gives_alone(packed):
    alone = [got["tokens"][0] for got in packed[: len(LENGTHS)]]
    assert packed[len(LENGTHS)]["tokens"] == alone


def test_the_prefix_cache_changes_no_token(packed):
    first, again = packed[0], packed[-1]
    assert sum(first["cached"]) == 0 and max(again["cached"]) >= 128
    assert again["tokens"] == packed[-2]["tokens"]


def test_chunks_of_a_prompt_change_no_token(served, packed):
    """The shortest prompts decode beside chunks of the longest."""
    options = {"max_num_batched_tokens": 48, "enable_prefix_caching": False}
    found = run(served.folder, [job(*prompts(*LENGTHS))], served.settings(PACKED), **options)
    assert found["jobs"][0]["tokens"] == packed[len(LENGTHS)]["tokens"]


def test_sixteen_requests_of_mixed_lengths(served):
    texts = prompts(*range(3, 3 + 16 * 25, 25))
    found = run(served.folder, [job(*texts), *(job(text) for text in texts)], served.settings(PACKED))
    together, *alone = found["jobs"]
    assert together["tokens"] == [got["tokens"][0] for got in alone]


def test_preemption_loses_nothing(served):
    """With too few blocks requests are thrown out and computed again."""
    texts = prompts(*[60] * 8)
    options = {"max_model_len": 256, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    plenty = run(served.folder, [job(*texts, tokens=80)], served.settings(PACKED), **options)
    scarce = run(
        served.folder, [job(*texts, tokens=80)], served.settings(PACKED), num_gpu_blocks_override=30, **options
    )
    assert plenty["preemptions"] == 0 and scarce["preemptions"] > 0
    assert scarce["jobs"][0]["tokens"] == plenty["jobs"][0]["tokens"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_without_loss(served, dtype):
    """Its tokens may differ from those of stock where two are almost alike; here none are."""
    texts = prompts(*LENGTHS)
    found = run(served.folder, [job(*texts, tokens=3)], served.settings(1.0), dtype=dtype)
    expected = run(served.folder, [job(*texts, tokens=3)], dtype=dtype)
    assert found["jobs"][0]["tokens"] == expected["jobs"][0]["tokens"]
