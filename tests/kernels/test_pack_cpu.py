"""The packing kernel against the tensor code of `Graded.pack`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Graded, TopK, pack, unpack
from tests.strategies import assert_packed, coded_layouts, dtypes, normal, seeds

pytestmark = pytest.mark.usefixtures("cpu_variant")


@given(seeds, dtypes, st.integers(1, 300), st.sampled_from([7, 24, 64, 128]).flatmap(coded_layouts), st.floats(-12, 12))
def test_packs_as_tensor_code_does(seed, dtype, tokens, layout, power):
    """Up to the roundings of a mix in float32, and at an edge, where neighbouring steps are as good."""
    x = (normal(seed, 1, 2, tokens, layout.d) * 2**power).to(dtype)
    found, expected = pack(x, layout, impl="cpp" if layout.mixed else "auto"), layout.pack(x)
    assert [t.shape for t in found.tensors] == [t.shape for t in expected.tensors]
    assert [t.dtype for t in found.tensors] == [t.dtype for t in expected.tensors]
    matrix = layout.mix(x.dtype, x.device)
    mixed = x.double() if matrix is None else x.double() @ matrix.double()
    assert_packed(found, x, mixed, rounding=layout.d * 2.0**-23 * mixed.abs().amax(-1, keepdim=True))
    if found.scales is not None and expected.scales is not None:
        assert ((found.scales.int() - expected.scales.int()).abs() <= 1).all()


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e4])
def test_extremes(value):
    x = torch.full((1, 1, 2, 16), value)
    for found, expected in zip(
        pack(x, Graded(((16, 4),)), impl="cpp").tensors, Graded(((16, 4),)).pack(x).tensors, strict=True
    ):
        assert torch.equal(found, expected)


def test_other_layouts_and_dtypes_take_tensor_code():
    x = torch.randn(1, 2, 5, 16)
    for layout in (TopK(16, 5), Graded.leading(16, 4)):
        assert torch.equal(unpack(pack(x, layout)), unpack(layout.pack(x)))
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
        (torch.randn(1, 2, 5, 16), Graded.leading(16, 4)),
        (torch.randn(1, 2, 5, 16).double(), Graded(((16, 4),))),
        (torch.randn(1, 2, 5, 16, requires_grad=True), Graded(((16, 4),))),
    ],
    ids=["topk", "whole", "float64", "gradients"],
)
def test_what_it_cannot_pack_is_refused(x, layout):
    with pytest.raises(
        ValueError, match=r"impl='cpp' packs Graded layouts with groups below 16 bits, .* use impl='auto'"
    ):
        pack(x, layout, impl="cpp")


def test_compiles_whole():
    x, layout = torch.randn(1, 2, 5, 16), Graded(((8, 16), (8, 4)))
    compiled = torch.compile(pack, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, layout).tensors, pack(x, layout).tensors, strict=True):
        assert torch.equal(found, expected)
