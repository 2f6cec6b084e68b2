"""The Triton kernel that packs, in the interpreter and on a GPU: what is named `check_...` runs in a process of
its own (tests/kernels/test_triton.py)."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swan import Graded, KVCache, LayerPlan, TopK, unpack
from swan.storage.codes import PARTS, scale_of
from tests.kernels.gpu import DEVICE, compile_for_gpu, slow
from tests.strategies import any_graded, assert_packed, dtypes, ids, normal, seeds

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def pack(x, layout):
    from swan.kernels import pack_triton

    return pack_triton.store(x.to(DEVICE), layout).map(lambda t: t.cpu())


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # of Triton 3.9
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (Graded(((16, 8), (48, 5), (64, 3))), BF16),
        (Graded(((1, 6), (2, 16), (7, 0), (246, 1))), F32),
        (TopK(128, 40), BF16),
        pytest.param(TopK(64, 20, 4), F16, marks=pytest.mark.slow),
        pytest.param(TopK(256, 256), F32, marks=pytest.mark.slow),
    ],
    ids=["plan", "whole", "topk", "topk 4", "all"],
)
def test_compiles_for_a_gpu(layout, dtype, tmp_path, monkeypatch):
    from swan.kernels import gpu, pack_triton

    form, d = gpu.form_of(*gpu.checked_numbers(layout)), gpu.columns_of(layout.d)
    code = {F32: "fp32", BF16: "bf16", F16: "fp16"}[dtype]
    value, scale = {16: (code, "u8"), 8: ("i8", "bf16"), 4: ("u8", "u8")}[form.bits]
    types = dict(zip(("codes", "values", "scales", "positions"), ("u8", value, scale, "u8"), strict=True))
    constants = {name: None for name, size in zip(types, form.sizes, strict=True) if not size}
    if isinstance(layout, TopK):
        kernel, types = pack_triton.topk_kernel, types | {"x": code}
        constants |= {"D": d, "W": gpu.power_of_two(form.sizes[1]), "BITS": form.bits}
    else:
        kernel, types = pack_triton.graded_kernel, types | {"x": code, "mix": code, "table": "i32"}
        constants |= dict(zip(("W4", "W2", "W1", "W0"), form.widths, strict=True))
        constants |= {"D": d, "G": gpu.power_of_two(max(form.sizes[2], 1))}
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    compile_for_gpu(kernel, types, constants, pack_triton.WARPS, tmp_path, monkeypatch)


# In the interpreter or on a GPU ---------------------------------------------------------------------


def compare(x, layout):
    found, expected = pack(x, layout), layout.pack(x)
    assert [t.shape for t in found.tensors] == [t.shape for t in expected.tensors]
    assert [t.dtype for t in found.tensors] == [t.dtype for t in expected.tensors]
    if isinstance(layout, TopK):
        return compare_topk(found, expected, x, layout)
    mix = layout.mix(torch.float64 if x.dtype == F32 else x.dtype, x.device)
    mixed = x.double() if mix is None else x.double() @ mix.double()
    # Sums of d products in float32, and the matrix of float32 itself.
    assert_packed(found, x, mixed, rounding=(layout.d + 2) * 2.0**-24 * x.double().norm(dim=-1, keepdim=True))


def compare_topk(found, expected, x, layout):
    if found.positions is not None:
        assert torch.equal(found.positions, expected.positions)
    if layout.bits == 16:
        assert torch.equal(found.planes[0], expected.planes[0])
        return
    kept = unpack(dataclasses.replace(expected, dtype=torch.float64)) != 0
    values = unpack(dataclasses.replace(found, dtype=torch.float64)).double()
    scale = found.scales.double() if layout.bits == 8 else scale_of(found.scales).double() / 8
    assert ((values - x.double()).abs() <= scale / 2 * (1 + 1e-5))[kept].all()
    difference = found.scales.float() - expected.scales.float()
    assert (difference == 0).all() if layout.bits == 8 else (difference.abs() <= 1).all()


@pytest.mark.parametrize("dtype", [slow(F32), BF16, slow(F16)], ids=ids)
@pytest.mark.parametrize("bits", [*PARTS, 16])
def check_every_number_of_bits(bits, dtype):
    compare(normal(bits, 2, 2, 5, 40).to(dtype), Graded(((9, bits), (11, 4), (20, 0 if bits == 16 else bits))))


@pytest.mark.parametrize(
    "layout",
    [
        Graded(((16, 8), (48, 5), (64, 3))),
        Graded(((3, 6), (10, 16), (3, 1))),
        Graded(((1, 5), (2, 5), (3, 5), (4, 5), (6, 5))),
        Graded(((255, 3), (1, 16))),
        Graded.leading(17, 5),
        Graded(((256, 8),)),
    ],
    ids=str,
)
def check_odd_sizes(layout):
    compare(normal(0, 1, 3, 2, layout.d), layout)


def distinct(seed, dtype, *shape):
    """Magnitudes that differ within each vector and are exact in every dtype: which are largest is certain."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(*shape, generator=generator).argsort(-1) + 1
    return (order * torch.rand(shape, generator=generator).sub(0.5).sign() / 32).to(dtype)


@pytest.mark.parametrize("dtype", [slow(F32), BF16, slow(F16)], ids=ids)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("d", "keep"), [(16, 1), (40, 7), (130, 100), (24, 24)])
def check_topk(d, keep, bits, dtype):
    compare(distinct(d, dtype, 1, 2, 3, d), TopK(d, keep, bits))


def check_equals_are_kept_as_many():
    x = torch.ones(1, 1, 2, 16)
    assert torch.equal(unpack(pack(x, TopK(16, 5, 16))).sum(-1), torch.full((1, 1, 2), 5.0))


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e4])
@pytest.mark.parametrize("layout", [Graded(((16, 4),)), TopK(16, 16, 8), TopK(16, 16, 4)], ids=str)
def check_extremes(layout, value):
    x = torch.full((1, 1, 2, 16), value)
    for found, expected in zip(pack(x, layout).tensors, layout.pack(x).tensors, strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def check_no_tokens():
    assert pack(torch.zeros(2, 1, 0, 16), Graded(((16, 4),))).planes[0].shape == (2, 1, 0, 8)


def check_refuses():
    with pytest.raises(ValueError, match="positions='bitmap', got TopK"):
        pack(torch.zeros(1, 1, 1, 16), TopK(16, 4, positions="index"))
    with pytest.raises(ValueError, match="expected vectors"):
        pack(torch.zeros(1, 1, 1, 16), TopK(17, 4))


def check_compiles_whole():
    from swan.kernels import pack_triton

    x, layout = normal(0, 1, 2, 5, 16).to(DEVICE), Graded(((8, 16), (8, 4)))
    compiled = torch.compile(pack_triton.store, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, layout).tensors, pack_triton.store(x, layout).tensors, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("static", [False, True])
def check_cache(static):
    layer = LayerPlan(Graded(((8, 5), (8, 3))), TopK(16, 6))
    options = {"buffer": 4, "sinks": 1, "static": static, "max_length": 30 if static else None}
    caches = [KVCache(layer, **options) for _ in range(2)]
    q = normal(1, 1, 4, 1, 16)
    for tokens in (9, 1, 1):
        k, v = distinct(tokens, F32, 2, 1, 2, tokens, 16)
        visible = [
            cache.update(k.to(DEVICE), v.to(DEVICE), impl=impl)
            for cache, impl in zip(caches, ("auto", "triton"), strict=True)
        ]
    found, expected = (
        cache.attend(q.to(DEVICE), seen, impl="reference") for cache, seen in zip(caches, visible, strict=True)
    )
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)  # a step of 5 bits, where one rounds otherwise


def check_a_cache_refuses_unchanged():
    layouts = LayerPlan(TopK(16, 6), TopK(16, 6, positions="index"))
    cache = KVCache(layouts, buffer=2)
    k = torch.zeros(1, 1, 5, 16, device=DEVICE)
    with pytest.raises(ValueError, match="positions='bitmap'"):
        cache.update(k, k, impl="triton")
    assert cache.length == 0


def check_operator():
    from swan.kernels import gpu, pack_triton

    layout = Graded(((8, 16), (8, 4)))
    arguments = normal(0, 1, 2, 5, 16).to(DEVICE), layout.mix(F32, torch.device(DEVICE)), gpu.checked_numbers(layout)
    torch.library.opcheck(pack_triton._pack, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@settings(max_examples=60)
@given(seeds, dtypes, st.integers(1, 5), st.sampled_from([7, 16, 40, 128, 256]).flatmap(any_graded), st.floats(-9, 9))
def check_any_layout(seed, dtype, tokens, layout, power):
    compare((normal(seed, 1, 2, tokens, layout.d) * 2**power).to(dtype), layout)
