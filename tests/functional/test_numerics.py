"""Numbers that are hard: how far an output may be from attention without a cache, and what is not a number.

The error of an output is bounded by what a layout discards, which its documentation says, not by what the code stored.
Tokens ``j`` have keys ``k_j + e_j`` and values ``v_j + f_j`` where `dense_attention` has ``k_j`` and ``v_j``. With
exact weights ``p_j``, a score moves by ``d_j``, ``|d_j| <= D_j = |scale| ‖q‖ ‖e_j‖``, and a weight becomes ``p_j r_j``
with ``r_j = exp(d_j) / sum_i p_i exp(d_i)``. The least and the most that a denominator can be give

    exp(-D_j) / sum_i p_i exp(D_i)  <=  r_j  <=  exp(D_j) / sum_i p_i exp(-D_i)

Weights sum to 1 before and after, so that ``sum_j (p_j r_j - p_j) o = 0``, and the output moves by

    sum_j p_j r_j f_j + sum_j p_j (r_j - 1) (v_j - o)

whose length is at most ``sum_j p_j max(r_j) ‖f_j‖ + sum_j p_j max|r_j - 1| ‖v_j - o‖``. Rounding moves scores and
values too: it is added to ``D_j`` and ``‖f_j‖``. For one token the bound is ``‖f_j‖`` and nothing else, and its
log-sum-exp is its score: there a wrong scale, a lost bit or a wrong token shows
(`test_a_planted_mistake_breaks_the_bound`).
"""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Graded, TopK, dense_attention, merge_attention, pack, packed_attention, rotate, swan_attention, unpack
from swan.functional import random_rotation, reference
from swan.kernels import Seen, cpu
from swan.storage.codes import NOT_A_NUMBER, PARTS, scale_of
from tests.numerics import INPUTS, attention_error, discarded, hard, norms
from tests.strategies import DTYPES, any_graded, dtypes, ids, one_thread, seeds, topk_layouts, unit  # noqa: F401

LAYOUTS = {
    "4 bits": Graded(((20, 4),)),
    "8, 5 and 3 bits": Graded(((5, 8), (5, 5), (10, 3))),
    "1 bit and 2": Graded(((7, 1), (13, 2))),
    "16 bits and 4": Graded(((10, 16), (10, 4))),
    "top-k": TopK(20, 9),
    "top-k, 4 bits": TopK(20, 9, bits=4),
    "top-k, 16 bits": TopK(20, 9, bits=16, positions="index"),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_impl = pytest.mark.parametrize("impl", ["auto", "compiled", "reference", "sdpa"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
dims = st.sampled_from([16, 20, 36, 64, 80, 96, 112])
LARGEST = 2.0 ** ((NOT_A_NUMBER - 1 - 128) / 8)  # of the scales, 55,109


def any_layout(d):
    return any_graded(d) | topk_layouts(d, bits=(4, 8, 16))


# The error from the discarded energy --------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "compiled"])
@given(seeds, dtypes, dims, st.sampled_from([1, 2, 3, 17, 70]), st.sampled_from(INPUTS), st.data())
def test_the_error_stays_below_the_discarded_energy(impl, seed, dtype, d, tokens, kind, data):
    layouts = data.draw(any_layout(d)), data.draw(any_layout(d))
    q = hard(seed, "normal", dtype, 2, 4, 2, d)
    k, v = (hard(seed + i, kind, dtype, 2, 2, tokens, d) for i in (1, 2))
    packed = [
        pack(x, layout, impl=impl if isinstance(layout, Graded) else "auto")
        for x, layout in zip((k, v), layouts, strict=True)
    ]
    if data.draw(st.booleans()):  # a query along the error of a token moves its score as far as it can
        along = (unpack(packed[0]).double() - k.double())[:, :, :1].repeat_interleave(2, dim=1)
        q = (along / along.abs().amax(-1, keepdim=True).clamp(min=1e-30)).expand_as(q).to(dtype)
    steep = data.draw(st.sampled_from([0.1, 3.0, 20.0]))  # no score is larger
    scale = steep / (float(norms(q).max() * norms(k).max()) or 1.0)  # 1 where all keys are zero
    out, lse = packed_attention(q, *packed, scale=scale, impl=impl, return_lse=True)
    expected, expected_lse = reference.dense_attention(*(t.double() for t in (q, k, v)), scale=scale)
    e, f = discarded(k, layouts[0]), discarded(v, layouts[1])
    bound, moves = attention_error(q, k, v, e, f, scale, layouts)
    error = norms(out.double() - expected)
    assert (error <= bound).all(), f"off by {(error / bound).max():.3g} times the bound"
    assert ((lse - expected_lse).abs() <= moves).all()


ALONE = Graded(((16, 6), (48, 4)))


def octave_up(packed):
    """The scale of the second group is twice as large."""
    scales = packed.scales.clone()
    scales[..., 1] += 8
    return dataclasses.replace(packed, scales=scales)


def lost_bit(packed):
    """The lowest bit of the last group is 0: bits 0 and 4 of its bytes are those of two codes."""
    codes = packed.planes[0].clone()
    codes[..., 12:] &= 0xEE
    return dataclasses.replace(packed, planes=(codes,))


def swapped(packed):
    """Each token is another."""
    return packed.map(lambda t: t.roll(1, dims=2))


@pytest.mark.parametrize("impl", ["auto", "compiled"])
@pytest.mark.parametrize("mistake", [octave_up, lost_bit, swapped], ids=lambda f: f.__name__)
def test_a_planted_mistake_breaks_the_bound(mistake, impl):
    """The bound is tight enough: one token at a time, with a query along its error, it notices each of these."""
    x, layout = hard(0, "normal", torch.float32, 1, 1, 16, 64), ALONE
    f = discarded(x, layout)
    found = {}
    for name, packed in (("right", pack(x, layout, impl=impl)), ("wrong", mistake(pack(x, layout, impl=impl)))):
        off = unpack(packed) - x
        above_as_value, above_as_key = [], []
        for j in range(x.shape[2]):
            token, one = packed.tokens(j, j + 1), x[:, :, j : j + 1]
            q = off[:, :, j : j + 1] / norms(off[:, :, j : j + 1])[..., None].float()
            out, lse = packed_attention(q, token, token, scale=0.1, impl=impl, return_lse=True)
            energy = f[:, :, j : j + 1]
            bound, moves = attention_error(q, one, one, energy, energy, 0.1, (layout, layout))
            above_as_value.append(bool((norms(out.double() - one.double()) > bound).any()))
            score = 0.1 * (q.double() * one.double()).sum(-1)
            above_as_key.append(bool(((lse - score).abs() > moves).any()))
        found[name] = sum(above_as_value), sum(above_as_key)
    assert found["right"] == (0, 0)
    assert min(found["wrong"]) >= 8, f"{found['wrong']} of 16 tokens"


# What is not a number -----------------------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf, 1e30]


@every_layout
@every_dtype
@pytest.mark.parametrize("impl", ["auto", "compiled"])
@pytest.mark.parametrize("bad", BAD)
def test_a_vector_that_cannot_be_stored_is_nan(layout, dtype, impl, bad):
    """1e30 is no number of float16, and above all scales of groups; what keeps numbers as they are keeps it."""
    impl = impl if isinstance(layout, Graded) else "auto"
    x = hard(0, "normal", dtype, 2, 1, 3, 20)
    x[1, 0, 1, 3] = bad
    clean = unpack(pack(hard(0, "normal", dtype, 2, 1, 3, 20), layout, impl=impl))
    found = unpack(pack(x, layout, impl=impl))
    coded = layout.groups[0][1] < 16 if isinstance(layout, Graded) else layout.bits == 4
    stays = math.isfinite(float(x[1, 0, 1, 3])) and not coded
    assert bool(found[1, 0, 1].isfinite().all()) == stays
    assert stays or not found[1, 0, 1, 3].isfinite()
    found[1, 0, 1], clean[1, 0, 1] = 0, 0
    assert torch.equal(found, clean)


@pytest.mark.parametrize("impl", ["auto", "compiled"])
@pytest.mark.parametrize("bits", PARTS)
def test_the_largest_scale(bits, impl):
    """Up to it a group is within half a step; the next number is NaN. Zeros have the smallest scale."""
    layout = Graded(((1, bits),))
    x = torch.tensor([LARGEST * (1 - 1e-5), -LARGEST * (1 - 1e-5), LARGEST * (1 + 1e-5), 0.0, -1e-30])
    packed = pack(x.view(1, 1, -1, 1), layout, impl=impl)
    found = unpack(packed).flatten()
    assert ((found - x).abs()[:2] <= 2.0**-bits * LARGEST).all()
    assert found.isnan().tolist() == [False, False, True, False, False]
    assert (found[3:].abs() <= 2.0**-bits * 2.0**-16).all()
    assert packed.scales.flatten().tolist() == [254, 254, 255, 0, 0]
    assert packed.planes[0][0, 0, 2].eq(0).all()
    assert scale_of(packed.scales).isnan().sum() == 1


def attend(q, k, v, layout, impl, recent=5):
    history = [pack(t[:, :, :-recent], layout) for t in (k, v)]
    return swan_attention(q, *history, *(t[:, :, -recent:] for t in (k, v)), impl=impl)


@every_layout
@every_impl
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row_and_shows(layout, impl, bad):
    for dtype in DTYPES if impl in ("auto", "compiled") else DTYPES[:1]:
        shapes = {"q": (3, 4, 2, 20), "k": (3, 2, 75, 20), "v": (3, 2, 75, 20)}
        clean = {name: hard(i, "normal", dtype, *shape) for i, (name, shape) in enumerate(shapes.items())}
        expected = attend(*clean.values(), layout, impl)
        for name, token in [("q", 0), *itertools.product("kv", (3, 72, slice(None)))]:
            tensors = {each: t.clone() for each, t in clean.items()}
            tensors[name][1, :, token] = bad
            found = attend(*tensors.values(), layout, impl)
            spoilt = torch.zeros(3, 4, 2, dtype=torch.bool)
            spoilt[1] = True
            spoilt[1, :, 1:] &= name != "q"
            assert torch.equal(found[~spoilt], expected[~spoilt])
            # A query times an infinite key is infinite or NaN: minus infinity is a weight of 0, as with torch.
            if not (name == "k" and bad == math.inf):
                assert not found[spoilt].isfinite().all(-1).any(), (dtype, name, token)


@pytest.mark.parametrize("impl", ["compiled", "reference", "cpp"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_sees_no_number_is_nan_not_zero(impl, bad):
    """Keys that are all NaN, or that all give minus infinity: beside them nothing has a weight."""
    if impl == "cpp" and not cpu.built():
        pytest.skip("no compiler")
    q, v = -torch.ones(2, 4, 1, 20), torch.ones(2, 2, 9, 20)
    k = torch.ones(2, 2, 9, 20)
    k[1, :, :, 2] = bad
    layout = Graded.leading(20, 10)
    for mask in (None, torch.ones(1, 1, 1, 9, dtype=torch.bool)):
        out, lse = packed_attention(q, pack(k, layout), pack(v, layout), mask=mask, impl=impl, return_lse=True)
        assert out[0].isfinite().all() and lse[0].isfinite().all()
        assert out[1].isnan().all() and not lse[1].isfinite().any()
    if impl != "cpp":
        assert dense_attention(q, k, v, impl=impl)[1].isnan().all()


@every_dtype
@pytest.mark.parametrize("impl", ["sdpa", "auto", "compiled"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_no_number_is_nan_beside_few_keys(impl, bad, dtype):
    """Torch's kernels for CPUs give zeros, and a log-sum-exp of zero."""
    for tokens in (1, 2, 7, 40):
        q, k, v = (hard(i, "normal", dtype, 2, 2, n, 16) for i, n in enumerate((1, tokens, tokens)))
        q[1, 0] = bad
        out, lse = dense_attention(q, k, v, impl=impl, return_lse=True)
        alone = dense_attention(q, k, v, impl=impl)
        assert out[1, 0].isnan().all() and alone[1, 0].isnan().all() and not lse[1, 0].isfinite().any()
        out[1, 0], alone[1, 0], lse[1, 0] = 0, 0, 0
        assert out.isfinite().all() and alone.isfinite().all() and lse.isfinite().all()


# Extremes of shape and of scores ------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("impl", ["auto", "compiled", "reference"])
@pytest.mark.parametrize("batch", [0, 1])
def test_no_rows_no_tokens_and_one(layout, impl, batch):
    for tokens, recent in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        q, k, v = (torch.ones(batch, h, n, 20) for h, n in ((4, 1), (2, tokens + recent), (2, tokens + recent)))
        history = [pack(t[:, :, :tokens], layout) for t in (k, v)]
        out = swan_attention(q, *history, k[:, :, tokens:], v[:, :, tokens:], impl=impl)
        assert out.shape == q.shape and out.isfinite().all()
        assert tokens + recent or not out.any()


@every_dtype
@pytest.mark.parametrize("impl", ["auto", "compiled", "reference", "sdpa"])
def test_rows_that_see_nothing_are_zero(impl, dtype):
    """By a mask and by numbers, in every implementation; the rows beside them are as without them."""
    q, k, v = (hard(i, "outliers", dtype, 2, h, n, 20) for i, (h, n) in enumerate([(4, 3), (2, 70), (2, 70)]))
    packed = pack(k, LAYOUTS["8, 5 and 3 bits"]), pack(v, LAYOUTS["4 bits"])
    mask = torch.ones(2, 1, 3, 70, dtype=torch.bool)
    mask[0] = False
    whole, whole_lse = packed_attention(q, *packed, impl=impl, return_lse=True)
    for seen in (mask, Seen(torch.tensor([70, 0]), None, 0)):
        out, lse = packed_attention(q, *packed, mask=seen, impl=impl, return_lse=True)
        assert not out[0].any() and (lse[0] == -math.inf).all()
        torch.testing.assert_close(out[1], whole[1], atol=0, rtol=8 * unit(dtype))
        torch.testing.assert_close(lse[1], whole_lse[1])
        alone = swan_attention(q, *packed, k[:, :, :0], v[:, :, :0], history_mask=seen, impl=impl)
        assert not alone[0].any()


@every_dtype
@pytest.mark.parametrize("gap", [0.0, 1.0, 30.0, 200.0, 1e4])
def test_parts_of_very_different_weight_merge_in_float32(gap, dtype):
    """Of two parts, one with exp(gap) times the weight, whatever the size of their log-sum-exps."""
    outs = [hard(i, "normal", dtype, 1, 2, 3, 16) for i in (1, 2)]
    share = 1 / (1 + math.exp(-gap))
    for base in (0.0, -300.0, 3e4):
        lses = [torch.full((1, 2, 3), base), torch.full((1, 2, 3), base - gap)]
        out, lse = merge_attention([(o, x) for o, x in zip(outs, lses, strict=True)])
        expected = share * outs[0].double() + (1 - share) * outs[1].double()
        off = 4 * unit(torch.float32) * (abs(base) + gap + 1)  # of a log-sum-exp, which a weight is off by
        largest = max(float(o.abs().max()) for o in outs)
        assert ((out.double() - expected).abs() <= (2 * off + unit(dtype)) * largest).all()
        assert ((lse - (base + math.log1p(math.exp(-gap)))).abs() <= off).all()


@pytest.mark.parametrize("impl", ["auto", "compiled", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_scores_that_cancel_are_summed_in_float32(impl, dtype):
    """Two products of 60,000 that cancel leave a score of 1, of which bfloat16 would keep nothing."""
    q, k = torch.zeros(1, 1, 1, 16, dtype=dtype), torch.zeros(1, 1, 2, 16, dtype=dtype)
    q[..., :3] = torch.tensor([240.0, 240.0, 1.0])
    k[:, :, 0, :3], k[:, :, 1, :2] = torch.tensor([248.0, -248.0, 1.0]), torch.tensor([248.0, -248.0])
    v = torch.zeros_like(k)
    v[:, :, 0] = 1
    layout = Graded(((16, 16),))
    for out in (
        dense_attention(q, k, v, scale=1.0, impl=impl),
        packed_attention(q, pack(k, layout), pack(v, layout), scale=1.0, impl=impl),
    ):
        torch.testing.assert_close(
            out.double(), torch.full_like(out, 1 / (1 + math.exp(-1))).double(), rtol=0, atol=4 * unit(dtype)
        )


def test_a_rotation_that_overflows_shows():
    """A coordinate of a rotated float16 vector can be as large as the vector is long."""
    basis = random_rotation(2, 16, seed=0, dtype=torch.float16)
    x = hard(0, "normal", torch.float16, 3, 2, 4, 16)
    expected = rotate(x, basis)
    x[1] = 6e4 * basis[:, None, :, 0].sign()  # along the first direction of the basis, but for lengths of coordinates
    found = rotate(x, basis)
    assert not found[1].isfinite().all(-1).any()
    found[1] = expected[1]
    assert torch.equal(found, expected)
