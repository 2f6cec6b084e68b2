"""Layers whose KV heads have layouts of their own."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Graded, KVCache, LayerPlan, TopK, dense_attention, pack, packed_attention, swan_attention, unpack
from swan.storage import ByHead
from swan.storage.by_head import at_places, by_head, parts_of, share_of
from tests.strategies import coded_layouts, normal, seeds

FEW, MORE, WHOLE = Graded(((32, 4), (32, 2))), Graded(((64, 4),)), Graded(((16, 16), (48, 0)))


def layouts(heads, d=64):
    mixed = [Graded(((d, 16),)), Graded(((d // 2, 16), (d // 4, 3), (d - d // 2 - d // 4, 0)))]
    return st.lists(coded_layouts(d) | st.sampled_from(mixed), min_size=heads, max_size=heads).map(tuple).map(by_head)


def by_hand(x, layout):
    """Heads packed and unpacked by themselves, those of one layout in one product with its mix."""
    runs, start = [], 0
    for each, heads in itertools.groupby(layout.layouts if isinstance(layout, ByHead) else [layout] * x.shape[1]):
        stop = start + len(list(heads))
        runs.append(unpack(each.pack(x[:, start:stop])))
        start = stop
    return torch.cat(runs, dim=1)


@given(layouts(4), seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_each_head_is_stored_in_its_layout(layout, seed, dtype):
    x = normal(seed, 2, 4, 9, 64, dtype=dtype)
    packed = pack(x, layout, impl="compiled")
    assert packed.shape == x.shape
    assert torch.equal(unpack(packed), by_hand(x, layout))
    assert packed.nbytes == round(2 * 9 * 4 * layout.vector_bytes(x.element_size()))
    assert sum(part.shape[1] for part in parts_of(packed)) == 4
    places = torch.tensor([0, 4, 8]).expand(2, 4, 3).clone()
    places[1, 2:] = torch.tensor([1, 2, 3])
    chosen = unpack(at_places(packed, places))
    torch.testing.assert_close(chosen, unpack(packed).gather(2, places[..., None].expand(-1, -1, -1, 64)))


@given(layouts(3), layouts(3), seeds, st.booleans())
def test_tiles_are_attended_to_head_by_head(keys, values, seed, by_head):
    """Tensor code mixes the queries of each run by themselves: as the reference, which attends to what is unpacked."""
    q = normal(seed, 2, 6, 5, 64)
    k, v = pack(normal(seed + 1, 2, 3, 70, 64), keys), pack(normal(seed + 2, 2, 3, 70, 64), values)
    mask = normal(seed + 3, 1, 6 if by_head else 1, 5, 70) < 0.7
    exact = dense_attention(q.double(), unpack(k).double(), unpack(v).double(), mask=mask, impl="reference")
    for impl in ("compiled", "sdpa", "reference"):
        found = packed_attention(q, k, v, mask=mask, impl=impl)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)


@given(layouts(3), layouts(3), seeds, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 4))
def test_attention_is_that_to_each_head_alone(keys, values, seed, dtype, queries):
    """The kernel reads all heads in one call: it gives what one call for each head gives, bit by bit."""
    q = normal(seed, 2, 6, queries, 64, dtype=dtype)
    k, v, near_k, near_v = (normal(seed + n, 2, 3, 70 if n < 3 else 5, 64, dtype=dtype) for n in range(1, 5))
    packed = pack(k, keys), pack(v, values)
    mask = normal(seed + 5, 2, 1, queries, 70) < 0.7
    found, lse = packed_attention(q, *packed, mask=mask, return_lse=True)
    both = swan_attention(q, *packed, near_k, near_v, history_mask=mask)
    for h in range(3):
        mine, head = slice(2 * h, 2 * h + 2), slice(h, h + 1)
        alone = [
            pack(x[:, head], layout.layouts[h] if isinstance(layout, ByHead) else layout)
            for x, layout in ((k, keys), (v, values))
        ]
        out, its_lse = packed_attention(q[:, mine], *alone, mask=mask, return_lse=True)
        assert torch.equal(found[:, mine], out)
        assert torch.equal(lse[:, mine], its_lse)
        near = near_k[:, head], near_v[:, head]
        assert torch.equal(both[:, mine], swan_attention(q[:, mine], *alone, *near, history_mask=mask))


def test_a_step_of_a_cache_stores_what_packing_stores():
    keys, values = ByHead((FEW, MORE, MORE)), ByHead((WHOLE, FEW, MORE))
    at_once, stepwise = (KVCache(LayerPlan(keys, values), buffer=4, sinks=2) for _ in range(2))
    k, v = torch.randn(2, 2, 3, 30, 64)
    at_once.update(k, v)
    for token in range(30):
        stepwise.update(k[:, :, token : token + 1], v[:, :, token : token + 1])
    for side in ("k_history", "v_history"):
        stored = [getattr(cache.state, side).tokens(0, 24) for cache in (at_once, stepwise)]
        for a, b in zip(stored[0].tensors, stored[1].tensors, strict=True):
            assert torch.equal(a, b)


def test_heads_in_one_layout_are_one_run():
    layout = ByHead((FEW, FEW, MORE, FEW))
    assert [(run.start, run.stop, run.layout) for run in layout.runs] == [(0, 2, FEW), (2, 3, MORE), (3, 4, FEW)]
    assert by_head([FEW, FEW]) == FEW
    assert layout == by_head([FEW, FEW, MORE, FEW])


def test_ranks_have_equal_shares():
    layer = LayerPlan(ByHead((FEW, FEW, MORE, FEW)), MORE)
    assert share_of(layer, 0, 2) == LayerPlan(FEW, MORE)
    assert share_of(layer, 1, 2) == LayerPlan(ByHead((MORE, FEW)), MORE)


def test_refuses_what_it_cannot_store():
    with pytest.raises(TypeError, match="each KV head has a Graded layout"):
        ByHead((FEW, TopK(64, 8)))
    with pytest.raises(ValueError, match="all of one head dimension"):
        ByHead((FEW, Graded(((32, 4),))))
    with pytest.raises(ValueError, match="a layout for each KV head"):
        ByHead(())
    layout = ByHead((FEW, MORE))
    with pytest.raises(ValueError, match="the layout is for 2 KV heads, got 3"):
        pack(torch.randn(1, 3, 2, 64), layout)
    cache = KVCache(LayerPlan(layout, MORE), buffer=4)
    with pytest.raises(ValueError, match="the plan stores keys of 2 KV heads, got 3"):
        cache.update(*torch.randn(2, 1, 3, 9, 64))
    assert cache.length == 0
    other = KVCache(LayerPlan(MORE, MORE), buffer=4)
    other.update(*torch.randn(2, 1, 3, 9, 64))
    with pytest.raises(ValueError, match="the plan is for 2 KV heads, the saved cache has 3"):
        cache.load_state_dict(other.state_dict())
