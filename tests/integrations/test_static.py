"""A static `SwanCache`: the same logits as a dynamic one, from code that is compiled once for each level."""

import copy
import itertools
import re

import pytest
import torch
from transformers import CompileConfig

from swan import LayerPlan, Plan, SwanCache, TopK, attach, calibrate
from swan.evaluation.sources import calibration_text, load_model, token_windows
from swan.integrations.transformers import cache_keyword
from tests.strategies import one_thread  # noqa: F401
from tests.tiny import attached, float32_bound, generated, greatest_difference, left_padded, logits_of, tokens

TEXT = {"input_ids": tokens(2, 60)}
PADDED = left_padded(60, 23, 41)
LEVELS = [0.5, 0.33, 0.26]
# Values of 16 bits: an int8 step apart is what a rounding of float32 may make of the others.
EXACT = Plan([LayerPlan(TopK(16, 9, bits=16), TopK(16, 7, bits=16))] * 2, buffer=8, sinks=2)
SMALL = {"buffer": 8, "sinks": 2}
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """What was compiled, one for each frame."""
    return []


@pytest.fixture
def compiled(graphs):
    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return {"fullgraph": True, "backend": backend}


def static(model, plan=None, **settings):
    return SwanCache(model, plan, **SMALL | {"static": True, "max_length": 64} | settings)


def twins(model, plan=None, **settings):
    """A static cache and a dynamic one that begins like it."""
    dynamic = dict(settings)
    levels = dynamic.pop("levels", None)
    if levels:
        dynamic["retention"] = max(levels)
    dynamic.pop("max_length", None)
    return static(model, plan, **settings), SwanCache(model, plan, **SMALL | dynamic)


def decode(model, step, cache, ids):
    """Logits of single tokens, one after the other."""
    with torch.no_grad():
        return torch.cat([step(t, **{cache_keyword(model): cache}).logits for t in ids.split(1, dim=1)], dim=1)


def close(model, a, b, inputs=TEXT):
    return greatest_difference(a, b) <= float32_bound(model, **inputs)


# Not compiled -------------------------------------------------------------------------------------

PLANS = {"everything": {"retention": 1.0}, "top-k": {"plan": EXACT}, "graded": {"retention": 0.33}}
each_plan = pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS)


@each_plan
@pytest.mark.parametrize("chunk", [1, 7, 60], ids=["token by token", "chunks of 7", "at once"])
@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
def test_a_static_cache_is_a_dynamic_one(settings, chunk, prefill):
    model = attached()
    a, b = (logits_of(model, cache, chunk=chunk, **TEXT) for cache in twins(model, prefill=prefill, **settings))
    assert close(model, a, b)


@each_plan
@pytest.mark.parametrize("chunk", [1, 7, 60], ids=["token by token", "chunks of 7", "at once"])
def test_rows_are_padded_as_in_a_dynamic_one(settings, chunk):
    model, real = attached(), PADDED["attention_mask"].bool()
    a, b = (logits_of(model, cache, chunk=chunk, **PADDED) for cache in twins(model, **settings))
    assert close(model, a[real], b[real], PADDED)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "gpt-neox", "mixtral", "olmo2", "phi3", "qwen2", "qwen3"])
def test_architectures(architecture):
    model = attached(architecture)
    a, b = (logits_of(model, cache, chunk=20, **TEXT) for cache in twins(model, EXACT))
    assert close(model, a, b)


def test_sliding_layers_stay_those_of_transformers():
    model = attached("gemma3")
    cache = static(model, retention=0.5)
    assert [type(layer).__name__ for layer in cache.layers] == ["StaticSlidingWindowLayer", "_StaticSwanLayer"]
    logits_of(model, cache, chunk=20, **TEXT)
    assert cache.layers[0].keys.shape[2] == 8


@pytest.mark.parametrize("padded", [False, True], ids=["one length", "left-padded"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_token_exact(padded, beams):
    model = attached()
    inputs = {name: PADDED[name] for name in ("input_ids", "attention_mask")} if padded else TEXT
    a, b = (generated(model, cache, **inputs, num_beams=beams) for cache in twins(model, retention=1.0, max_length=80))
    assert torch.equal(a, b)


def test_a_conversation_goes_on():
    model = attached()
    cache, dynamic = twins(model, EXACT)
    ids = TEXT["input_ids"][:, :20]
    for turn in range(3):
        ids = torch.cat([ids, tokens(2, 3, seed=turn)], dim=1)
        expected = generated(model, dynamic, input_ids=ids, max_new_tokens=6)
        assert torch.equal(generated(model, cache, input_ids=ids, max_new_tokens=6), expected)
        ids = expected


# Memory and the dial ------------------------------------------------------------------------------


def test_memory_is_that_of_its_level():
    model = attached()
    cache = static(model, levels=LEVELS, max_length=1000)
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    logits_of(model, cache, input_ids=TEXT["input_ids"][:, :1])
    sizes = {}
    for retention in [*LEVELS, 0.33, 0.5]:
        cache.retention = retention
        entry = cache.plan.layers[0]
        vectors = 2 * 2 * 2 * (entry.keys.vector_bytes(4) + entry.values.vector_bytes(4))
        dense = 2 * 2 * 2 * 2 * 16 * 4
        expected = 991 * vectors + 10 * dense
        assert expected <= cache.nbytes <= expected + 200  # counters
        assert sizes.setdefault(cache.retention, cache.nbytes) == cache.nbytes
    assert all(less < more for more, less in itertools.pairwise(sizes.values()))
    logits_of(model, cache, input_ids=tokens(2, 999))
    assert cache.nbytes == sizes[cache.retention]
    assert cache.compression == cache.nbytes / (1000 * dense)


def test_moved_levels_are_those_of_a_dynamic_cache():
    model = attached()
    caches = twins(model, levels=LEVELS)
    ids, logits = TEXT["input_ids"].split(15, dim=1), ([], [])
    for part, retention in zip(ids, [0.5, 0.26, 0.33, 0.5], strict=True):
        for cache, found in zip(caches, logits, strict=True):
            cache.retention = retention
            found.append(logits_of(model, cache, chunk=1, input_ids=part))
        assert caches[0].retention == caches[1].retention
        assert caches[0].plan == caches[1].plan
    assert close(model, *(torch.cat(found, dim=1) for found in logits))


def test_a_level_is_named_as_it_was_asked_for_or_as_it_is():
    cache = static(attached(), levels=[0.26, 0.5])
    cache.retention = 0.26
    lower = cache.retention
    cache.retention = 0.5
    cache.retention = lower
    assert cache.retention == lower < 0.26


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"levels": LEVELS}, "0.5, 0.33, 0.26"), ({"retention": 0.5}, "0.5"), ({"plan": EXACT}, f"{EXACT.retention:.3g}")],
    ids=["levels", "retention", "plan"],
)
def test_the_dial_has_no_other_levels(settings, named):
    cache = static(attached(), **settings)
    plan = cache.plan
    with pytest.raises(ValueError, match=rf"the dial of this static cache has the levels {re.escape(named)}, got 0\.4"):
        cache.retention = 0.4
    cache.retention = cache.retention
    assert cache.plan is plan


def test_reset_keeps_memory_and_level():
    model = attached()
    cache, dynamic = twins(model, levels=LEVELS)
    logits_of(model, cache, **PADDED | {"input_ids": tokens(3, 60)})
    cache.retention = dynamic.retention = 0.26
    places = [t.data_ptr() for kv in cache.winnowed.values() for t in kv.tensors]
    cache.reset()
    assert (int(cache.get_seq_length()), cache.retention) == (0, dynamic.retention)
    ids = tokens(3, 60)
    a, b = (logits_of(model, held, chunk=20, input_ids=ids) for held in (cache, dynamic))
    assert close(model, a, b, {"input_ids": ids})
    assert places == [t.data_ptr() for kv in cache.winnowed.values() for t in kv.tensors]


def test_reordered_rows_stay_in_place():
    model = attached()
    cache, dynamic = twins(model, EXACT)
    for held in (cache, dynamic):
        logits_of(model, held, input_ids=TEXT["input_ids"][:, :40])
    places = [t.data_ptr() for t in cache.winnowed[0].tensors]
    for held in (cache, dynamic):
        held.reorder_cache(torch.tensor([1, 0]))
        held.crop(-5)
    assert places == [t.data_ptr() for t in cache.winnowed[0].tensors]
    a, b = (logits_of(model, held, chunk=5, input_ids=tokens(2, 20)) for held in (cache, dynamic))
    assert close(model, a, b)


# What it refuses, and what it says ----------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_full_cache_says_so_and_stays(architecture):
    """Before any layer has taken a token, a sliding one neither."""
    model = attached(architecture)
    cache = static(model, retention=0.5)
    logits_of(model, cache, **TEXT)
    with pytest.raises(ValueError, match="holds 60 of 64 tokens, 5 more do not fit; build it with a larger max_length"):
        logits_of(model, cache, input_ids=tokens(2, 5))
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [60, 60]
    logits_of(model, cache, input_ids=tokens(2, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": None}, "a static cache needs max_length, the tokens it can hold; got None"),
        ({"static": False}, "max_length is for static caches"),
        ({"budget": "1MiB"}, r"a budget lowers the dial .*; give levels=\[...\] and move the dial"),
        ({"levels": [], "retention": None}, r"levels are one or more retentions .*, got \[\] and static=True"),
        ({"levels": [0.5], "static": False, "max_length": None}, r"got \[0.5\] and static=False"),
        ({"levels": [0.5], "retention": 0.5}, "give exactly one of plan, retention, budget and levels"),
        ({"levels": [0.5, 0.01]}, "no plan fits in retention 0.01"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    chosen = {} if settings.keys() & {"budget", "levels"} else {"retention": 0.5}
    with pytest.raises(ValueError, match=message):
        static(attached(), **chosen | settings)


def test_lengths_and_repr():
    model = attached()
    cache = static(model, levels=LEVELS)
    assert cache.is_compileable
    assert cache.get_mask_sizes(5, 0) == (64, 0)
    assert [layer.get_max_cache_shape() for layer in cache.layers] == [64, 64]
    assert not cache.is_initialized
    logits_of(model, cache, **TEXT)
    assert cache.is_initialized
    assert [row["history"] for row in cache.report()] == [50, 50]
    assert repr(cache).startswith(
        "SwanCache(static, max_length=64, levels=[0.5, 0.33, 0.26], retention=0.469, buffer=8"
    )
    assert "tokens=60" in repr(cache)


# Compiled -----------------------------------------------------------------------------------------


def test_a_decode_compiles_once(graphs, compiled):
    """While the buffer fills, while the sinks are still in it, and when tokens leave it; and for other caches."""
    model, ids = attached(num_hidden_layers=1), tokens(2, 120)
    step = torch.compile(model, **compiled)
    cache, dynamic = twins(model, retention=0.33, max_length=120)
    for held in (cache, dynamic):
        logits_of(model, held, input_ids=ids[:, :1])
    found = decode(model, step, cache, ids[:, 1:2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = torch.cat([found, decode(model, step, cache, ids[:, 2:])], dim=1)
        assert close(model, found, decode(model, model, dynamic, ids[:, 1:]), {"input_ids": ids})
        cache.reset()
        for other in (cache, static(model, retention=0.33, max_length=120)):
            logits_of(model, other, input_ids=ids[:, :1])
            assert torch.equal(decode(model, step, copy.deepcopy(other), ids[:, 1:30]), found[:, :29])
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("levels", "layers"),
    [([1.0, 0.33], 1), pytest.param(LEVELS, 2, marks=slow)],
    ids=["two levels", "three levels"],
)
def test_each_level_compiles_once(levels, layers, graphs, compiled):
    model, ids = attached(num_hidden_layers=layers), tokens(2, 150)
    step = torch.compile(model, **compiled)
    cache, dynamic = twins(model, max_length=150, levels=levels)
    for held in (cache, dynamic):
        logits_of(model, held, input_ids=ids[:, :10])
    parts = ids[:, 10:].split(14, dim=1)
    found, expected = [], []
    for turn, (part, retention) in enumerate(zip(parts, itertools.cycle([*levels, levels[1]]))):
        cache.retention = dynamic.retention = retention
        with torch._dynamo.config.patch(error_on_recompile=turn >= len(levels)):
            found.append(decode(model, step, cache, part))
        expected.append(decode(model, model, dynamic, part))
    assert turn == 9
    assert len(graphs) == len(levels)
    assert close(model, torch.cat(found, dim=1), torch.cat(expected, dim=1), {"input_ids": ids})


@slow
@pytest.mark.parametrize("settings", [{"retention": 1.0}, {"plan": EXACT}], ids=["everything", "top-k"])
def test_sliding_layers_compile_as_transformers_has_them(settings, graphs, compiled):
    """Their counter is a number of Python: once for its first value, once for any, once for a full window."""
    model, ids = attached("gemma3"), TEXT["input_ids"]
    step = torch.compile(model, **compiled)
    cache, dynamic = twins(model, **settings)
    for held in (cache, dynamic):
        logits_of(model, held, input_ids=ids[:, :1])
    found = decode(model, step, cache, ids[:, 1:10])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = torch.cat([found, decode(model, step, cache, ids[:, 10:])], dim=1)
    assert len(graphs) == 3
    assert close(model, found, decode(model, model, dynamic, ids[:, 1:]))


def test_generate_compiles_the_decode_of_padded_rows(graphs, compiled):
    model = attached(num_hidden_layers=1)
    inputs = {name: PADDED[name] for name in ("input_ids", "attention_mask")}
    config = CompileConfig(**compiled, mode=None)
    config._compile_all_devices = True
    cache, dynamic = twins(model, retention=1.0, max_length=100)
    found = generated(model, cache, **inputs, compile_config=config, max_new_tokens=40)
    assert torch.equal(found, generated(model, dynamic, **inputs, max_new_tokens=40))
    assert len(graphs) == 1


def test_a_prefill_compiles_too(graphs, compiled):
    """With its memory taken before: else the code would be that of a cache without any."""
    model, ids = attached(num_hidden_layers=1), TEXT["input_ids"]
    prefill = torch.compile(model, **compiled)
    cache, dynamic = twins(model, retention=1.0)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    for start in (0, 30):
        part = ids[:, start : start + 30]
        with torch.no_grad():
            found = prefill(part, **{cache_keyword(model): cache}).logits
        assert close(model, found, logits_of(model, dynamic, input_ids=part))
    assert len(graphs) == 1


@slow
def test_inductor_decodes():
    torch.use_deterministic_algorithms(False)  # its code does not know NaN filling (tests/conftest.py)
    model, ids = attached(num_hidden_layers=1), tokens(2, 80)
    step = torch.compile(model, fullgraph=True)
    cache, dynamic = twins(model, max_length=80, levels=[1.0, 0.33])
    for held in (cache, dynamic):
        logits_of(model, held, input_ids=ids[:, :10])
    for turn, part in enumerate(ids[:, 10:].split(10, dim=1)):
        with torch._dynamo.config.patch(error_on_recompile=turn >= 2):
            found = decode(model, step, cache, part)
        assert close(model, found, decode(model, model, dynamic, part), {"input_ids": ids})
        cache.retention = dynamic.retention = [0.33, 1.0][turn % 2]


@slow
@pytest.mark.parametrize("settings", [{"retention": 1.0}, {"retention": 0.33}], ids=["everything", "graded"])
def test_smollm2_decodes_from_one_compilation(settings, graphs, compiled):
    model, tokenizer = load_model("smollm2-135m")
    windows = token_windows(calibration_text(), tokenizer, windows=2, length=512)
    attach(model, calibrate(model, windows[:1].split(1), effects=False, progress=False))
    ids = windows[1:, :160]
    cache, dynamic = twins(model, buffer=32, sinks=4, max_length=160, **settings)
    for held in (cache, dynamic):
        logits_of(model, held, input_ids=ids[:, :100])
    step = torch.compile(model, **compiled)
    found = decode(model, step, cache, ids[:, 100:101])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = torch.cat([found, decode(model, step, cache, ids[:, 101:])], dim=1)
    expected = decode(model, model, dynamic, ids[:, 100:])
    assert len(graphs) == 1
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert close(model, found, expected, {"input_ids": ids})
