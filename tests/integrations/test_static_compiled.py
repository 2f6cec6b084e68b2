"""A static `SwanCache` under torch.compile: compiled once, and once for each level."""

import copy
import itertools

import pytest
import torch
from transformers import CompileConfig

from swan import attach, calibrate
from swan.evaluation.models import load_model
from swan.evaluation.texts import calibration_text, token_windows
from swan.integrations.transformers import cache_keyword
from tests.integrations.statics import EXACT, LEVELS, PADDED, TEXT, close, static, twins
from tests.tiny import attached, generated, logits_of, tokens

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """The compiled graphs, one for each frame."""
    return []


@pytest.fixture
def compiled(graphs):
    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return {"fullgraph": True, "backend": backend}


def decode(model, step, cache, ids):
    """Logits of single tokens, one after the other."""
    with torch.no_grad():
        return torch.cat([step(t, **{cache_keyword(model): cache}).logits for t in ids.split(1, dim=1)], dim=1)


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


@pytest.mark.parametrize("backend", ["traced", pytest.param("inductor", marks=slow)])
def test_500_steps_and_three_moves_of_the_dial_compile_nothing_more(backend, graphs, compiled):
    """Whole graphs only, once each level has been seen."""
    torch.use_deterministic_algorithms(False)  # inductor's code does not know NaN filling (tests/conftest.py)
    model, ids, levels = attached(num_hidden_layers=1), tokens(1, 520), [1.0, 0.5, 0.33, 0.26]
    step = torch.compile(model, fullgraph=True) if backend == "inductor" else torch.compile(model, **compiled)
    cache = static(model, max_length=520, levels=levels)
    logits_of(model, cache, input_ids=ids[:, :10])
    for i, level in enumerate(levels):
        cache.retention = level
        decode(model, step, cache, ids[:, 10 + i : 11 + i])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for part, level in zip(ids[:, 14:514].split(125, dim=1), levels, strict=True):
            cache.retention = level
            assert decode(model, step, cache, part).isfinite().all()
    assert backend == "inductor" or len(graphs) == len(levels)


def test_nothing_is_traced_that_an_older_torch_does_not_trace(compiled, monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))
    model, ids = attached(num_hidden_layers=1), TEXT["input_ids"]
    cache = static(model, retention=0.33, max_length=100)
    logits_of(model, cache, input_ids=ids[:, :1])
    decode(model, torch.compile(model, **compiled), cache, ids[:, 1:3])


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
def test_inductor_decodes(monkeypatch):
    monkeypatch.setenv("SWAN_CPU", "generic")  # rounds no queries: a step of its own where they differ in the last bit
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
