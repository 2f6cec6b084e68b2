"""A `DenseBuffer` against a list of columns: the tokens that it keeps, and those that it hands out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import DenseBuffer
from swan.modules.buffer import NOWHERE, StaticBuffer
from swan.modules.state import CacheState
from tests.strategies import splits

sizes, sinks_counts = st.integers(1, 9) | st.integers(10, 40), st.integers(0, 4)


def numbered(start: int, stop: int, batch: int = 2):
    """Keys and values that say their column: keys of 3 coordinates, values of 2."""
    columns = torch.arange(start, stop, dtype=torch.float32).view(1, 1, -1, 1)
    return columns.expand(batch, 1, -1, 3).clone(), -columns.expand(batch, 1, -1, 2).clone()


def held(buffer: DenseBuffer, row: int) -> list[int]:
    """The columns that a row of the buffer shows, after a look at what lies there."""
    columns = buffer.columns().expand(2, -1)[row].tolist()
    shown = [c for c in columns if c < NOWHERE]
    for slot, column in enumerate(columns):
        if column < NOWHERE:
            assert buffer.state.k_recent[row, 0, slot].tolist() == [column] * 3
            assert buffer.state.v_recent[row, 0, slot].tolist() == [-column] * 2
    return sorted(shown)


def buffer_of(size: int, sinks: int, static: bool) -> DenseBuffer:
    return (StaticBuffer if static else DenseBuffer)(size, sinks)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@given(sizes, sinks_counts, st.integers(1, 60).flatmap(splits), st.data())
def test_holds_the_newest_and_the_first(static, size, sinks, chunks, data):
    padding = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=2, max_size=2))
    starts = padding or [0, 0]
    buffer, length, gone = buffer_of(size, sinks, static), 0, sinks
    for chunk in chunks:
        evicted = buffer.push(*numbered(length, length + chunk), None if padding is None else torch.tensor(padding))
        length += chunk
        first = max(0, length - size)
        # Out come the columns after the sinks that no longer fit the ring, oldest first.
        out = list(range(gone, max(first, gone)))
        gone = max(first, gone)
        keys, values = evicted.keys[0, 0], evicted.values[0, 0]
        if static:
            taken = evicted.places >= 0
            keys, values = keys[taken], values[taken]
            assert evicted.places[taken].tolist() == [column - sinks for column in out]
        assert keys[:, 0].tolist() == out
        assert values[:, 0].tolist() == [-column for column in out]
        for row, start in enumerate(starts):
            beginning = [c for c in range(start, start + sinks) if c < first]
            assert held(buffer, row) == sorted({*beginning, *range(first, length)})
    assert (int(buffer.state.length), int(buffer.state.first)) == (length, first)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@given(sizes, sinks_counts, st.integers(1, 50), st.data())
def test_crop_forgets_and_goes_on(static, size, sinks, length, data):
    kept, more = data.draw(st.integers(0, length)), data.draw(st.integers(1, 20))
    buffer = buffer_of(size, sinks, static)
    buffer.push(*numbered(0, length))
    first = max(0, length - size)
    buffer.crop(kept)
    first = min(first, kept)
    assert held(buffer, 0) == sorted({*range(min(sinks, first)), *range(first, kept)})
    evicted = buffer.push(*numbered(kept, kept + more))
    out = range(max(first, sinks), max(kept + more - size, first, sinks))
    keys = evicted.keys[0, 0, :, 0] if not static else evicted.keys[0, 0, evicted.places >= 0, 0]
    assert keys.tolist() == list(out)
    first = max(first, kept + more - size)
    assert held(buffer, 0) == sorted({*range(min(sinks, first)), *range(first, kept + more)})


def test_the_ring_grows_with_its_tokens():
    """From 8 slots on, twice as many whenever they are used up, until all are there; a prompt takes what it needs."""
    buffer = DenseBuffer(40, sinks=2)
    slots = []
    for column in range(60):
        buffer.push(*numbered(column, column + 1))
        slots.append(buffer.slots)
    assert slots == [8] * 8 + [16] * 8 + [32] * 16 + [40] * 28
    for tokens, expected in ((1, 8), (23, 23), (40, 40), (90, 40)):
        buffer.reset()
        buffer.push(*numbered(0, tokens))
        assert buffer.slots == expected
        assert buffer.state.k_recent.shape[2] == buffer.state.v_recent.shape[2] == 2 + expected


def test_a_crop_keeps_the_slots():
    buffer = DenseBuffer(40, sinks=2)
    buffer.push(*numbered(0, 12))
    buffer.crop(5)
    buffer.push(*numbered(5, 9))
    assert (buffer.slots, held(buffer, 0)) == (12, list(range(9)))


def test_reset_frees():
    buffer = DenseBuffer(4, 2)
    buffer.push(*numbered(0, 9), torch.tensor([1, 3]))
    buffer.reset()
    assert buffer.state == CacheState()
    buffer.push(*numbered(0, 3))
    assert held(buffer, 0) == [0, 1, 2]


def test_repr():
    assert repr(StaticBuffer(8, sinks=2)) == "StaticBuffer(size=8, sinks=2)"


@pytest.mark.parametrize(("size", "sinks"), [(0, 4), (4, -1)])
def test_refuses(size, sinks):
    with pytest.raises(ValueError, match=f"size >= 1 and sinks >= 0, got size={size}, sinks={sinks}"):
        DenseBuffer(size, sinks)
