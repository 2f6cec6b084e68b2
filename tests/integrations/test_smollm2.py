"""SmolLM2-135M, a real model: exact where nothing is pruned, close where half is."""

import copy

import pytest
import torch

from swan import Graded, LayerPlan, Plan, SwanCache, attach, calibrate, detach
from swan.calibration.effects import KEYS, graded
from swan.evaluation.models import load_model
from swan.evaluation.perplexity import Setting, evaluate
from swan.evaluation.texts import calibration_text, evaluation_text, token_windows
from swan.integrations.transformers import cache_keyword
from tests.tiny import float32_bound, generated, greatest_difference, live_storages, logits_of


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def calibration(smollm2):
    model, tokenizer = smollm2
    windows = token_windows(calibration_text(), tokenizer, windows=2, length=1024)
    return calibrate(model, windows.split(1), effects=False, progress=False)


@pytest.fixture(scope="module")
def window(smollm2):
    return token_windows(evaluation_text(), smollm2[1], windows=1, length=512)


@pytest.fixture
def model(smollm2, calibration):
    attach(smollm2[0], calibration)
    yield smollm2[0]
    detach(smollm2[0])


def perplexity(logits, ids):
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).exp().item()


def test_bases_capture_what_matters(calibration):
    """The leading quarter holds most of the importance of the keys; of the values less."""
    rows = calibration.report()
    assert len(rows) == 30 and calibration.tokens == 2048
    assert calibration.dims == [(64, 64)] * 30
    mean = {name: sum(row[name] for row in rows) / 30 for name in ("keys_quarter", "values_quarter")}
    assert mean["keys_quarter"] > mean["values_quarter"] > 0.25


def test_a_cache_that_keeps_everything_is_exact(model, window):
    ids = window[:, :160]
    cache = SwanCache(model, retention=1.0, buffer=32)
    logits = logits_of(model, cache, chunk=80, input_ids=ids)
    assert cache.winnowed[0].history_length == 160 - 32 - 4
    assert greatest_difference(logits, logits_of(model, input_ids=ids)) < float32_bound(model, input_ids=ids)


def test_perplexity_at_half_the_bytes(model, window):
    """Every token but sinks and the newest 64 is seen pruned, as in decoding."""
    dense = perplexity(logits_of(model, input_ids=window), window)
    cache = SwanCache(model, retention=0.5, buffer=64, prefill="windowed")
    pruned = perplexity(logits_of(model, cache, input_ids=window), window)
    assert cache.retention <= 0.5
    assert pruned == pytest.approx(dense, rel=0.02)
    assert pruned != dense


def test_text_at_half_the_bytes(model, smollm2, window):
    """Greedy text after 256 tokens, of which it sees 188 pruned."""
    ids = window[:, :256]
    dense = generated(model, input_ids=ids, max_new_tokens=20)[0, 256:]
    cache = SwanCache(model, retention=0.5, buffer=64, prefill="windowed")
    text = generated(model, cache, input_ids=ids, max_new_tokens=20)[0, 256:]
    assert cache.winnowed[29].history_length == 275 - 64 - 4
    assert (text == dense[: len(text)]).float().mean() > 0.5
    assert smollm2[1].decode(text).strip()


@pytest.mark.slow
def test_the_dial_on_a_real_model(model, window):
    """Less memory at each notch, and at the lowest more loss than chance makes."""
    cache = SwanCache(model, retention=0.5, buffer=64, prefill="windowed")
    logits_of(model, cache, input_ids=window[:, :448])
    rest, losses, sizes = window[:, 448:], [], []
    for retention in (0.5, 0.18):
        cache.retention = retention
        twin = copy.deepcopy(cache)
        sizes.append(twin.nbytes)
        with torch.no_grad():
            losses.append(perplexity(model(rest, **{cache_keyword(model): twin}).logits, rest))
    assert sizes[1] < 0.75 * sizes[0]
    assert losses[0] < losses[1] < 1.3 * losses[0]


# At 0.3 of the bytes: leading coordinates of 16 bits, where only float32 differs; and the default plan, where that now
# and then turns a code into its neighbour.
LEADING = Graded.leading(64, 19)
WAYS = {"16 bits": {"plan": Plan([LayerPlan(LEADING, LEADING)] * 30, buffer=64)}}
WAYS |= {"default": {"retention": 0.3, "buffer": 64}}


def assert_as_good_as_the_same(found, expected, bound):
    if bound is not None:
        assert greatest_difference(found, expected) <= bound
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.995


def what_rounding_changes(run, model, expected):
    """How far the logits of `run()` move, on average, where the embeddings move by a unit in their last place."""

    def rounded(module, arguments, embeddings):
        return embeddings * (1 + 2e-7 * torch.randn_like(embeddings))

    hook = model.get_input_embeddings().register_forward_hook(rounded)
    try:
        return max((run() - expected).abs().mean() for _ in range(3))
    finally:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_padded_batch_of_eight(model, smollm2, way):
    lengths = [3, 17, 64, 129, 300, 511, 777, 900]
    texts = token_windows(evaluation_text(), smollm2[1], windows=8, length=900)
    mask = torch.stack([(torch.arange(900) >= 900 - length).long() for length in lengths])
    ids = torch.stack([text[:length].new_zeros(900).scatter(0, torch.arange(900 - length, 900), text[:length])
                       for text, length in zip(texts, lengths, strict=True)])  # fmt: skip
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    batch = logits_of(model, SwanCache(model, prefill="windowed", **WAYS[way]), input_ids=ids, **inputs)
    for row, length in enumerate(lengths):
        alone = {"input_ids": texts[row : row + 1, :length]}

        def run(alone=alone):
            return logits_of(model, SwanCache(model, prefill="windowed", **WAYS[way]), **alone)

        expected, padded = run(), batch[row : row + 1, -length:]
        assert_as_good_as_the_same(padded, expected, None if way == "default" else float32_bound(model, **alone))
        if way == "default" and length > 200:  # most of what it sees is packed
            assert (padded - expected).abs().mean() < 2 * what_rounding_changes(run, model, expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_chat_of_twenty_turns_is_one_long_prompt(model, smollm2, way):
    """Turns of 20 tokens of the user, answered with 25 greedy tokens each."""
    key = cache_keyword(model)
    cache, text = SwanCache(model, prefill="windowed", **WAYS[way]), torch.zeros(1, 0, dtype=torch.long)
    for new in token_windows(evaluation_text(), smollm2[1], windows=20, length=20).split(1):
        text = torch.cat([text, new], dim=1)
        text = generated(model, cache, input_ids=text, max_new_tokens=25, min_new_tokens=25)
    assert text.shape[1] == 900 and cache.get_seq_length() == 899
    one = SwanCache(model, prefill="windowed", **WAYS[way])
    prompt = logits_of(model, one, input_ids=text[:, :-1])
    answers = torch.arange(900).view(20, 45)[:, 20:].flatten()
    assert (prompt[0].argmax(-1)[answers - 1] == text[0, answers]).float().mean() > 0.99
    with torch.no_grad():
        last = [model(text[:, -1:], **{key: c}).logits for c in (cache, one)]
    bound = None if way == "default" else float32_bound(model, input_ids=text)
    assert_as_good_as_the_same(*last, bound)


@pytest.mark.slow
def test_six_thousand_tokens_in_a_fifth_of_their_bytes():
    """Count storages alive after each forward, from the first chunk to single steps; with measured effects.

    A fifth of the bytes in bfloat16; the model runs in float32, which every CPU multiplies.
    """
    model, tokenizer = load_model("smollm2-135m")
    attach(model, calibrate(model, token_windows(calibration_text(), tokenizer, 1, 1024).split(1), progress=False))
    ids = token_windows(evaluation_text(), tokenizer, windows=1, length=6144)
    budget = ids.shape[1] * 30 * 2 * 3 * 64 * 2 // 5
    held = []

    def read(cache, sizes):
        start = 0
        for size in sizes:
            given = {"input_ids": ids[:, start : start + size], cache_keyword(model): cache}
            with torch.no_grad():
                logits = model(**given, logits_to_keep=1).logits
            assert logits.isfinite().all()
            del given, logits
            held.append(sum(size for _, size in live_storages().items() - before.items()))
            start += size

    sizes = [512] * 11 + [500, *[1] * 12]
    before: dict[int, int] = {}
    warm = SwanCache(model, budget=budget, buffer=64)
    read(warm, sizes)  # the mixing matrices of the layouts are kept for all caches of the process
    del warm
    held.clear()
    before = live_storages()
    cache = SwanCache(model, budget=budget, buffer=64)
    read(cache, sizes)
    assert cache.get_seq_length() == 6144
    assert max(held) <= budget
    assert held[-1] == pytest.approx(cache.nbytes, rel=0.01)
    assert 0.13 < cache.retention < 0.2
    print(f"at most {max(held)} of {budget} bytes, retention {cache.retention:.3f}")


@pytest.mark.slow
def test_effects_of_a_real_model_predict_its_divergence(smollm2):
    """Within a factor of two, on text that they were not measured on; and plans that follow them lose less."""
    model, tokenizer = smollm2
    windows = token_windows(calibration_text(), tokenizer, windows=10, length=1024)
    calibration = calibrate(model, windows[:8:2].split(1), progress=False)
    layout, exact = graded(64, KEYS[6]), Graded(((64, 16),))
    plans = [Plan((LayerPlan(layout, exact),) * 30, buffer=64)]
    plans += [Plan.for_retention(0.2, calibration, buffer=64), Plan.for_retention(0.2, dims=[(64, 64)] * 30, buffer=64)]
    _, keys, by_effect, alike = evaluate(model, windows[8:], [Setting(plan) for plan in plans], calibration)
    predicted = calibration.effects.keys[..., 6].sum().item()
    assert predicted / 2 < keys["kl"] < predicted * 2
    assert by_effect["kl"] < alike["kl"]


@pytest.mark.parametrize("fold", [False, True], ids=["at run time", "folded"])
def test_detach_brings_it_back_bit_for_bit(smollm2, calibration, window, fold):
    model, ids = smollm2[0], window[:, :64]
    before, logits = {name: t.clone() for name, t in model.state_dict().items()}, logits_of(model, input_ids=ids)
    attach(model, calibration, fold=fold)
    inside = logits_of(model, SwanCache(model, retention=1.0, buffer=16), chunk=32, input_ids=ids)
    assert greatest_difference(inside, logits) < 1e-3 * logits.abs().max()
    detach(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits_of(model, input_ids=ids), logits)
