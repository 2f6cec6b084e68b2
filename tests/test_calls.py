"""What a decode step of a layer costs in Python, whatever the machine: calls of swan's own functions."""

import sys
from pathlib import Path

import torch

import swan
from tests.compilers import needs_cxx

FOLDER = str(Path(swan.__file__).parent)


@needs_cxx
def test_a_decode_step_makes_few_calls():
    """Rotations, update, packing and attention of one token, eager, on a growing cache."""
    layer = swan.LayerPlan(swan.Graded(((16, 8), (48, 4), (64, 2))), swan.Graded(((16, 4), (48, 3), (64, 2))))
    cache = swan.KVCache(layer)
    key_rotation, value_rotation = (swan.OrthoRotation(swan.random_rotation(8, 128, seed=seed)) for seed in (0, 1))

    def step(tokens):
        q, k, v = torch.randn(1, 32, tokens, 128), *torch.randn(2, 1, 8, tokens, 128)
        return value_rotation.inverse(cache(key_rotation(q), key_rotation(k), value_rotation(v)))

    calls = []

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(FOLDER):
            calls.append(frame.f_code.co_qualname)

    step(1000)
    step(1)  # builds what is built once
    sys.setprofile(count)
    try:
        step(1)
    finally:
        sys.setprofile(None)
    assert 0 < len(calls) < 120, calls
