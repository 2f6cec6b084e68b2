"""Input that a cache refuses, and that it then stays as it was."""

import pytest
import torch

from swan import KVCache
from tests.modules.caches import (
    DV,
    PLAN,
    D,
    assert_same,
    cache_of,
    sequence,
    snapshot,
    static_or_not,
)
from tests.strategies import (
    assert_within,
    attention_bound,
    decode,
    double,
    windowed_oracle,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill": "sparse"}, "'chunk' or 'windowed', got 'sparse'"),
        ({"static": True}, "needs max_length, .* got None"),
        ({"static": True, "max_length": 0}, "needs max_length, .* got 0"),
        ({"max_length": 9}, "max_length is for static caches"),
        ({"buffer": 0}, "size >= 1"),
        ({"sinks": -1}, "sinks >= 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        KVCache(PLAN, **settings)


K, V = torch.ones(2, 2, 3, D), torch.ones(2, 2, 3, DV)


REFUSED = {
    "3d": (K[0], V, None, ValueError, r"expected keys .*, got \[2, 3, 16\]"),
    "tokens": (K, V[:, :, :2], None, ValueError, r"got \[2, 2, 3, 16\] and \[2, 2, 2, 8\]"),
    "none": (K[:, :, :0], V[:, :, :0], None, ValueError, "at least one token"),
    "keys": (K[..., :8], V, None, ValueError, "the plan stores keys of 16 coordinates, got 8"),
    "values": (K, V[..., :4], None, ValueError, "the plan stores values of 8 coordinates, got 4"),
    "int": (K.int(), V.int(), None, TypeError, "one floating-point dtype, got torch.int32"),
    "mixed": (K, V.half(), None, TypeError, "got torch.float32 and torch.float16"),
    "padding": (K, V, torch.tensor([1]), ValueError, r"left padding, \[2\], got \[1\]"),
}
REFUSED_LATER = {
    "dtype": (K.half(), V.half(), None, TypeError, r"holds torch.float32 keys, got torch.float16; reset\(\)"),
    "device": (K.to("meta"), V.to("meta"), None, ValueError, "the cache is on cpu, got keys on meta"),
    "batch": (K[:1], V[:1], None, ValueError, r"batch and heads \[2, 2\], got \[1, 2\]; reset\(\)"),
    "heads": (K[:, :1], V[:, :1], None, ValueError, r"got \[2, 1\]"),
}


@static_or_not
@pytest.mark.parametrize("case", REFUSED)
def test_an_empty_cache_refuses(case, static):
    k, v, padding, error, message = REFUSED[case]
    cache = cache_of(static=static)
    with pytest.raises(error, match=message):
        cache.update(k, v, padding=padding)
    assert cache.nbytes == 0


@static_or_not
@pytest.mark.parametrize("case", [*REFUSED, *REFUSED_LATER])
def test_a_refused_update_changes_nothing(case, static):
    k, v, padding, error, message = (REFUSED | REFUSED_LATER)[case]
    cache = cache_of(static=static)
    decode(cache, *sequence(20), [19, 1])
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        cache.update(k, v, padding=padding)
    assert_same(cache, before)


def test_a_full_static_cache_says_so():
    q, k, v = sequence(9)
    cache = cache_of(static=True, max_length=9)
    decode(cache, q, k, v, [4, 5])
    before = snapshot(cache)
    with pytest.raises(ValueError, match="holds 9 of 9 tokens, 1 more do not fit; build it with a larger max_length"):
        cache.update(K[:, :, :1], V[:, :, :1])
    assert_same(cache, before)


MASK = torch.ones(2, 4, 5, 20, dtype=torch.bool)


@static_or_not
@pytest.mark.parametrize(
    ("queries", "d", "mask", "error", "message"),
    [
        (4, D, None, ValueError, r"5 tokens were taken in, .*; got \[2, 4, 4, 16\]"),
        (5, 8, None, ValueError, r"expected q .*, got \[2, 4, 5, 8\]"),
        (5, D, MASK.float(), TypeError, r"boolean \(True = visible\), got torch.float32"),
        (5, D, MASK[0], ValueError, r"mask \[2 or 1, 4 or 1, 5, 20 or more columns\] .*, got \[4, 5, 20\]"),
        (5, D, MASK[:, :2], ValueError, r"got \[2, 2, 5, 20\]"),
        (5, D, MASK[:, :, :4], ValueError, r"got \[2, 4, 4, 20\]"),
        (5, D, MASK[..., :19], ValueError, r"got \[2, 4, 5, 19\]"),
    ],
    ids=["count", "d", "float", "3d", "heads", "queries", "columns"],
)
def test_a_refused_attend_can_be_repeated(queries, d, mask, error, message, static):
    q, k, v = sequence(20)
    cache = cache_of(static=static)
    decode(cache, q[:, :, :15], k[:, :, :15], v[:, :, :15], [15])
    visible = cache.update(k[:, :, 15:], v[:, :, 15:])
    with pytest.raises(error, match=message):
        cache.attend(torch.zeros(2, 4, queries, d), visible, mask=mask)
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2)[:, :, 15:]
    assert_within(cache.attend(q[:, :, 15:], visible), expected, attention_bound(*double(q, k, v)))


@static_or_not
@pytest.mark.parametrize(
    ("queries", "mask", "error", "message"),
    [
        (4, None, ValueError, r"5 tokens were taken in, .*; got \[2, 4, 4, 16\]"),
        (5, MASK.float(), TypeError, r"boolean \(True = visible\), got torch.float32"),
        (5, MASK[..., :19], ValueError, r"got \[2, 4, 5, 19\]"),
    ],
    ids=["count", "float", "columns"],
)
def test_a_refused_call_changes_nothing(queries, mask, error, message, static):
    q, k, v = sequence(20)
    cache = cache_of(static=static)
    decode(cache, q[:, :, :15], k[:, :, :15], v[:, :, :15], [15])
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        cache(torch.zeros(2, 4, queries, D), k[:, :, 15:], v[:, :, 15:], mask=mask)
    assert_same(cache, before)


Q = torch.ones(2, 4, 3, D)


@static_or_not
@pytest.mark.parametrize("plan_layer", [PLAN, None], ids=["history", "window"])
@pytest.mark.parametrize(
    ("q", "impl", "error", "message"),
    [
        (Q[..., :8], "auto", ValueError, r"expected q .*, got \[2, 4, 3, 8\]"),
        (Q[:, :3], "auto", ValueError, "heads a multiple of kv_heads"),
        (Q[:1], "auto", ValueError, r"got \[1, 4, 3, 16\]"),
        (Q.half(), "auto", TypeError, "q, k and v must have one dtype"),
        (Q, "fast", ValueError, "must be one of"),
        (Q, "triton", ValueError, "is gone"),
    ],
    ids=["d", "heads", "batch", "dtype", "impl", "gone"],
)
def test_queries_that_do_not_fit_change_nothing(q, impl, error, message, plan_layer, static):
    """Found by tests/stateful: the tokens were taken in before attention refused the queries."""
    cache = cache_of(plan_layer, static=static)
    decode(cache, *sequence(20), [20])
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        cache(q, K, V, impl=impl)
    assert_same(cache, before)


@static_or_not
def test_sdpa_refuses_before_anything_changes(static):
    """It has no log-sum-exp where keys and values are of different dimensions, so a history could not be merged."""
    cache = cache_of(static=static)
    decode(cache, *sequence(20), [20])
    before = snapshot(cache)
    with pytest.raises(ValueError, match="gives a log-sum-exp for keys and values of one head dimension"):
        cache(Q, K, V, impl="sdpa")
    assert_same(cache, before)


@pytest.mark.parametrize("change", ["reset", "crop", "update"])
def test_attend_follows_its_update(change):
    q, k, v = sequence(21)
    cache = cache_of()
    visible = cache.update(k[:, :, :20], v[:, :, :20])
    {"reset": cache.reset, "crop": lambda: cache.crop(19), "update": lambda: cache.update(k[:, :, 20:], v[:, :, 20:])}[
        change
    ]()
    with pytest.raises(ValueError, match="that ended at 20 tokens, the cache holds"):
        cache.attend(q[:, :, :20], visible)


@pytest.mark.parametrize("length", [-1, 21])
def test_crop_refuses(length):
    cache = cache_of()
    cache.update(*sequence(20)[1:])
    before = snapshot(cache)
    with pytest.raises(ValueError, match=f"cannot crop to {length} tokens, the cache holds 20"):
        cache.crop(length)
    assert_same(cache, before)


def test_a_static_cache_takes_its_memory_before_its_tokens():
    q, k, v = sequence(30)
    cache, other = cache_of(static=True), cache_of(static=True)
    cache.allocate(k[:, :, :0], v[:, :, :0])
    size = cache.nbytes
    assert torch.equal(decode(cache, q, k, v, [30]), decode(other, q, k, v, [30]))
    assert cache.nbytes == other.nbytes == size
    for full in (cache, cache_of()):
        with pytest.raises(ValueError, match="only an empty static cache takes its memory at once"):
            full.allocate(k, v)


@pytest.mark.parametrize(
    ("cache", "tokens", "message"),
    [
        (cache_of(static=True), 1, "a static cache keeps all its tokens; evict them from a dynamic one"),
        (cache_of(), -1, "cannot evict -1 tokens; give 0 or more"),
    ],
    ids=["static", "negative"],
)
def test_drop_refuses(cache, tokens, message):
    with pytest.raises(ValueError, match=message):
        cache.evict(tokens)
    assert cache.dropped == 0


def test_repr():
    assert "prefill='chunk', max_length=9" in repr(KVCache(None, static=True, max_length=9))
    assert "keep=6" in repr(cache_of())
