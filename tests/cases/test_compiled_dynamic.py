"""A dynamic cache under torch.compile is compiled anew at each step: it says once that a static one is meant for it."""

import warnings

import pytest
import torch

from swan.integrations.transformers import layers
from tests.tiny import attached, everything, tokens


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(layers, "_said", False)
    yield
    torch._dynamo.reset()


def messages_of(cache, model):
    step = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        for ids in tokens(1, 3).split(1, dim=1):
            step(ids, cache=cache)
    return [str(w.message) for w in told if "SwanCache" in str(w.message)]


def test_dynamic_says_so_once():
    model = attached()
    (message,) = messages_of(everything(model), model)
    assert "SwanCache(model, levels=[0.33], static=True, max_length=4096) is meant for it" in message
    assert not messages_of(everything(model), model)


def test_static_says_nothing():
    model = attached()
    cache = everything(model, static=True, max_length=32)
    model(tokens(1, 3), cache=cache)
    assert not messages_of(cache, model)
