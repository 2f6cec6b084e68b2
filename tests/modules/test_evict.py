"""Old tokens that a cache forgets."""

import pytest
import torch

from swan.functional import reference
from tests.modules.caches import (
    INT8,
    PLAN,
    cache_of,
    history,
    sequence,
)
from tests.strategies import (
    DTYPES,
    assert_within,
    attention_bound,
    decode,
    double,
    ids,
    small_blocks,  # noqa: F401
)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("padding", [None, torch.tensor([7, 0])], ids=["plain", "padded"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
def test_dropping_is_masking(prefill, masked, padding, dtype):
    """As if a mask hid the dropped columns from all later queries; sinks are seen on."""
    q, k, v = sequence(50, dtype=dtype)
    mask = (torch.rand(2, 4, 50, 50) < (0.7 if masked else 1.0)).tril()
    hidden = mask.clone()
    cache, other = cache_of(prefill=prefill), cache_of(prefill=prefill)
    start = 0
    for chunk, drop in ((20, 3), (1, 0), (9, 6), (1, 1), (19, 0)):
        now = slice(start, start + chunk)
        found, expected = (
            each(
                *(t[:, :, now] for t in (q, k, v)),
                padding=padding,
                mask=hides[:, :, now] if hides is not None else None,
            )
            for each, hides in ((cache, mask if masked else None), (other, hidden))
        )
        assert_within(found, expected, 2 * attention_bound(*double(q, k, v)) + 4 * torch.finfo(dtype).eps)
        cache.evict(drop)
        start += chunk
        hidden[:, :, start:, 2 : 2 + cache.dropped] = False
        if padding is not None:
            hidden[0, :, start:, 7:9] = mask[0, :, start:, 7:9]  # its sinks
    assert (cache.history_length, cache.dropped, other.history_length) == (30, 10, 40)


def test_dropping_more_than_there_is():
    """Tokens to be dropped that are still in the buffer are seen until they leave it, and are not stored."""
    q, k, v = sequence(50)
    cache = cache_of(prefill="windowed")
    cache.update(k[:, :, :12], v[:, :, :12])
    cache.evict(20)
    assert (cache.length, cache.history_length, cache.state.k_history) == (12, 0, None)
    decode(cache, q[:, :, 12:], k[:, :, 12:], v[:, :, 12:], [18, 2, 18])
    assert (cache.length, cache.history_length) == (50, 20)
    expected = reference.prune(k[:, :, 22:42], PLAN.keys)
    assert torch.equal(history(cache)[0], expected)


def test_dropping_frees_memory():
    cache = cache_of(INT8)
    cache(*sequence(1010))
    full, columns = cache.nbytes, cache.length
    cache.evict(0)
    assert cache.nbytes == full
    cache.evict(900)
    assert cache.nbytes < full / 4
    cache.evict(100)
    assert (cache.history_length, cache.state.k_history, cache.length) == (0, None, columns)


def test_what_was_cropped_is_not_dropped():
    """Tokens that come in the place of dropped ones are new, and kept."""
    q, k, v = sequence(50)
    cache = cache_of()
    decode(cache, q[:, :, :40], k[:, :, :40], v[:, :, :40], [40])
    cache.evict(20)
    cache.crop(15)
    assert (cache.dropped, cache.history_length) == (13, 0)
    decode(cache, q[:, :, 15:], k[:, :, 15:], v[:, :, 15:], [35])
    assert (cache.dropped, cache.history_length) == (13, 27)
    cache.crop(0)
    assert cache.dropped == 0


def test_what_is_owed_stays_owed_after_a_crop():
    """Found by tests/stateful: cropping nothing forgave the tokens that were still to be dropped."""
    _, k, v = sequence(50)
    cache = cache_of()
    cache.update(k[:, :, :12], v[:, :, :12])
    cache.evict(20)
    cache.crop(12)
    assert cache.dropped == 20
    cache.crop(9)  # one of the two that are gone, of column 2, is left, and 18 are owed
    assert cache.dropped == 20
    cache.update(k[:, :, 9:], v[:, :, 9:])
    assert (cache.length, cache.history_length) == (50, 20)
