"""The C++ kernel against float64 on what is stored, at odd sizes, in every layout that it reads."""

import dataclasses
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import swan.functional.attention
from swan import Graded, TopK, pack, packed_attention, swan_attention, unpack
from swan.functional import reference
from swan.kernels import Recent, Seen, calls, cpu
from swan.storage.packed import mixing, unpack_mixed
from tests.strategies import (
    DTYPES,
    assert_lse_within,
    assert_within,
    attention_bound,
    coded_layouts,
    dtypes,
    largest_score,
    lse_bound,
    normal,
    qkv,
    seeds,
)

pytestmark = pytest.mark.usefixtures("cpu_variant")


def layouts_of(d: int):
    whole = [Graded(((d, bits),)) for bits in (1, 2, 3, 4, 5, 6, 8, 16)]
    some = Graded(((d // 4, 8), (d // 4, 5), (d - d // 4 * 2, 3)))
    odd = Graded(((3, 6), (d // 8, 16), (5, 0), (d - d // 8 - 8, 1)))
    many = Graded((*[(1, bits) for bits in (1, 2, 3, 4, 5, 6, 8, 4, 2)], (d - 9, 3)))
    topk = [TopK(d, d // 2), TopK(d, d // 3, bits=4), TopK(d, d // 2 + 1, bits=16), TopK(d, d), TopK(d, d, bits=4)]
    return [*whole, some, odd, many, Graded.leading(d, d // 2), Graded(((d // 2, 2), (d - d // 2, 0))), *topk]


def wide(packed):
    """Unpack the stored numbers, in mixed coordinates, without rounding."""
    return unpack_mixed(dataclasses.replace(packed, dtype=torch.float64)).double()


def mix(packed):
    """The matrix that mixes a layout's coordinates, in float64."""
    matrix = mixing(packed)
    return (torch.eye(packed.format.d) if matrix is None else matrix).double()


def is_exact(dtype) -> bool:
    """Tell whether nothing is rounded beyond the dtype: with AVX-512 in float32, and through tiles of floats."""
    return (dtype == torch.float32 and cpu.variant() != "avx2") or cpu.variant() == "generic"


def bounds(q, keys, values):
    """Bound output and log-sum-exp: the bounds of other implementations, and the roundings that only the kernel does.

    Queries are rounded to 2**-15 of their largest coordinate, weights times scales to 2**-15 of their largest in 64
    tokens, and a scale is at most 2**(1/8) times the largest coordinate.
    """
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    score = lse_bound(q, keys) + q.shape[-1] ** -0.5 * float(q.abs().max()) * 2.0**-15 * float(keys.abs().sum(-1).max())
    own = 0.0 if is_exact(q.dtype) else 2 * (score - lse_bound(q, keys)) + 64 * 2.0**-15 * 2 ** (1 / 8)
    largest = float(values.double().abs().max())
    return attention_bound(q, keys, values) + own * largest, score


def check(seed, dtype, head_counts, queries, tokens, keys, values, kind):
    q, k, v = qkv(seed, 2, head_counts, queries, tokens, keys.d, keys.d, dtype)
    k, v = pack(k, keys), pack(normal(seed + 9, 2, head_counts[1], tokens, values.d).to(dtype), values)
    mask = None
    if kind != "none":
        mask = torch.rand(2, head_counts[0], queries, tokens, generator=torch.Generator().manual_seed(seed)) > 0.5
        mask[0, 0, 0] = False
        mask = mask[:, :1] if kind == "same for all heads" else mask
    mixed, stored = q.double() @ mix(k), (wide(k), wide(v))
    expected, expected_lse = reference.dense_attention(mixed, *stored, mask=mask)
    out, lse = calls.attend(q, k, v, mask, q.shape[-1] ** -0.5)
    assert out.dtype == torch.float32
    limit, lse_limit = bounds(mixed.to(dtype), *stored)
    assert_within(out.double() @ mix(v), expected, limit)  # in the coordinates in which values are stored
    assert_lse_within(lse, expected_lse, lse_limit)


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2))])
@pytest.mark.parametrize("tokens", [1, 17, 330])
@pytest.mark.parametrize("d", [16, 40, 64, 128, pytest.param(256, marks=pytest.mark.slow)])
def test_every_layout(d, tokens, turn):
    """Each layout in each dtype, at three lengths in turn; `make test-all` takes all dtypes at each."""
    layouts = layouts_of(d)
    for i, keys in enumerate(layouts):
        dtype = DTYPES[(i + tokens + turn) % len(DTYPES)]
        values = layouts[(5 * i + 3) % len(layouts)]
        check(i, dtype, (6, 2), 1, tokens, keys, values, "none")
        check(i, dtype, (2, 2), 3, tokens, keys, values, "by head")


@given(
    seeds,
    dtypes,
    st.sampled_from([(1, 1), (4, 1), (9, 3), (40, 2)]),
    st.integers(1, 4),
    st.integers(1, 200),
    st.sampled_from([24, 64, 96]).flatmap(coded_layouts),
    st.sampled_from([20, 64, 128]).flatmap(coded_layouts),
    st.sampled_from(["none", "by head", "same for all heads"]),
)
def test_any_groups(seed, dtype, head_counts, queries, tokens, keys, values, kind):
    check(seed, dtype, head_counts, queries, tokens, keys, values, kind)


@given(
    seeds,
    dtypes,
    st.sampled_from([(1, 1), (4, 1), (9, 3), (40, 2)]),
    st.integers(1, 3),
    st.integers(0, 200),
    st.integers(1, 70),
    st.sampled_from([24, 64, 96]).flatmap(coded_layouts),
    st.sampled_from([20, 64, 128]).flatmap(coded_layouts),
    st.booleans(),
)
def test_history_and_recent_tokens_together(seed, dtype, head_counts, queries, tokens, recent, keys, values, masked):
    """One softmax over both, in plain coordinates. An orthonormal mix makes an error at most sqrt(d) times as large."""
    q, k, k_recent = qkv(seed, 2, head_counts, queries, tokens + recent, keys.d, keys.d, dtype)
    v, v_recent = normal(seed + 9, 2, 2 * head_counts[1], tokens + recent, values.d).to(dtype).chunk(2, dim=1)
    k, v = pack(k[:, :, :tokens], keys), pack(v[:, :, :tokens], values)
    k_recent, v_recent = k_recent[:, :, tokens:], v_recent[:, :, tokens:]
    generator = torch.Generator().manual_seed(seed)
    mask, recent_mask = (torch.rand(2, 1, queries, n, generator=generator) > 0.5 for n in (tokens, recent))
    recent_mask[0] = False
    mask, recent_mask = (mask, recent_mask) if masked else (None, None)

    mixed, stored = q.double() @ mix(k), (wide(k), wide(v))
    parts = [
        reference.dense_attention(mixed, stored[0], stored[1] @ mix(v).mT, mask=mask),
        reference.dense_attention(q.double(), k_recent.double(), v_recent.double(), mask=recent_mask),
    ]
    expected, expected_lse = reference.merge_attention(parts)

    out, lse = calls.attend(q, k, v, mask, keys.d**-0.5, Recent(k_recent, v_recent, recent_mask))
    limit, lse_limit = bounds(mixed.to(dtype), *stored) if tokens else (0.0, 0.0)
    lse_limit += lse_bound(q, k_recent)
    largest = max(float(v_recent.abs().max()), values.d**0.5 * float(stored[1].abs().max()) if tokens else 0.0)
    limit = values.d**0.5 * limit + attention_bound(q, k_recent, v_recent) + 2 * lse_limit * largest
    assert_within(out, expected, limit)
    assert_lse_within(lse, expected_lse, lse_limit)


def together(q, k, v, k_recent, v_recent, masks=(None, None)):
    """Compute `swan_attention` in float64: history and recent tokens by the reference, merged by the definition."""
    stored = (unpack(dataclasses.replace(packed, dtype=torch.float64)).double() for packed in (k, v))
    parts = [
        reference.dense_attention(q.double(), *stored, mask=masks[0]),
        reference.dense_attention(q.double(), k_recent.double(), v_recent.double(), mask=masks[1]),
    ]
    return reference.merge_attention(parts)[0]


def assert_close(found, expected):
    """To the roundings of float32 numbers of like one, or of queries and weights of two bytes."""
    torch.testing.assert_close(found.double(), expected, atol=1e-5 if is_exact(torch.float32) else 2e-4, rtol=0)


@pytest.mark.parametrize("layout", [Graded(((64, 4),)), Graded.leading(64, 16), TopK(64, 20)], ids=str)
def test_an_empty_history_beside_recent_tokens(layout):
    q, recent = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 5, 64)
    empty = pack(torch.randn(2, 2, 0, 64), layout)
    found = swan_attention(q, empty, empty, recent, recent, impl="cpp")
    assert_close(found, together(q, empty, empty, recent, recent))


def test_recent_tokens_and_masks_of_any_strides():
    layout = Graded(((64, 4),))
    q, k, v = qkv(0, 2, (6, 2), 2, 90, 64, 64, torch.float32)
    history = pack(k[:, :, :80], layout), pack(v[:, :, :80], layout)
    recent = [t[:, :, 80:].transpose(2, 3).contiguous().transpose(2, 3) for t in (k, v)]
    masks = [(torch.rand(n, 2, 1, 1) > 0.3).permute(2, 3, 1, 0) for n in (80, 10)]
    found = swan_attention(q, *history, *recent, history_mask=masks[0], buffer_mask=masks[1], impl="cpp")
    assert_close(found, together(q, *history, *recent, masks))


def test_what_does_not_fit_one_call_is_merged(monkeypatch):
    layout = Graded(((64, 4),))
    q, k, v = qkv(0, 1, (4, 2), 1, 90, 64, 64, torch.float32)
    history = pack(k[:, :, :80], layout), pack(v[:, :, :80], layout)
    counts, attend = [], calls.attend
    monkeypatch.setattr(calls, "attend", lambda *a: counts.append(len(a)) or attend(*a))
    for heads in (2, 1):  # as many KV heads as the history has, and fewer
        recent = k[:, :heads, 80:], v[:, :heads, 80:]
        assert_close(swan_attention(q, *history, *recent), together(q, *history, *recent))
    k_recent, v_recent = (t[:, :, 80:].clone().requires_grad_() for t in (k, v))
    swan_attention(q, *history, k_recent, v_recent).sum().backward()
    assert counts == [6, 5, 5]
    assert k_recent.grad is not None and v_recent.grad is not None
    with pytest.raises(ValueError, match="keys hold 80 tokens and values 79"):
        swan_attention(q, history[0], history[1].tokens(0, 79), k[:, :, 80:], v[:, :, 80:])


@given(
    st.none() | st.lists(st.integers(0, 200), min_size=2, max_size=2),
    st.none() | st.lists(st.integers(0, 200), min_size=3, max_size=3) | st.integers(0, 200),
    st.integers(0, 40),
)
def test_tokens_seen_as_numbers(first, end, start):
    """The same as the booleans that the numbers mean, in one call of the kernel and in tiles of tensor code."""
    if first is None and end is None:
        return
    q, k, v = qkv(1, 2, (4, 2), 3, 150, 64, 64, torch.float32)
    k, v = pack(k, Graded(((64, 4),))), pack(v, Graded(((64, 5),)))
    seen = Seen(*(None if n is None else torch.tensor(n) for n in (first, end)), start)
    mask = seen.mask(150).expand(-1, -1, 3, -1)
    for b in range(mask.shape[0]):
        for i in range(3):
            low = 0 if first is None else first[b] - start
            high = 150 if end is None else (end if isinstance(end, int) else end[i]) - start
            assert mask[b, 0, i].tolist() == [low <= t < high for t in range(150)]
    found, lse = packed_attention(q, k, v, mask=seen, impl="cpp", return_lse=True)
    expected, expected_lse = packed_attention(q, k, v, mask=mask, impl="cpp", return_lse=True)
    assert_close(found, expected.double())
    assert_lse_within(lse, expected_lse.double(), 1e-4)
    expected, expected_lse = packed_attention(q, k, v, mask=mask, impl="compiled", return_lse=True)
    for tile in (1024, 32):  # tiles of which all is seen, a part, or nothing
        with patch.object(swan.functional.attention, "TILE", tile):
            tiles, lse = packed_attention(q, k, v, mask=seen, impl="compiled", return_lse=True)
        assert_close(tiles, expected.double())
        assert_lse_within(lse, expected_lse.double(), 1e-4)


def test_numbers_of_seen_tokens_that_do_not_fit_are_refused():
    q, k, v = qkv(1, 2, (4, 2), 3, 150, 64, 64, torch.float32)
    k, v = pack(k, Graded(((64, 4),))), pack(v, Graded(((64, 5),)))
    wrong = Seen(torch.zeros(3, dtype=torch.long), None, 0), Seen(None, torch.zeros(2, dtype=torch.long), 0)
    for seen in (*wrong, Seen(torch.zeros(2), None, 0)):
        with pytest.raises(ValueError, match=r"Seen needs (first|end) with"):
            packed_attention(q, k, v, mask=seen)
    with pytest.raises(ValueError, match="queries see all"):
        Seen(None, None, 0).mask(3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_queries_that_are_not_finite_show(value):
    q, k, v = qkv(0, 1, (4, 2), 1, 90, 64, 64, torch.bfloat16)
    q[0, 1, 0, 3] = value
    out, lse = calls.attend(q, pack(k, Graded(((64, 4),))), pack(v, Graded(((64, 4),))), None, 1.0)
    assert not out[0, 1].isfinite().any() and lse[0, 1].isnan()
    assert out[0, [0, 2, 3]].isfinite().all()


def test_tokens_and_sizes_of_whole_spans():
    for tokens in (64, 65, 128):
        for groups in (((63, 3), (64, 5), (65, 0), (63, 6)), ((101, 1), (3, 8), (88, 2), (64, 4))):
            check(tokens, torch.bfloat16, (4, 1), 1, tokens, Graded(groups), Graded(groups[::-1]), "by head")


def test_no_tokens():
    q, k, v = qkv(0, 1, (4, 2), 1, 0, 64, 64, torch.float32)
    layout = Graded(((64, 4),))
    out, lse = calls.attend(q, pack(k, layout), pack(v, layout), None, 1.0)
    assert torch.equal(out, torch.zeros(1, 4, 1, 64))
    assert (lse == -math.inf).all()


def test_large_scores():
    """Scores of hundreds, of which one token has all the weight."""
    q, k, v = qkv(0, 1, (4, 2), 1, 300, 64, 64, torch.float32)
    k, v = pack(30 * k, Graded(((64, 8),))), pack(v, Graded(((64, 4),)))
    mixed, stored = q.double() @ mix(k), (wide(k), wide(v))
    assert largest_score(mixed, stored[0]) > 200
    expected, _ = reference.dense_attention(mixed, *stored)
    out, _ = calls.attend(q, k, v, None, 64**-0.5)
    assert_within(out.double() @ mix(v), expected, bounds(mixed.float(), *stored)[0])


def test_views_of_a_larger_history():
    """A growing history has room: its tokens are a view with strides of its own."""
    q, k, v = qkv(0, 2, (4, 2), 1, 200, 64, 64, torch.bfloat16)
    whole = pack(k, Graded(((16, 8), (48, 3)))), pack(v, TopK(64, 20))
    views = [packed.tokens(30, 130) for packed in whole]
    copies = [packed.map(torch.Tensor.contiguous) for packed in views]
    for found, expected in zip(calls.attend(q, *views, None, 0.1), calls.attend(q, *copies, None, 0.1), strict=True):
        assert torch.equal(found, expected)


def test_compiles_whole():
    q, k, v = qkv(0, 1, (4, 2), 1, 90, 32, 32, torch.float32)
    history = pack(k, Graded(((32, 5),))), pack(v, Graded(((32, 3),)))

    def function(q, k, v):
        return packed_attention(q, k, v)  # "auto" takes the kernel here too

    def named(q, k, v):
        return packed_attention(q, k, v, impl="cpp")

    for each in (function, named):
        compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, *history), packed_attention(q, *history, impl="cpp"))


def test_what_it_cannot_read_is_refused():
    q, k, v = qkv(0, 1, (4, 2), 1, 9, 32, 32, torch.float32)
    indexed, fine = pack(k, TopK(32, 5, positions="index")), pack(v, TopK(32, 5))
    for keys, values in ((indexed, fine), (fine, indexed)):
        with pytest.raises(
            ValueError, match=r"attends to Graded, also by head, and TopK with a bitmap, .* not .*; use impl='auto'"
        ):
            packed_attention(q, keys, values, impl="cpp")
    exact = dataclasses.replace(fine, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not to .* with torch\.float64;"):
        packed_attention(q.double(), exact, exact, impl="cpp")
