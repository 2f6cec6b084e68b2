"""The packing kernel against the tensor code of `Graded.pack`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Graded, KVCache, LayerPlan, TopK, pack, unpack
from tests.strategies import assert_packed, coded_layouts, dtypes, normal, seeds

pytestmark = pytest.mark.usefixtures("cpu_variant")


@given(seeds, dtypes, st.integers(1, 300), st.sampled_from([7, 24, 64, 128]).flatmap(coded_layouts), st.floats(-12, 12))
def test_packs_as_tensor_code_does(seed, dtype, tokens, layout, power):
    """Up to the roundings of a mix in float32, and at an edge, where neighbouring steps are as good."""
    x = (normal(seed, 1, 2, tokens, layout.d) * 2**power).to(dtype)
    found, expected = pack(x, layout, impl="cpp"), layout.pack(x)
    assert [t.shape for t in found.tensors] == [t.shape for t in expected.tensors]
    assert [t.dtype for t in found.tensors] == [t.dtype for t in expected.tensors]
    matrix = layout.mix(x.dtype, x.device)
    mixed = x.double() if matrix is None else x.double() @ matrix.double()
    assert_packed(found, x, mixed, rounding=layout.d * 2.0**-23 * mixed.abs().amax(-1, keepdim=True))


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e4])
def test_extremes(value):
    x = torch.full((1, 1, 2, 16), value)
    for found, expected in zip(
        pack(x, Graded(((16, 4),)), impl="cpp").tensors, Graded(((16, 4),)).pack(x).tensors, strict=True
    ):
        assert torch.equal(found, expected)


def test_other_layouts_and_dtypes_take_tensor_code():
    x, topk = torch.randn(1, 2, 5, 16), TopK(16, 5)
    assert torch.equal(unpack(pack(x, topk)), unpack(topk.pack(x)))
    layout = Graded(((16, 4),))
    wide = x.double()
    assert pack(wide, layout).dtype == torch.float64


def test_gradients_are_left_to_tensor_code():
    x = torch.randn(1, 2, 5, 16, requires_grad=True)
    assert pack(x, Graded(((8, 16), (8, 4)))).planes[1].requires_grad


@pytest.mark.parametrize(
    ("x", "layout"),
    [
        (torch.randn(1, 2, 5, 16), TopK(16, 4)),
        (torch.randn(1, 2, 5, 16).double(), Graded(((16, 4),))),
        (torch.randn(1, 2, 5, 16, requires_grad=True), Graded(((16, 4),))),
    ],
    ids=["topk", "float64", "gradients"],
)
def test_what_it_cannot_pack_is_refused(x, layout):
    with pytest.raises(ValueError, match=r"impl='cpp' packs Graded layouts, .* use impl='auto'"):
        pack(x, layout, impl="cpp")


def test_compiles_whole():
    x, layout = torch.randn(1, 2, 5, 16), Graded(((8, 16), (8, 4)))
    compiled = torch.compile(pack, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, layout).tensors, pack(x, layout).tensors, strict=True):
        assert torch.equal(found, expected)


@given(st.data(), seeds, dtypes, st.booleans())
def test_takes_tokens_in_as_buffer_and_history_do(data, seed, dtype, static):
    """To the bit: tokens, chunks, crops and evictions in any order, padded rows, layouts without codes too."""
    d = data.draw(st.sampled_from([16, 24, 64]))
    layers = coded_layouts(d) | st.integers(1, d).map(lambda keep: Graded.leading(d, keep))
    layer = LayerPlan(data.draw(layers), data.draw(layers))
    size, sinks = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))
    cache, twin = (
        KVCache(layer, buffer=size, sinks=sinks, static=static, max_length=99 * static or None) for _ in "12"
    )
    padding = data.draw(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)).map(torch.tensor))
    for step, tokens in enumerate(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))):
        k, v = normal(seed + step, 2, 2, 2, tokens, d).to(dtype)
        if static and step == 0:
            twin.allocate(k, v)
        cache.update(k, v, padding=padding if step == 0 else None, impl="cpp")
        twin.history.append(twin.buffer.push(k, v, padding if step == 0 else None), "cpp")
        stored = cache.history_length
        assert (cache.length, stored, cache.dropped) == (twin.length, twin.history_length, twin.dropped)
        found, expected = (each.state.to_dict(stored) for each in (cache, twin))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        crop, evict = data.draw(st.integers(0, 3)), 0 if static else data.draw(st.integers(0, 3))
        for each in (cache, twin):
            each.crop(max(each.length - crop, 1))
            each.evict(evict) if evict else None


def test_a_tensor_that_was_saved_for_a_backward_pass_is_not_changed_in_silence():
    cache = KVCache(LayerPlan(Graded(((16, 4),)), Graded(((16, 4),))), buffer=4, sinks=0)
    cache.update(*torch.randn(2, 1, 1, 9, 16))
    visible = cache.update(*torch.randn(2, 1, 1, 1, 16))
    scores = torch.randn(1, 1, 1, 16, requires_grad=True) * visible.k_recent
    cache.update(*torch.randn(2, 1, 1, 1, 16), impl="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_a_full_history_is_not_written_past():
    layer = LayerPlan(Graded(((16, 4),)), Graded(((16, 4),)))
    cache = KVCache(layer, buffer=2, sinks=0, static=True, max_length=4)
    cache.update(*torch.randn(2, 1, 1, 4, 16))
    before = cache.state.k_history.map(torch.clone)
    with pytest.raises(RuntimeError, match="no room"):
        cache._take_in(*torch.randn(2, 1, 1, 70, 16), None)  # compiled code does not check the length before
    assert all(torch.equal(a, b) for a, b in zip(cache.state.k_history.tensors, before.tensors, strict=True))
