"""A model that threads share, kernels in processes that were forked, and torch's deterministic mode."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from swan import SwanCache
from tests.tiny import attached, generated, tokens


@pytest.fixture(scope="module")
def model():
    return attached()


def decode(model, prompt, start=None):
    """Tokens that a model says, and all that the cache holds afterwards."""
    cache = SwanCache(model, retention=0.33, buffer=16, sinks=2)
    if start is not None:
        start.wait()
    said = generated(model, cache, input_ids=prompt, max_new_tokens=24)
    return [said, *(t.clone() for kv in cache.winnowed.values() for t in kv.tensors)]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_share_a_model(model):
    """Each with a cache of its own: what one says does not depend on the others."""
    prompts = [tokens(1, length, seed=length) for length in (3, 20, 41, 90)]
    alone = [decode(model, prompt) for prompt in prompts]
    start, interval = Barrier(len(prompts)), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(prompts)) as pool:
            for found, expected in zip(
                pool.map(lambda prompt: decode(model, prompt, start), prompts), alone, strict=True
            ):
                assert_equal(found, expected)
    finally:
        sys.setswitchinterval(interval)


def test_deterministic_algorithms(model):
    """In that mode, where torch raises an error for what has no deterministic form, everything runs and repeats."""
    torch.use_deterministic_algorithms(True, warn_only=False)
    assert_equal(*(decode(model, tokens(1, 60)) for _ in range(2)))
    for prefill in ("chunk", "windowed"):
        room = {"levels": [0.5, 0.33], "static": True, "max_length": 60}
        found = []
        for _ in range(2):
            cache = SwanCache(model, prefill=prefill, buffer=16, sinks=2, **room)
            found.append(generated(model, cache, input_ids=tokens(2, 30, seed=5), disable_compile=True))
            cache.retention = 0.33
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([1, 0]))
        assert_equal(*([said] for said in found))


FORKED = """
import copy, os, signal, sys
import torch
from swan import Graded, KVCache, LayerPlan

torch.manual_seed(0)
layout = Graded(((64, 4),))
cache = KVCache(LayerPlan(layout, layout), buffer=16)
cache(*torch.randn(3, 1, 4, 3000, 64))
new = torch.randn(3, 1, 4, 1, 64)

class Decoded(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return copy.deepcopy(cache)(*new)

assert torch.get_num_threads() == 2
together = Decoded()[0]  # with two threads
signal.alarm(300)
workers = list(torch.utils.data.DataLoader(Decoded(), None, num_workers=2, multiprocessing_context="fork"))
child = os.fork()
if not child:
    signal.alarm(120)
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(Decoded()[0], workers[0]) else 1)
assert os.waitpid(child, 0)[1] == 0
torch.set_num_threads(1)
alone = Decoded()[0]
assert all(torch.equal(out, alone) for out in workers)
assert torch.allclose(alone, together, atol=1e-5)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kernels_work_in_forks_of_one_thread():
    """Which are workers of a DataLoader; with more threads OpenMP waits for those that the parent had (torch's too)."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", FORKED], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
