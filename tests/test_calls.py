"""A decode step of a layer in Python, whatever the machine: how many calls of swan's own functions, and which way."""

import re
import sys
from pathlib import Path

import pytest
import torch

import swan
from tests.compilers import needs_cxx

FOLDER = Path(swan.__file__).parent
PAGE = FOLDER.parent / "docs/concepts/source.md"


@pytest.fixture(scope="module")
def calls() -> list[tuple[str, str]]:
    """File and function of each call in a step: rotations, update, packing and attention, eager, on a growing cache."""
    layer = swan.LayerPlan(swan.Graded(((16, 8), (48, 4), (64, 2))), swan.Graded(((16, 4), (48, 3), (64, 2))))
    cache = swan.KVCache(layer)
    key_rotation, value_rotation = (swan.OrthoRotation(swan.random_rotation(8, 128, seed=seed)) for seed in (0, 1))

    def step(tokens):
        q, k, v = torch.randn(1, 32, tokens, 128), *torch.randn(2, 1, 8, tokens, 128)
        return value_rotation.inverse(cache(key_rotation(q), key_rotation(k), value_rotation(v)))

    calls = []

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(FOLDER)):
            file = Path(frame.f_code.co_filename).relative_to(FOLDER)
            calls.append((str(file), frame.f_code.co_qualname))

    step(1000)
    step(1)  # builds what is built once
    sys.setprofile(count)
    try:
        step(1)
    finally:
        sys.setprofile(None)
    return calls


@needs_cxx
def test_a_decode_step_makes_few_calls(calls):
    assert 0 < len(calls) < 120, calls


@needs_cxx
def test_the_way_is_the_one_on_the_page(calls):
    text = PAGE.read_text().split("<!-- the way -->")[1].split("<!-- end of the way -->")[0]
    way = re.findall(r"^\d+\. `(\S+)` `(\S+)`", text, re.MULTILINE)
    assert 10 < len(way) <= 15
    start = 0
    for stop in way:
        assert stop in calls[start:], f"{stop} does not follow"
        start = calls.index(stop, start) + 1
