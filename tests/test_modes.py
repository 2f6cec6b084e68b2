"""Modes of torch that are on where swan is used first, or all the time: autocast, other defaults, fake tensors."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from swan import (
    Graded,
    KVCache,
    LayerPlan,
    OrthoRotation,
    TopK,
    dense_attention,
    merge_attention,
    pack,
    packed_attention,
    random_rotation,
    unpack,
)
from tests.strategies import DTYPES, ids, qkv
from tests.tiny import forget_mixes

PLANS = {
    "coded": LayerPlan(Graded(((8, 8), (24, 4))), Graded(((32, 3),))),
    "with 16 bits": LayerPlan(Graded(((8, 16), (24, 4))), Graded(((8, 16), (24, 3)))),
    "top-k": LayerPlan(TopK(32, 20), TopK(32, 12, bits=4)),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


def chunks(dtype):
    return [qkv(i, 2, (4, 2), tokens, tokens, 32, 32, dtype) for i, tokens in enumerate((40, 1, 28, 1))]


def decoded(plan, chunks, *, static=False, prefill="windowed", keep=None):
    room = {"static": True, "max_length": 90} if static else {"keep": keep}
    cache = KVCache(plan, buffer=8, sinks=2, prefill=prefill, **room)
    return [cache(*chunk) for chunk in chunks]


def same(found, expected) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
@pytest.mark.parametrize("static", [False, True])
@every_plan
@every_dtype
def test_a_cache_under_autocast_is_one_without(dtype, plan, static, prefill):
    given = chunks(dtype)
    expected = decoded(plan, given, static=static, prefill=prefill)
    for other in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=other):
            assert same(decoded(plan, given, static=static, prefill=prefill), expected)


def test_scores_of_tokens_under_autocast_are_those_without():
    given = [tuple(30 * t for t in chunk) for chunk in chunks(torch.float32)]  # steep
    expected = decoded(PLANS["coded"], given, keep=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(decoded(PLANS["coded"], given, keep=0.5), expected)


@every_dtype
def test_functions_under_autocast_compute_in_the_dtypes_they_are_given(dtype):
    q, k, v = qkv(0, 2, (4, 2), 5, 40, 32, 32, dtype)
    rotation = OrthoRotation(random_rotation(2, 32, seed=0, dtype=dtype))

    def results():
        packed = [pack(x, Graded(((32, 4),)), impl="compiled") for x in (k, v)]
        rotated = rotation(k)
        parts = [dense_attention(q, k, v, impl="compiled", return_lse=True) for _ in range(2)]
        attended = packed_attention(q, *packed, impl="compiled")
        return [*map(unpack, packed), rotated, rotation.inverse(rotated), *merge_attention(parts), attended]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results()
        assert torch.is_autocast_enabled("cpu")
    assert same(found, expected)


@pytest.mark.parametrize(
    "mode",
    [lambda: default_dtype(torch.bfloat16), lambda: default_dtype(torch.float64), torch.inference_mode,
     lambda: torch.device("meta")],
    ids=["16 bits by default", "64 bits by default", "inference", "a default device"],
)  # fmt: skip
@every_plan
def test_modes_of_the_first_use_do_not_stay(plan, mode):
    given = chunks(torch.float32)
    expected = decoded(plan, given)
    forget_mixes()
    with mode():
        found = decoded(plan, given)
    assert same(found, expected)
    assert same(decoded(plan, given), expected)


def test_fake_tensors_of_the_first_use_do_not_stay():
    """As of a tool that estimates memory without numbers."""
    forget_mixes()
    with FakeTensorMode():
        fake = pack(torch.empty(2, 2, 9, 32), Graded(((32, 4),)), impl="compiled")
        assert unpack(fake).shape == (2, 2, 9, 32)
    x = torch.randn(2, 2, 9, 32)
    assert (unpack(pack(x, Graded(((32, 4),)), impl="compiled")) - x).abs().max() < 0.5
