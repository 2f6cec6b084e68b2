"""The Triton kernel against the float64 reference: in Triton's interpreter, and on a GPU where there is one.

What is named `check_...` runs in a process of its own (tests/kernels/test_triton.py).
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from swan import Graded, Packed, TopK, pack, swan_attention
from swan.functional import reference
from swan.kernels import Recent
from swan.storage.codes import PARTS
from swan.storage.packed import mixing, unpack_mixed
from tests.kernels.gpu import DEVICE, compile_for_gpu, slow
from tests.strategies import (
    any_graded,
    assert_lse_within,
    assert_within,
    attention_bound,
    double,
    dtypes,
    ids,
    lse_bound,
    one_thread,  # noqa: F401
    qkv,
    seeds,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def kernel():
    from swan.kernels import attend_triton

    return attend_triton


# In the process of all tests ----------------------------------------------------------------------


def test_needs_a_gpu():
    packed = pack(torch.zeros(1, 1, 3, 16), Graded(((16, 4),)))
    with pytest.raises(ValueError, match="runs on a GPU, got tensors on cpu; use impl='auto'"):
        kernel().attend(torch.zeros(1, 1, 1, 16), packed, packed, None, 1.0)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # of Triton 3.9
@pytest.mark.parametrize(
    ("k_layout", "v_layout", "dtype"),
    [
        (Graded(((16, 8), (48, 5), (64, 3))), Graded(((128, 3),)), BF16),
        pytest.param(Graded(((8, 2), (8, 16))), TopK(40, 9, 4), F16, marks=pytest.mark.slow),
        pytest.param(TopK(64, 20, 8), Graded(((1, 1), (2, 6))), F32, marks=pytest.mark.slow),
    ],
    ids=["plan", "half", "float"],
)
def test_compiles_for_a_gpu(k_layout, v_layout, dtype, tmp_path, monkeypatch):
    from swan.kernels import gpu

    module = kernel()
    code = {F32: "fp32", BF16: "bf16", F16: "fp16"}[dtype]
    R, G, (products, precision) = 4, 4, module.DTYPES[dtype]
    types = {"q": code, "mask": "u8", "out": "fp32", "lse": "fp32", "k_table": "i32", "v_table": "i32"}
    types |= {"recent_q": code, "recent_keys": code, "recent_values": code, "recent_mask": "u8", "recent_out": "fp32"}
    constants = {"R": R, "G": G, "DTYPE": products, "PRECISION": precision}
    constants |= {"D": gpu.columns_of(k_layout.d), "DV": gpu.columns_of(v_layout.d)}
    for name, layout in (("k", k_layout), ("v", v_layout)):
        form = gpu.form_of(*gpu.checked_numbers(layout))
        numbers = *form.widths, form.bits, form.sparse
        constants |= dict(zip([f"{name.upper()}{i}" for i in "4210BS"], numbers, strict=True))
        value, scale = {16: (code, "u8"), 8: ("i8", "bf16"), 4: ("u8", "u8")}[form.bits]
        types |= {f"{name}_codes": "u8", f"{name}_values": value, f"{name}_scales": scale, f"{name}_positions": "u8"}
    if dtype == F32:  # history alone
        constants |= {name: None for name in types if name.startswith("recent")}
    compile_for_gpu(module.attend_kernel, types, constants, module.WARPS, tmp_path, monkeypatch)


# In the interpreter or on a GPU ---------------------------------------------------------------------


def exact(packed: Packed):
    """Unpack the stored numbers, in mixed coordinates, not rounded to the dtype of the cache."""
    return unpack_mixed(dataclasses.replace(packed, dtype=torch.float64)).double()


def inputs(k_layout, v_layout, dtype, heads=(4, 2), queries=1, tokens=130, batch=2, seed=0):
    q, k, v = qkv(seed, batch, heads, queries, tokens, k_layout.d, v_layout.d, dtype)
    k, v = pack(k, k_layout), pack(v, v_layout)
    return (q if mixing(k) is None else q @ mixing(k)), k, v


def placed(q, k, v, mask=None):
    packed = [x.map(lambda t: t.to(DEVICE)) for x in (k, v)]
    return q.to(DEVICE), *packed, None if mask is None else mask.to(DEVICE)


def compare(q, k, v, mask=None):
    scale = q.shape[-1] ** -0.5
    out, lse = (t.cpu() for t in kernel().attend(*placed(q, k, v, mask), scale))
    keys, values = exact(k), exact(v)
    expected, expected_lse = reference.dense_attention(*double(q), keys, values, mask=mask, scale=scale)
    assert out.dtype == torch.float32
    assert_within(out, expected, attention_bound(q, keys, values.to(q.dtype), scale))
    assert_lse_within(lse, expected_lse, lse_bound(q, keys, scale))
    return out, lse


@pytest.mark.parametrize("dtype", [slow(F32), BF16, slow(F16)], ids=ids)
@pytest.mark.parametrize("bits", [*PARTS, 16])
def check_every_number_of_bits(bits, dtype):
    compare(*inputs(Graded(((5, bits), (11, 4))), Graded(((9, 0), (7, bits))), dtype, tokens=40, batch=1))


@pytest.mark.parametrize(
    ("layouts", "heads", "queries", "tokens", "dtype"),
    [
        ((Graded(((5, 8), (20, 5), (15, 3))), Graded(((64, 2),))), (1, 1), 1, 130, BF16),
        ((Graded(((16, 8), (48, 5), (64, 3))), Graded(((16, 5), (112, 3)))), (8, 2), 1, 130, BF16),
        ((Graded(((3, 6), (10, 16), (3, 1))), Graded(((40, 4),))), (3, 1), 3, 17, F32),
        ((Graded(((64, 1),)), Graded(((2, 16), (12, 0), (2, 8)))), (4, 1), 3, 1, F16),
        ((Graded(((1, 5), (2, 5), (3, 5), (4, 5), (6, 5))), Graded(((1, 1),) * 17)), (3, 3), 1, 65, F32),
        ((Graded(((255, 3), (1, 16))), Graded(((256, 8),))), (2, 1), 1, 20, BF16),
        ((Graded(((16, 4),)), Graded(((16, 2),))), (40, 2), 1, 30, BF16),  # more rows than a program takes
    ],
    ids=str,
)
def check_odd_sizes(layouts, heads, queries, tokens, dtype):
    compare(*inputs(*layouts, dtype, heads, queries, tokens, batch=1 if heads[0] == 8 else 2))


@pytest.mark.parametrize("keep", [7, 40])
@pytest.mark.parametrize("bits", [4, 8, 16])
def check_topk(bits, keep):
    compare(*inputs(TopK(40, keep, bits), TopK(24, min(keep, 24), bits), BF16 if bits == 16 else F32, (3, 1), 2, 70))


def check_topk_with_graded():
    compare(*inputs(TopK(16, 5, 4), Graded(((8, 3), (8, 16))), F16))
    compare(*inputs(Graded(((8, 3), (8, 16))), TopK(130, 100, 8), F32, tokens=20))


@pytest.mark.parametrize("shape", [(2, 6), (1, 1), (2, 1)], ids=str)
def check_masks(shape):
    q, k, v = inputs(Graded(((4, 8), (12, 3))), Graded(((16, 4),)), F32, (6, 2), 3, 130)
    mask = torch.rand(*shape, 3, 130) > 0.4
    mask[:, :, 1] = False  # a row that sees nothing
    mask[..., 64:128] = False  # a tile that nothing sees
    mask[:, :, 2, 100:] = False
    out, lse = compare(q, k, v, mask)
    assert (out[:, :, 1] == 0).all()
    assert (lse[:, :, 1] == -math.inf).all()


def check_ragged_rows():
    q, k, v = inputs(Graded(((16, 5),)), Graded(((16, 3),)), BF16, queries=2, tokens=150)
    column = torch.arange(150)
    mask = torch.stack([column >= 140, column < 20])[:, None, None].expand(2, 1, 2, 150)  # a view with strides of 0
    compare(q, k, v, mask)


@pytest.mark.parametrize("masked", [slow(False), True])
@pytest.mark.parametrize(
    ("layouts", "heads", "queries", "tokens", "recents", "dtype"),
    [
        ((Graded(((8, 5), (8, 3))), Graded(((16, 4),))), (4, 2), 1, 130, 12, BF16),
        ((Graded(((5, 16), (12, 2))), TopK(20, 7, 8)), (6, 2), 3, 40, 300, F32),
        ((TopK(40, 9, 4), Graded(((33, 3),))), (1, 1), 1, 0, 5, F16),
        slow((Graded(((16, 4),)), Graded(((16, 2),))), (40, 2), 1, 30, 65, F32),  # more rows than a program takes
        ((Graded(((16, 4),)), Graded(((16, 2),))), (2, 1), 1, 3, 0, F32),
    ],
    ids=str,
)
def check_history_and_recent_tokens(layouts, heads, queries, tokens, recents, dtype, masked):
    """One softmax over both, in plain coordinates. An orthonormal mix makes an error at most sqrt(d) times as large."""
    q, k, v = qkv(0, 2, heads, queries, tokens + recents, layouts[0].d, layouts[1].d, dtype)
    k_recent, v_recent = k[:, :, tokens:], v[:, :, tokens:]  # views, as those of a buffer that is not full
    k, v = (pack(x[:, :, :tokens], layout) for x, layout in zip((k, v), layouts, strict=True))
    mask, recent_mask = (torch.rand(2, 1, queries, n) > 0.5 for n in (tokens, recents)) if masked else (None, None)
    if recent_mask is not None:
        recent_mask[0] = False
    scale = q.shape[-1] ** -0.5
    mixed, value_mix = (q if mixing(k) is None else q @ mixing(k)), mixing(v)
    values = exact(v) if value_mix is None else exact(v) @ value_mix.double().mT
    parts = [
        reference.dense_attention(mixed.double(), exact(k), values, mask=mask, scale=scale),
        reference.dense_attention(q.double(), k_recent.double(), v_recent.double(), mask=recent_mask, scale=scale),
    ]
    expected, expected_lse = reference.merge_attention(parts)
    recent = Recent(*(None if t is None else t.to(DEVICE) for t in (k_recent, v_recent, recent_mask)))
    out, lse = (t.cpu() for t in kernel().attend(*placed(q, k, v, mask), scale, recent))
    lse_limit = lse_bound(mixed, exact(k), scale) + lse_bound(q, k_recent, scale)
    largest = max([float(t.abs().max()) for t in (v_recent, values) if t.numel()])
    limit = attention_bound(mixed, exact(k), exact(v).to(dtype), scale) * values.shape[-1] ** 0.5
    limit += attention_bound(q, k_recent, v_recent, scale) + 2 * lse_limit * largest
    assert_within(out, expected, limit)
    assert_lse_within(lse, expected_lse, lse_limit)


def check_swan_attention():
    layout = Graded(((8, 5), (24, 3)))
    q, k, v = qkv(0, 2, (4, 2), 1, 90, 32, 32, F32)
    history = [pack(x[:, :, :80], layout).map(lambda t: t.to(DEVICE)) for x in (k, v)]
    q, *recent = (t.to(DEVICE) for t in (q, k[:, :, 80:], v[:, :, 80:]))
    found, expected = (swan_attention(q, *history, *recent, impl=impl) for impl in ("triton", "compiled"))
    torch.testing.assert_close(found, expected)


def check_spans(monkeypatch):
    monkeypatch.setattr(kernel(), "SPAN", 64)
    q, k, v = inputs(Graded(((16, 4),)), Graded(((16, 4),)), F32, (2, 1), tokens=600, batch=1)
    compare(q, k, v)
    mask = torch.zeros(1, 1, 1, 600, dtype=torch.bool)
    mask[..., 300] = True  # one span of 10 sees something
    compare(q, k, v, mask)


def check_nothing():
    q, k, v = inputs(Graded(((16, 4),)), Graded(((8, 4),)), BF16, tokens=0)
    out, lse = kernel().attend(*placed(q, k, v), 1.0)
    assert torch.equal(out.cpu(), torch.zeros(2, 4, 1, 8))
    assert torch.equal(lse.cpu(), torch.full((2, 4, 1), -math.inf))


def check_vectors_of_zeros_and_extremes():
    layouts = Graded(((8, 4), (8, 1))), Graded(((8, 3), (8, 8)))
    q, k, v = qkv(0, 1, (2, 1), 1, 6, 16, 16, F32)
    factor = torch.tensor([0, 1e-4, 1, 3, 1e-3, 0]).view(1, 1, 6, 1)
    k, v = (pack(x * factor * big, layout) for x, layout, big in zip((k, v), layouts, (1, 1000), strict=True))
    compare(q @ mixing(k), k, v)


def check_part_of_a_cache():
    layouts = Graded(((4, 8), (8, 3), (4, 16))), TopK(16, 5, 8)
    q, k, v = inputs(*layouts, F32, tokens=100)
    compare(q, k.tokens(0, 70), v.tokens(0, 70))
    compare(q, k.tokens(13, 14), v.tokens(13, 14))
    compare(q, k.tokens(0, 70), v.map(lambda t: t[:, :, :70].clone()))
    strided = k.map(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))
    compare(q.transpose(1, 2).contiguous().transpose(1, 2), strided, v)


def check_compiles_whole():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(kernel().attend, backend=counter, fullgraph=True)
    mask = torch.rand(1, 1, 1, 40) > 0.5
    layouts = Graded(((8, 4), (8, 2))), TopK(16, 5, 8)
    for seed in range(2):
        for seen in (None, mask):
            arguments = placed(*inputs(*layouts, F32, tokens=40, seed=seed), seen)
            for found, expected in zip(attend(*arguments, 0.25), kernel().attend(*arguments, 0.25), strict=True):
                assert torch.equal(found, expected)
    assert counter.frame_count == 2  # with and without a mask
    arguments = placed(*inputs(*layouts[::-1], F32, tokens=40))
    assert torch.equal(attend(*arguments, 0.25)[0], kernel().attend(*arguments, 0.25)[0])


def check_operator():
    from swan.kernels.gpu import checked_numbers

    module = kernel()
    q, k, v, _ = placed(*inputs(Graded(((8, 4), (8, 2))), TopK(24, 5, 8), BF16, tokens=20))
    recent = [q[:, :2].contiguous(), torch.zeros_like(q[:, :2, :, :1]).expand(-1, -1, -1, 24)]
    numbers = checked_numbers(k.format), checked_numbers(v.format)
    arguments = q, list(k.tensors), list(v.tensors), None, *numbers, 0.25, q, recent, None
    torch.library.opcheck(module._attend, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (TopK(16, 4, positions="index"), "Graded layouts, and TopK with positions='bitmap', got TopK.*'compiled'"),
        (Graded(((1, 4),) * 65), "up to 64 groups, got Graded.*join some"),
    ],
    ids=["index", "groups"],
)
def check_refuses(layout, message):
    q, k, v = inputs(layout, Graded(((16, 4),)), F32, tokens=3)
    with pytest.raises(ValueError, match=message):
        kernel().attend(*placed(q, k, v), 1.0)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    seeds, dtypes, st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 1)]), st.integers(1, 3), st.integers(1, 140), st.data()
)
def check_any_layouts(seed, dtype, heads, queries, tokens, data):
    d, dv = data.draw(st.sampled_from([(16, 16), (40, 17), (64, 96), (128, 128)]))
    layouts = data.draw(any_graded(d)), data.draw(any_graded(dv))
    compare(*inputs(*layouts, dtype, heads, queries, tokens, seed=seed))
