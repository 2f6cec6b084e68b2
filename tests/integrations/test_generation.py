"""`generate` on a `SwanCache`: token for token as with a dense cache when everything is kept."""

import pytest
import torch
from transformers import DynamicCache

from swan import LayerPlan, Plan, SwanCache, TopK
from tests.tiny import (
    attached,
    everything,
    float32_bound,
    generated,
    greatest_difference,
    left_padded,
    logits_of,
    tiny,
    tokens,
)

# With values of 16 bits there is no rounding, so that only float32 differs.
EXACT = Plan([LayerPlan(TopK(16, 9, bits=16), TopK(16, 7, bits=16))] * 2, buffer=8, sinks=2)
ROUNDED = Plan([LayerPlan(TopK(16, 9), TopK(16, 7))] * 2, buffer=8, sinks=2)
GRADED = Plan.for_retention(0.33, dims=[(16, 16)] * 2, buffer=8, sinks=2)

PADDED = {name: t for name, t in left_padded(40, 3, 21).items() if name != "position_ids"}
SINGLE = {"input_ids": tokens(1, 40)}
# No token ends the text: None for that is more than the lookup of older versions can take.
LOOKUP = {"input_ids": tokens(1, 12).repeat(1, 3), "prompt_lookup_num_tokens": 4, "eos_token_id": -1}

MODES = {
    "greedy": SINGLE,
    "greedy, shorter than the buffer": {"input_ids": tokens(2, 3)},
    "left-padded rows of 40, 3 and 21": PADDED,
    "beams": PADDED | {"num_beams": 3},
    "beams, all returned": SINGLE | {"num_beams": 4, "num_return_sequences": 4},
    "sampling": PADDED | {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": PADDED | {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "prefill in chunks": SINGLE | {"prefill_chunk_size": 7},
    "prefill in chunks, left-padded": PADDED | {"prefill_chunk_size": 11},
    "prompt lookup": LOOKUP,
    "assisted": SINGLE | {"assistant_model": 1},
}
each_mode = pytest.mark.parametrize("mode", MODES)


def arguments_of(mode, **more):
    arguments = MODES[mode] | more
    if "assistant_model" in arguments:
        arguments["assistant_model"] = tiny(seed=arguments["assistant_model"])
    torch.manual_seed(7)
    return arguments


# Everything kept ----------------------------------------------------------------------------------


@each_mode
def test_is_token_exact_when_everything_is_kept(mode):
    model = attached()
    expected = generated(model, DynamicCache(), **arguments_of(mode))
    cache = everything(model)
    assert torch.equal(generated(model, cache, **arguments_of(mode)), expected)
    assert cache.winnowed[0].history_length > 0 or mode == "greedy, shorter than the buffer"


@pytest.mark.parametrize("mode", ["greedy", "left-padded rows of 40, 3 and 21", "beams", "sampling"])
@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "qwen3"])
def test_is_token_exact_on_other_architectures(architecture, mode):
    model = attached(architecture)
    expected = generated(model, DynamicCache(config=model.config), **arguments_of(mode))
    assert torch.equal(generated(model, everything(model), **arguments_of(mode)), expected)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_is_token_exact_with_folded_values(mode):
    model = attached(fold=True)
    expected = generated(model, DynamicCache(), **arguments_of(mode))
    assert torch.equal(generated(model, everything(model), **arguments_of(mode)), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "left-padded"])
def test_a_conversation_goes_on_in_the_same_cache(padded):
    model = attached()
    dense, cache = DynamicCache(), everything(model)
    text, mask = (
        (PADDED["input_ids"], PADDED["attention_mask"]) if padded else (tokens(1, 20), torch.ones(1, 20).long())
    )
    for turn in range(3):
        new = tokens(text.shape[0], 5, seed=turn)
        text = torch.cat([text, new], dim=1)
        mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
        expected = generated(model, dense, input_ids=text, attention_mask=mask, max_new_tokens=6)
        assert torch.equal(generated(model, cache, input_ids=text, attention_mask=mask, max_new_tokens=6), expected)
        text = expected


def test_a_reset_cache_serves_another_batch():
    model = attached()
    cache = everything(model)
    generated(model, cache, **PADDED)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert torch.equal(generated(model, cache, **SINGLE), generated(model, DynamicCache(), **SINGLE))


# Pruned -------------------------------------------------------------------------------------------


def tolerance(model, plan, **inputs):
    """Bound the difference of two runs that differ in their rounding only.

    With values of 16 bits, what float32 costs. Fewer bits turn a difference of float32 into a whole step
    where a value lies at the border of two: a few in ten thousand do, so what moves them all by up to
    half a step, rounding itself, is more.
    """
    bound = float32_bound(model, **inputs)
    if plan is EXACT:
        return bound
    exact, rounded = (
        logits_of(model, SwanCache(model, which, prefill="windowed"), **inputs) for which in (EXACT, plan)
    )
    return bound + greatest_difference(exact, rounded)


each_plan = pytest.mark.parametrize("plan", [EXACT, ROUNDED, GRADED], ids=["16 bits", "int8", "graded"])


@each_plan
def test_rows_of_a_padded_batch_are_what_they_are_alone(plan):
    model, lengths = attached(), (60, 3, 11, 34)
    inputs = left_padded(*lengths)
    batch = logits_of(model, SwanCache(model, plan, prefill="windowed"), **inputs)
    for row, length in enumerate(lengths):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, -length:]}
        expected = logits_of(model, SwanCache(model, plan, prefill="windowed"), **alone)
        got = batch[row : row + 1, -length:]
        assert greatest_difference(got, expected) <= tolerance(model, plan, **alone)
    # The same bound tells this cache from a dense one.
    assert greatest_difference(batch[:1], logits_of(model, **inputs)[:1]) > 10 * float32_bound(model, **inputs)


@each_plan
@pytest.mark.parametrize("chunk", [1, 5, 8, 23], ids=["token by token", "chunks of 5", "of the buffer", "of 23"])
@pytest.mark.parametrize("padded", [False, True], ids=["one row", "left-padded"])
def test_chunks_do_not_matter(plan, chunk, padded):
    model = attached()
    inputs = left_padded(60, 3, 34) if padded else {"input_ids": tokens(1, 60)}
    whole = logits_of(model, SwanCache(model, plan, prefill="windowed"), **inputs)
    chunks = logits_of(model, SwanCache(model, plan, prefill="windowed"), chunk=chunk, **inputs)
    real = inputs["attention_mask"].bool() if padded else torch.ones(1, 60).bool()
    assert greatest_difference(whole[real], chunks[real]) <= tolerance(model, plan, input_ids=inputs["input_ids"])


def test_a_dense_prefill_is_dense_but_for_what_was_pruned_before():
    """In the first chunk every token sees every other dense."""
    model, inputs = attached(), {"input_ids": tokens(1, 60)}
    logits = logits_of(model, SwanCache(model, ROUNDED), chunk=50, **inputs)
    difference = (logits - logits_of(model, **inputs)).abs().amax(-1)[0]
    assert difference[:50].max() < float32_bound(model, **inputs)
    assert difference[50:].max() > 10 * float32_bound(model, **inputs)


@each_mode
def test_pruned_generation_runs_in_every_mode(mode):
    model = attached()
    expected = generated(model, DynamicCache(), **arguments_of(mode))
    cache = SwanCache(model, ROUNDED, prefill="windowed")
    out = generated(model, cache, **arguments_of(mode))
    assert out.shape == expected.shape
    assert ((out >= 0) & (out < model.config.vocab_size)).all()
    longest = MODES[mode]["input_ids"].shape[1] + 11
    assert cache.get_seq_length() == longest


@pytest.mark.parametrize("mode", ["prefill in chunks", "prefill in chunks, left-padded"])
def test_pruned_generation_does_not_depend_on_prefill_chunks(mode):
    model = attached()
    chunks = generated(model, SwanCache(model, EXACT, prefill="windowed"), **arguments_of(mode))
    whole = generated(model, SwanCache(model, EXACT, prefill="windowed"), **arguments_of(mode, prefill_chunk_size=None))
    assert torch.equal(chunks, whole)


def test_pruned_prompt_lookup_is_pruned_greedy():
    """A draft no longer than the buffer is cropped without loss."""
    model = attached()
    plain = generated(model, SwanCache(model, EXACT, prefill="windowed"), input_ids=LOOKUP["input_ids"])
    lookup = generated(model, SwanCache(model, EXACT, prefill="windowed"), **LOOKUP)
    assert torch.equal(lookup, plain)
