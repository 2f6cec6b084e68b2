"""Tokens and rows that a cache forgets, moves or repeats."""

import pytest
import torch

from tests.modules.caches import (
    INT8,
    PLAN,
    cache_of,
    sequence,
    static_or_not,
)
from tests.strategies import (
    assert_within,
    attention_bound,
    decode,
    small_blocks,  # noqa: F401
    stored,
    windowed_oracle,
)


@static_or_not
@pytest.mark.parametrize("padding", [None, torch.tensor([3, 0])], ids=["plain", "padded"])
@pytest.mark.parametrize(("length", "kept"), [(30, 30), (30, 25), (30, 11), (30, 1), (7, 3)])
def test_crop_then_continue(length, kept, padding, static):
    """Packed tokens stay packed: the window begins where it began before the crop, until new tokens fill it."""
    q, k, v = sequence(50)
    cache = cache_of(static=static)
    decode(cache, q[:, :, :length], k[:, :, :length], v[:, :, :length], [length], padding=padding)
    cache.crop(kept)
    assert cache.length == kept
    found = decode(cache, q[:, :, kept:], k[:, :, kept:], v[:, :, kept:], [1, 9, *[1] * (40 - kept)])
    starts = (torch.arange(50) - 7).clamp(min=min(length - 8, kept))
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2, padding=padding, window_start=starts)
    assert_within(found, expected[:, :, kept:], attention_bound(q, k, v))


def test_a_rejected_draft_leaves_no_trace():
    """Fewer tokens than the buffer lacks are taken back exactly."""
    q, k, v = sequence(20)
    cache = cache_of(buffer=16)
    decode(cache, q[:, :, :10], k[:, :, :10], v[:, :, :10], [10])
    cache.update(k[:, :, 14:], v[:, :, 14:])
    cache.crop(10)
    found = decode(cache, q[:, :, 10:], k[:, :, 10:], v[:, :, 10:], [4, 6])
    expected = windowed_oracle(q, k, v, PLAN, buffer=16, sinks=2)
    assert_within(found, expected[:, :, 10:], attention_bound(q, k, v))


@static_or_not
def test_crop_to_nothing_is_a_new_cache(static):
    q, k, v = sequence(30)
    cache = cache_of(static=static)
    decode(cache, q.flip(2), k.flip(2), v.flip(2), [30], padding=torch.tensor([3, 0]))
    cache.crop(0)
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2)
    assert_within(decode(cache, q, k, v, [13, 17]), expected, attention_bound(q, k, v))


@static_or_not
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 1, 1, 2, 2]], ids=["permute", "select", "repeat"])
def test_map_batch_moves_rows(rows, padded, static):
    q, k, v = sequence(40, batch=3)
    padding = torch.tensor([3, 0, 5]) if padded else None
    cache = cache_of(INT8, static=static)
    decode(cache, q[:, :, :25], k[:, :, :25], v[:, :, :25], [25], padding=padding)
    index = torch.tensor(rows)
    cache.map_batch(lambda t: t.index_select(0, index))
    found = decode(cache, q[rows, :, 25:], k[rows, :, 25:], v[rows, :, 25:], [1, 14])
    expected = windowed_oracle(q, k, v, INT8, buffer=8, sinks=2, padding=padding)
    keys, values = (torch.cat([x, stored(x, y)], dim=2) for x, y in ((k, INT8.keys), (v, INT8.values)))
    assert_within(found, expected[rows, :, 25:], attention_bound(q, keys, values))


def test_map_batch_of_nothing():
    cache = cache_of()
    cache.map_batch(lambda t: t[:1])
    assert cache.length == 0


@static_or_not
def test_reset_is_a_new_cache(static):
    q, k, v = sequence(30)
    cache = cache_of(static=static)
    decode(cache, q, k, v, [30], padding=torch.tensor([3, 0]))
    cache.reset()
    assert (cache.length, cache.history_length, cache.nbytes, cache.dense_nbytes) == (0, 0, 0, 0)
    q, k, v = (t.bfloat16() for t in sequence(30, batch=1))
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2)
    assert_within(decode(cache, q, k, v, [30]), expected, attention_bound(q, k, v))
