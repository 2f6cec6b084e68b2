"""Engines of more than one process, engines that guess tokens ahead, and engines that swan refuses."""

import pytest
import transformers

from tests.vllm.engine import run
from tests.vllm.served import Served, prompt, prompts

JOB = {"prompts": prompts(5, 64, 150, 200), "tokens": 20}


@pytest.fixture(scope="module")
def expected(served):
    return run(served.folder, [JOB], served.settings(0.4))["jobs"][0]["tokens"]


def test_two_processes_share_the_heads(served, expected):
    found = run(served.folder, [JOB], served.settings(0.4), tensor_parallel_size=2)
    assert found["jobs"][0]["tokens"] == expected


def test_more_processes_than_heads(tmp_path):
    """Each head is in two processes then, with its basis."""
    model = Served(tmp_path, num_key_value_heads=1)
    one = run(model.folder, [JOB], model.settings(0.4))
    two = run(model.folder, [JOB], model.settings(0.4), tensor_parallel_size=2)
    assert two["jobs"][0]["tokens"] == one["jobs"][0]["tokens"]


def test_guessed_tokens_change_none(served):
    """Guesses that are not taken lie in pages and window until the next tokens take their place."""
    text = prompt(20) * 6  # whose end has come before, so that there is something to guess
    job = {"prompts": [text, text[:70], prompt(90)], "tokens": 60}
    guesses = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    plain = run(served.folder, [job], served.settings(0.4))
    found = run(served.folder, [job], served.settings(0.4), speculative_config=guesses)
    assert found["guessed"] > 20 and 0 < found["taken"] < found["guessed"]
    assert found["jobs"][0]["tokens"] == plain["jobs"][0]["tokens"]


# What is refused ----------------------------------------------------------------------------------


def refused(model: Served, reason: str, settings: dict | None = None, **options: object) -> None:
    with pytest.raises(RuntimeError) as error:
        run(model.folder, [], model.settings(0.4) if settings is None else settings, **options)
    assert reason in str(error.value)


def test_settings(served):
    refused(served, "its settings are missing: --additional-config", additional_config={})
    refused(served, "unknown settings of swan: retain;", {**served.settings(0.4), "retain": 1})
    refused(served, "no plan fits in retention 0.01", served.settings(0.01))
    refused(served, "a server keeps up to 64 sinks, got 65", served.settings(0.4, sinks=65))
    refused(served, "No such file", {**served.settings(0.4), "calibration": "nowhere.safetensors"})


def test_a_calibration_of_another_model(served, tmp_path):
    other = Served(tmp_path, num_hidden_layers=3)
    refused(
        served, "this calibration is of another model (num_hidden_layers: 3 calibrated, 2 here)", other.settings(0.4)
    )


def test_a_cache_of_eight_bits(served):
    refused(served, "swan does not serve a KV cache of dtype fp8", kv_cache_dtype="fp8")


def test_sliding_windows(tmp_path, served):
    model = Served(tmp_path, "mistral")
    config = transformers.AutoConfig.from_pretrained(model.folder)
    config.sliding_window = 64
    config.save_pretrained(model.folder)
    refused(model, "swan does not serve layers with a sliding window")


def test_pages_of_another_size(served):
    refused(served, "a page holds a multiple of 64 tokens, got 32", block_size=32)
