"""Attention in every implementation against the float64 reference, dense, packed, merged and mixed."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import TopK, dense_attention, merge_attention, pack, packed_attention, swan_attention, unpack
from swan.functional import attention, reference
from tests.compilers import needs_cxx
from tests.strategies import (
    DTYPES,
    HEADS,
    U32,
    assert_lse_within,
    assert_within,
    attention_bound,
    double,
    dtypes,
    heads,
    ids,
    largest_score,
    layouts,
    lse_bound,
    qkv,
    seeds,
    unit,
)

IMPLS = ["reference", "sdpa", "compiled"]
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_packed_impl = pytest.mark.parametrize("impl", [*IMPLS, "auto"])  # auto: the kernel of the CPU where it serves
counts = st.integers(1, 9)
masks = st.sampled_from(["none", "random", "per head", "blind rows", "causal", "causal and random"])
scales = st.sampled_from([None, 0.3])


def as_read(packed, impl):
    """Unpack the numbers that an implementation multiplies: for "auto", which may be the kernel, without rounding."""
    return unpack(dataclasses.replace(packed, dtype=torch.float64) if impl == "auto" else packed).double()


def read_bounds(impl, q, k, v, scale):
    """By how much an output and a log-sum-exp may be off from `as_read`: "auto" may round to the dtype or not."""
    if impl != "auto" or 0 in v.shape:
        return 0.0, 0.0
    score = unit(q.dtype) * largest_score(q, k, scale)
    return (2 * score + unit(q.dtype)) * float(v.abs().max()), score


def mask_of(kind: str, seed: int, batch: int, count: int, queries: int, tokens: int):
    """A mask and whether it is causal besides."""
    if kind in ("none", "causal"):
        return None, kind == "causal"
    random = torch.rand(batch, count, queries, tokens, generator=torch.Generator().manual_seed(seed))
    mask = random > 0.4
    if kind != "per head":
        mask = mask[:1, :1]
    if kind == "blind rows":
        mask[:, :, ::2] = False
    return mask, kind.startswith("causal")


# Dense --------------------------------------------------------------------------------------------


@every_impl
@given(seeds, dtypes, heads, masks, counts, counts, st.sampled_from([8, 17, 64]), scales)
def test_dense_is_its_reference(impl, seed, dtype, head_counts, kind, queries, tokens, d, scale):
    q, k, v = qkv(seed, 2, head_counts, queries, tokens, d, d, dtype)
    mask, causal = mask_of(kind, seed, 2, head_counts[0], queries, tokens)
    expected, expected_lse = reference.dense_attention(*double(q, k, v), mask=mask, causal=causal, scale=scale)
    out, lse = dense_attention(q, k, v, mask=mask, causal=causal, scale=scale, impl=impl, return_lse=True)
    alone = dense_attention(q, k, v, mask=mask, causal=causal, scale=scale, impl=impl)
    assert out.dtype == alone.dtype == dtype
    assert_within(out, expected, attention_bound(q, k, v, scale))
    assert_within(alone, expected, attention_bound(q, k, v, scale))
    assert_lse_within(lse, expected_lse, lse_bound(q, k, scale, impl))


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("queries", "tokens", "dv"), [(63, 100, 17), (1, 257, 16), (100, 63, 40)])
@pytest.mark.parametrize("head_counts", HEADS, ids=str)
def test_odd_sizes_and_other_values(head_counts, queries, tokens, dv, dtype, impl):
    q, k, v = qkv(0, 2, head_counts, queries, tokens, 16, dv, dtype)
    expected, _ = reference.dense_attention(*double(q, k, v), causal=True)
    found = dense_attention(q, k, v, causal=True, impl=impl)
    assert_within(found, expected, attention_bound(q, k, v))


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("which", ["q", "k", "v", "mask"])
def test_tensors_may_lie_in_memory_in_any_order(which, return_lse, impl):
    q, k, v = qkv(0, 2, (4, 2), 5, 40, 16, 16, torch.float32)
    tensors = {"q": q, "k": k, "v": v, "mask": mask_of("random", 0, 2, 1, 5, 40)[0]}
    expected, expected_lse = reference.dense_attention(*double(q, k, v), mask=tensors["mask"])
    x = tensors[which]
    for order in ((3, 2, 1, 0), (0, 3, 1, 2)):
        back = [order.index(axis) for axis in range(4)]
        moved = tensors | {which: x.permute(order).contiguous().permute(back)}
        found = dense_attention(**moved, impl=impl, return_lse=return_lse)
        assert_within(found[0] if return_lse else found, expected, attention_bound(q, k, v))
        if return_lse:
            assert_lse_within(found[1], expected_lse, lse_bound(q, k))


def test_coordinates_that_are_one_number_in_memory():
    q, k, v = qkv(0, 2, (4, 2), 5, 40, 16, 16, torch.float32)
    same = [t[..., :1].expand(t.shape) for t in (q, k, v)]
    expected, _ = reference.dense_attention(*double(*same))
    found, _ = dense_attention(*same, return_lse=True)
    assert_within(found, expected, attention_bound(*same))


@every_impl
def test_rows_that_see_nothing(impl):
    q, k, v = qkv(0, 1, (4, 2), 5, 3, 16, 16, torch.float32)  # causal: the first two of five see none of three
    out, lse = dense_attention(q, k, v, causal=True, impl=impl, return_lse=True)
    assert torch.equal(out[:, :, :2], torch.zeros(1, 4, 2, 16))
    assert (lse[:, :, :2] == -math.inf).all()
    assert lse[:, :, 2:].isfinite().all()
    assert torch.equal(dense_attention(q, k, v, causal=True, impl=impl)[:, :, :2], out[:, :, :2])


def test_rows_that_see_nothing_are_zero_whatever_a_kernel_of_torch_gives(monkeypatch):
    """Some fill them with the mean of the values, some with NaN."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def filling(*tensors, attn_mask, **settings):
        return torch.where(attn_mask.any(-1, keepdim=True), sdpa(*tensors, attn_mask=attn_mask, **settings), math.nan)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", filling)
    q, k, v = qkv(0, 1, (4, 2), 5, 3, 16, 16, torch.float32)
    expected, _ = reference.dense_attention(*double(q, k, v), causal=True)
    assert_within(dense_attention(q, k, v, causal=True, impl="sdpa"), expected, attention_bound(q, k, v))


@pytest.mark.parametrize("impl", [*IMPLS, "flex", "auto"])
def test_no_keys(impl):
    q, k, v = qkv(0, 1, (4, 2), 5, 0, 16, 8, torch.float32)
    out, lse = dense_attention(q, k, v, impl=impl, return_lse=True)
    assert torch.equal(out, torch.zeros(1, 4, 5, 8))
    assert torch.equal(lse, torch.full((1, 4, 5), -math.inf))


@every_impl
def test_gradients_are_the_reference_ones(impl):
    q, k, v = qkv(0, 2, (4, 2), 5, 7, 16, 16, torch.float32)
    mask, _ = mask_of("blind rows", 0, 2, 4, 5, 7)

    def gradients(attend, inputs):
        inputs = [t.requires_grad_() for t in inputs]
        return torch.autograd.grad(attend(*inputs).square().sum(), inputs)

    # A gradient sums over d coordinates twice and over the queries of a group (or over weights, which sum to 1)
    # products of a weight, two outputs or values, and a query or key; each factor has the forward's relative error.
    peak = max(1.0, float(q.abs().max()), float(k.abs().max())) * float(v.abs().max()) ** 2
    bound = 4 * 16**0.5 * 5 * 2 * peak * (4 * attention_bound(q, k, v) / float(v.abs().max()) + 2 * 16 * U32)
    expected = gradients(lambda *t: reference.dense_attention(*t, mask=mask)[0], double(q, k, v))
    found = gradients(lambda *t: dense_attention(*t, mask=mask, impl=impl), (q, k, v))
    for name, a, b in zip("qkv", found, expected, strict=True):
        assert_within(a, b, bound, name)


@needs_cxx
@pytest.mark.slow
def test_flex_is_its_reference():
    torch.use_deterministic_algorithms(False)  # compiled C++ fills nothing
    for kind, queries, tokens in [("none", 5, 33), ("blind rows", 5, 33), ("causal", 33, 20)]:
        q, k, v = qkv(0, 2, (4, 2), queries, tokens, 16, 16, torch.float32)
        mask, causal = mask_of(kind, 0, 2, 4, queries, tokens)
        expected, _ = reference.dense_attention(*double(q, k, v), mask=mask, causal=causal)
        found = dense_attention(q, k, v, mask=mask, causal=causal, impl="flex")
        assert_within(found, expected, attention_bound(q, k, v), kind)


# Packed and merged --------------------------------------------------------------------------------


@every_packed_impl
@given(
    seeds, dtypes, heads, masks.filter(lambda kind: "causal" not in kind), counts, st.integers(0, 40), scales, st.data()
)
def test_packed_is_dense_on_the_unpacked(impl, seed, dtype, head_counts, kind, queries, tokens, scale, data):
    q, k, v = qkv(seed, 2, head_counts, queries, tokens, 16, 16, dtype)
    k, v = pack(k, data.draw(layouts(16))), pack(v, data.draw(layouts(16)))
    mask, _ = mask_of(kind, seed, 2, head_counts[0], queries, tokens)
    keys, values = as_read(k, impl), as_read(v, impl)
    expected, expected_lse = reference.dense_attention(q.double(), keys, values, mask=mask, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE", 7)
        out, lse = packed_attention(q, k, v, mask=mask, scale=scale, impl=impl, return_lse=True)
        assert torch.equal(out, packed_attention(q, k, v, mask=mask, scale=scale, impl=impl))
    assert out.dtype == dtype
    more, more_lse = read_bounds(impl, q, keys, values, scale)
    assert_within(out, expected, attention_bound(q, unpack(k), unpack(v), scale) + more)
    assert_lse_within(lse, expected_lse, lse_bound(q, unpack(k), scale, impl) + more_lse)


@every_packed_impl
@pytest.mark.parametrize("tokens", [1024, 1025, 2500])
def test_packed_over_tiles(tokens, impl):
    q, k, v = qkv(0, 1, (4, 2), 3, tokens, 63, 32, torch.float32)
    k, v = pack(k, TopK(63, 20)), pack(v, TopK(32, 32, bits=16))
    impl = "auto" if impl == "sdpa" else impl  # sdpa has no log-sum-exp for another dv
    expected, _ = reference.dense_attention(*double(q, unpack(k), unpack(v)))
    assert_within(packed_attention(q, k, v, impl=impl), expected, attention_bound(q, unpack(k), unpack(v)))


@given(seeds, dtypes, heads, counts, st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
def test_merging_parts_is_exact(seed, dtype, head_counts, queries, sizes):
    q, k, v = qkv(seed, 2, head_counts, queries, sum(sizes), 16, 16, dtype)
    parts = [
        dense_attention(q, *pair, impl="compiled", return_lse=True)
        for pair in zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True)
    ]  # a part of size 0 has an lse of minus infinity
    expected, expected_lse = reference.dense_attention(*double(q, k, v))
    out, lse = merge_attention(parts)
    assert out.dtype == dtype
    assert_within(out, expected, attention_bound(q, k, v))
    assert_lse_within(lse, expected_lse, lse_bound(q, k))
    wide, wide_lse = reference.merge_attention([double(*part) for part in parts])
    assert_within(out, wide, attention_bound(q, k, v))
    assert_lse_within(lse, wide_lse, lse_bound(q, k))


def test_merging_nothing_with_nothing():
    nothing = torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3), -math.inf)
    out, lse = merge_attention([nothing, nothing])
    assert torch.equal(out, nothing[0])
    assert torch.equal(lse, nothing[1])


# History and buffer together ----------------------------------------------------------------------


@every_packed_impl
@given(
    seeds, dtypes, heads, masks.filter(lambda kind: "causal" not in kind), counts, st.integers(0, 20), scales, st.data()
)
def test_swan_is_attention_over_all(impl, seed, dtype, head_counts, kind, queries, tokens, scale, data):
    recent = data.draw(counts)
    q, k, v = qkv(seed, 2, head_counts, queries, tokens + recent, 16, 16, dtype)
    history = pack(k[:, :, :tokens], data.draw(layouts(16))), pack(v[:, :, :tokens], data.draw(layouts(16)))
    keys, values = (
        torch.cat([as_read(packed, impl), x[:, :, tokens:].double()], dim=2)
        for packed, x in zip(history, (k, v), strict=True)
    )
    mask, _ = mask_of(kind, seed, 2, head_counts[0], queries, tokens + recent)
    seen = (None, None) if mask is None else (mask[..., :tokens], mask[..., tokens:])
    expected, _ = reference.dense_attention(q.double(), keys, values, mask=mask, scale=scale)
    arguments = q, *history, k[:, :, tokens:], v[:, :, tokens:]
    out = swan_attention(*arguments, history_mask=seen[0], buffer_mask=seen[1], scale=scale, impl=impl)
    assert out.dtype == dtype
    more, _ = read_bounds(impl, q, keys, values, scale)
    assert_within(out, expected, attention_bound(q, keys.to(dtype), values.to(dtype), scale) + more)


def test_swan_without_history_is_dense():
    q, k, v = qkv(0, 2, (4, 2), 3, 9, 16, 16, torch.float32)
    mask, _ = mask_of("per head", 0, 2, 4, 3, 9)
    expected, _ = reference.dense_attention(*double(q, k, v), mask=mask, scale=0.3)
    found = swan_attention(q, None, None, k, v, buffer_mask=mask, scale=0.3)
    assert_within(found, expected, attention_bound(q, k, v, 0.3))


@every_packed_impl
def test_permuted_rows_give_permuted_rows(impl):
    q, k, v = qkv(0, 3, (4, 2), 3, 40, 16, 16, torch.float32)
    rows = torch.tensor([2, 0, 1])

    def run(q, k, v):
        history = pack(k[:, :, :30], TopK(16, 5)), pack(v[:, :, :30], TopK(16, 9))
        return swan_attention(q, *history, k[:, :, 30:], v[:, :, 30:], impl=impl)

    assert_within(run(q[rows], k[rows], v[rows]), run(q, k, v)[rows], 2 * attention_bound(q, k, v))


# Errors -------------------------------------------------------------------------------------------

Q, K, V = torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 8)
MASK = torch.ones(2, 4, 3, 5, dtype=torch.bool)
PACKED = pack(K, TopK(16, 8))


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (([1.0], K, V), {}, ValueError, "q must be a tensor .*, got list"),
        ((Q, K[0], V), {}, ValueError, r"k must be a tensor .*, got \[2, 5, 16\]"),
        ((Q[:, :3], K, V), {}, ValueError, r"heads a multiple of kv_heads, got \[2, 3, 3, 16\]"),
        ((Q[:1], K, V), {}, ValueError, r"got \[1, 4, 3, 16\], \[2, 2, 5, 16\], \[2, 2, 5, 8\]"),
        ((Q, K[..., :8], V), {}, ValueError, r"got .*\[2, 2, 5, 8\]"),
        ((Q, K, V[:, :, :4]), {}, ValueError, r"got .*\[2, 2, 4, 8\]"),
        ((Q, K.half(), V), {}, TypeError, "one dtype, got torch.float32, torch.float16, torch.float32"),
        ((Q, K.to("meta"), V), {}, ValueError, "one device, got cpu, meta, cpu"),
        ((Q, K, V), {"mask": MASK.float()}, TypeError, r"boolean \(True = visible\), got torch.float32"),
        ((Q, K, V), {"mask": MASK[0]}, ValueError, r"mask \[2 or 1, 4 or 1, 3, 5\], got \[4, 3, 5\]"),
        ((Q, K, V), {"mask": MASK[:, :2]}, ValueError, r"got \[2, 2, 3, 5\]"),
        ((Q, K, V), {"mask": MASK[..., :4]}, ValueError, r"got \[2, 4, 3, 4\]"),
        ((Q, K, V), {"impl": "cuda"}, ValueError, "auto, reference, sdpa, flex, compiled, got 'cuda'"),
        ((Q, K, V), {"impl": "sdpa", "return_lse": True}, ValueError, r"16 and 8, .*use impl='compiled'"),
        ((Q, K, V), {"impl": "flex", "return_lse": True}, ValueError, "no log-sum-exp on the CPU"),
        ((Q.clone().requires_grad_(), K, V), {"impl": "flex"}, ValueError, "flex' is for inference"),
    ],
)
def test_dense_refuses(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        dense_attention(*arguments, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed_attention(Q, PACKED, PACKED, impl="flex"), "no gather by token; use 'auto' or 'compiled'"),
        (lambda: packed_attention(Q, PACKED, PACKED.tokens(0, 4)), "keys hold 5 tokens and values 4"),
        (lambda: packed_attention(Q, PACKED, PACKED, mask=MASK[..., :4]), r"mask \[2 or 1, 4 or 1, 3, 5\]"),
        (lambda: packed_attention(Q[..., :8], PACKED, PACKED), "expected q"),
        (lambda: merge_attention([]), "at least one part"),
        (lambda: swan_attention(Q, PACKED, None, K, K), "give both histories, or None for both"),
    ],
)
def test_others_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
