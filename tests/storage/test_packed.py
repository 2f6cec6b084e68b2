"""The stored vector is the pruned one, to the bit or to half a step, in the bytes that the layout says."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from swan import Graded, LayerPlan, Packed, TopK, graded_prune, pack, topk_prune, unpack
from swan.functional import reference
from swan.storage.codes import as_bfloat16
from tests.strategies import (
    DTYPES,
    U32,
    assert_within,
    distinct,
    dtypes,
    ids,
    layouts,
    normal,
    one_thread,  # noqa: F401
    seeds,
    topk_layouts,
    unit,
)

dims = st.sampled_from([8, 16, 17, 63, 64, 128, 256]) | st.integers(2, 256)
LAYOUTS = [
    TopK(63, 20),
    TopK(63, 20, positions="index"),
    TopK(63, 20, bits=16),
    TopK(63, 63),
    TopK(63, 63, bits=16),
    TopK(1, 1),
    Graded(((10, 16), (20, 0), (30, 16), (3, 0))),
    Graded.leading(256, 100),
]
all_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


def kept_coordinates(packed: Packed):
    """For each vector the coordinates that a TopK stores, read from the bytes one by one."""
    layout, found = packed.format, []
    for octets in packed.positions.flatten(0, 2).tolist():
        if layout.positions == "index":
            found.append(octets)
        else:
            found.append([i for i in range(layout.d) if octets[i // 8] >> (i % 8) & 1])
    return found


def step_bound(packed: Packed):
    """Half a step of int8 (a hair more: the quotient is rounded), and the rounding of the dtype."""
    half = packed.scales.double() * (0.5 + 127 * 2 * U32)
    return half + unit(packed.dtype) * (127 * packed.scales.double()).clamp(
        min=torch.finfo(packed.dtype).smallest_normal
    )


# Values -------------------------------------------------------------------------------------------


@given(seeds, dims, dtypes, st.data())
def test_topk_16_is_the_pruned_vector(seed, d, dtype, data):
    layout = data.draw(topk_layouts(d, bits=[16]))
    x = distinct(seed, 1, 2, 3, d, dtype=dtype)
    assert torch.equal(unpack(pack(x, layout)), topk_prune(x, layout.keep))
    assert torch.equal(unpack(pack(x, layout)), reference.prune(x, layout))


@given(seeds, dims, dtypes, st.data())
def test_int8_is_half_a_step_off(seed, d, dtype, data):
    layout = data.draw(topk_layouts(d, bits=[8]))
    x = normal(seed, 2, 2, 5, d, dtype=dtype)
    packed, exact = pack(x, layout), pack(x, TopK(d, layout.keep, 16, layout.positions))
    assert packed.positions is None if layout.keep == d else torch.equal(packed.positions, exact.positions)
    assert_within(unpack(packed), unpack(exact), step_bound(packed))
    assert not unpack(packed)[unpack(exact) == 0].any()
    assert packed.planes[0].abs().amax(-1).eq(127).all()  # all of int8 is used


@given(seeds, dims, dtypes, st.data())
def test_graded_is_the_pruned_vector(seed, d, dtype, data):
    layout = data.draw(layouts(d).filter(lambda layout: isinstance(layout, Graded)))
    x = normal(seed, 2, 2, 3, d, dtype=dtype)
    assert torch.equal(unpack(pack(x, layout)), graded_prune(x, layout.groups))


def test_leading_keeps_the_leading():
    x = normal(0, 1, 2, 3, 17)
    expected = torch.cat([x[..., :5], torch.zeros(1, 2, 3, 12)], dim=-1)
    assert torch.equal(unpack(pack(x, Graded.leading(17, 5))), expected)
    assert Graded.leading(17, 17) == Graded(((17, 16),))


@given(seeds, dims, st.sampled_from([8, 16]), dtypes, st.data())
def test_positions_agree(seed, d, bits, dtype, data):
    keep = data.draw(st.integers(1, d - 1))
    x = distinct(seed, 1, 2, 3, d, dtype=dtype)
    bitmap, index = (pack(x, TopK(d, keep, bits, positions)) for positions in ("bitmap", "index"))
    assert torch.equal(unpack(bitmap), unpack(index))
    largest = x.abs().flatten(0, 2).topk(keep).indices.sort().values.tolist()
    assert kept_coordinates(bitmap) == kept_coordinates(index) == largest


@all_dtypes
@pytest.mark.parametrize("positions", ["bitmap", "index"])
@pytest.mark.parametrize("bits", [8, 16])
def test_ties_keep_exactly_keep(bits, positions, dtype):
    x = torch.where(normal(0, 1, 2, 20, 63) > 0, 1.0, -1.0).to(dtype)
    packed = pack(x, TopK(63, 20, bits, positions))
    assert {len(set(kept)) for kept in kept_coordinates(packed)} == {20}
    found = unpack(packed)
    assert (found != 0).sum(-1).eq(20).all()
    # One is 127 steps of a scale that is rounded to bfloat16, and the product is rounded to the dtype.
    assert_within(found[found != 0], x[found != 0], 0 if bits == 16 else unit(torch.bfloat16) + unit(dtype))


@all_layouts
@all_dtypes
def test_zero_and_single_vectors(layout, dtype):
    zeros = torch.zeros(1, 1, 2, layout.d, dtype=dtype)
    assert torch.equal(unpack(pack(zeros, layout)), zeros)
    single = zeros.clone()
    single[..., 0] = -2.0
    found = unpack(pack(single, layout))
    quantized = isinstance(layout, TopK) and layout.bits == 8
    assert_within(found, single, 2 * (unit(torch.bfloat16) + unit(dtype)) if quantized else 0)
    assert torch.equal(found[..., 1:], single[..., 1:])


def extremes(dtype):
    info = torch.finfo(dtype)
    tiny = max(info.smallest_normal, 127 * torch.finfo(torch.bfloat16).smallest_normal)  # keeps scales normal
    return [info.max, info.max / 2, tiny]


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [(dtype, m) for dtype in DTYPES for m in extremes(dtype)],
    ids=lambda v: ids(v) or f"{v:.1e}",
)
@pytest.mark.parametrize("keep", [5, 17])
def test_extreme_magnitudes(dtype, magnitude, keep):
    x = (distinct(0, 1, 1, 40, 17).double() / 17 * magnitude).to(dtype)
    assert torch.equal(unpack(pack(x, TopK(17, keep, bits=16))), topk_prune(x, keep))
    packed = pack(x, TopK(17, keep))
    bound = step_bound(packed)
    if magnitude == torch.finfo(dtype).max:  # scales stop short of overflow
        bound = bound + packed.scales.double() / 2
    assert_within(unpack(packed), topk_prune(x, keep), bound)


@all_dtypes
def test_subnormal_vectors_stay_small(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([1.0, -3, 0, 5]).mul(smallest).to(dtype).view(1, 1, 1, 4)
    found = unpack(pack(x, TopK(4, 3)))
    assert found.abs().max() <= 2 * x.abs().max()
    assert found[..., 2] == 0


def test_float64_is_stored_in_8_bits():
    """Found by tests/stateful: the largest float64 is no float32, in which scales are computed."""
    x, layout = torch.randn(1, 2, 3, 16, dtype=torch.float64), TopK(16, 9)
    packed, expected = pack(x, layout), pack(x.float(), layout)
    assert all(torch.equal(a, b) for a, b in zip(packed.tensors, expected.tensors, strict=True))
    assert unpack(packed).dtype == torch.float64


def test_scales_are_rounded_as_torch_rounds():
    """To bfloat16, halves to the even one, in integers that no compiler takes out."""
    halves = torch.arange(0x3F80, 0x4080, dtype=torch.int32).mul(2**16).add(2**15).view(torch.float32)
    for x in (normal(0, 10_000).abs() * 2.0**-40, halves, torch.tensor([0.0, torch.finfo(torch.float32).tiny])):
        assert torch.equal(as_bfloat16(x), x.bfloat16().float())


# Bytes --------------------------------------------------------------------------------------------


@given(seeds, dims, dtypes, st.data())
def test_vector_bytes_are_real(seed, d, dtype, data):
    layout = data.draw(layouts(d))
    packed = pack(normal(seed, 2, 3, 5, d, dtype=dtype), layout)
    vectors = 2 * 3 * 5
    assert packed.nbytes == vectors * layout.vector_bytes(dtype.itemsize)
    assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in packed.tensors)
    assert (packed.positions is None) == (isinstance(layout, Graded) or layout.keep == d)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (TopK(64, 32), 32 + 8 + 2),
        (TopK(63, 20), 20 + 8 + 2),
        (TopK(64, 32, positions="index"), 32 + 32 + 2),
        (TopK(64, 32, bits=16), 64 + 8),
        (TopK(64, 64), 64 + 2),
        (TopK(64, 64, bits=16), 128),
        (Graded(((8, 16), (40, 0), (16, 16))), 48),
    ],
    ids=str,
)
def test_vector_bytes(layout, expected):
    assert layout.vector_bytes() == expected
    assert LayerPlan(layout, layout).retention == 2 * expected / (4 * layout.d)


def test_retention_of_other_values_than_keys():
    keys, values = TopK(64, 32), Graded(((8, 16), (8, 3), (24, 0)))  # 42 bytes; 16, 3 in a word of 4, and 1
    assert LayerPlan(keys, values).retention == (42 + 21) / (2 * (64 + 40))


@pytest.mark.parametrize("positions", ["bitmap", "index"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("d", [16, 63])
def test_more_kept_is_never_worse(d, bits, positions):
    x = normal(0, 1, 2, 10, d)
    error, size = x.abs(), 0
    for keep in range(1, d + 1):
        layout = TopK(d, keep, bits, positions)
        found = (unpack(pack(x, layout)) - x).abs()
        # Every coordinate gets closer or stays: zero is one of the steps that a new one can take.
        assert (found <= error * (1 + 4 * U32)).all()
        assert layout.vector_bytes() > size or keep == d  # the last needs no positions
        error, size = found, layout.vector_bytes()


def test_more_leading_is_never_worse():
    x = normal(0, 1, 2, 10, 63)
    errors = [(unpack(pack(x, Graded.leading(63, keep))) - x).abs() for keep in range(1, 64)]
    sizes = [Graded.leading(63, keep).vector_bytes() for keep in range(1, 64)]
    assert all((b <= a).all() for a, b in pairwise(errors))
    assert sizes == sorted(sizes)


# Packed -------------------------------------------------------------------------------------------


@given(seeds, dims, dtypes, st.data())
def test_packing_again_changes_nothing(seed, d, dtype, data):
    layout = data.draw(layouts(d))
    once = pack(normal(seed, 1, 2, 5, d, dtype=dtype), layout)
    again = pack(unpack(once), layout)
    if once.scales is not None and dtype == torch.bfloat16:
        # 127 steps of a scale of mantissa 1.5 are halfway between two bfloat16 numbers; all else is exact.
        assert_within(unpack(again), unpack(once), step_bound(once))
        return
    assert torch.equal(unpack(again), unpack(once))
    assert once.scales is None or torch.equal(again.scales, once.scales)


@all_layouts
@all_dtypes
def test_packed_is_a_pytree(layout, dtype):
    packed = pack(normal(0, 2, 3, 5, layout.d, dtype=dtype), layout)
    leaves, spec = pytree.tree_flatten(packed)
    assert [t for t in leaves if t is not None] == list(packed.tensors)
    rebuilt = pytree.tree_unflatten(leaves, spec)
    assert (rebuilt.format, rebuilt.dtype, rebuilt.shape) == (layout, dtype, (2, 3, 5, layout.d))
    assert torch.equal(unpack(rebuilt), unpack(packed))


@all_layouts
def test_tokens_and_map(layout):
    packed = pack(normal(0, 2, 3, 5, layout.d), layout)
    some = packed.tokens(1, 3)
    assert some.shape == (2, 3, 2, layout.d)
    assert torch.equal(unpack(some), unpack(packed)[:, :, 1:3])
    assert [t.untyped_storage().data_ptr() for t in some.tensors] == [
        t.untyped_storage().data_ptr() for t in packed.tensors
    ]
    turned = packed.map(lambda t: t.flip(0))
    assert torch.equal(unpack(turned), unpack(packed).flip(0))


@all_layouts
@pytest.mark.parametrize("shape", [(1, 1, 0), (0, 2, 3)], ids=["tokens", "batch"])
def test_nothing_packs(layout, shape):
    x = torch.zeros(*shape, layout.d)
    assert torch.equal(unpack(pack(x, layout)), x)


def test_packing_does_not_alias():
    x = normal(0, 1, 2, 3, 16)
    for layout in (TopK(16, 8, bits=16), Graded.leading(16, 8)):
        packed = pack(x, layout)
        before = unpack(packed)
        x.add_(1)
        assert torch.equal(unpack(packed), before)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(64, 0), "keep must be between 1 and d = 64, got 0"),
        (lambda: TopK(64, 65), "keep must be between 1 and d = 64, got 65"),
        (lambda: TopK(64, 8, bits=5), "must be 4, 8 or 16, got 5"),
        (lambda: TopK(64, 8, positions="list"), "'bitmap' or 'index', got 'list'"),
        (lambda: TopK(257, 8), "between 1 and 256, got 257"),
        (lambda: TopK(0, 0), "between 1 and 256, got 0"),
        (lambda: Graded(()), "at least one"),
        (lambda: Graded(((0, 16), (4, 0))), "size >= 1"),
        (lambda: Graded(((4, 7), (4, 0))), "must be one of 0, 1, 2, 3, 4, 5, 6, 8, 16"),
        (lambda: Graded(((4, 0),)), "must keep something"),
        (lambda: Graded(((200, 16), (57, 0))), "between 1 and 256, got 257"),
        (lambda: Graded.leading(64, 65), "keep must be between 1 and d = 64, got 65"),
        (lambda: pack(torch.zeros(2, 3, 16), TopK(16, 8)), r"\[batch, heads, tokens, 16\] .*, got \[2, 3, 16\]"),
        (lambda: pack(torch.zeros(1, 2, 3, 17), TopK(16, 8)), r"got \[1, 2, 3, 17\]"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("x", "got"), [(torch.zeros(1, 1, 1, 16).int(), "torch.int32"), ([1.0], "list")])
def test_wrong_types(x, got):
    with pytest.raises(TypeError, match=f"floating-point tensor, got {got}"):
        pack(x, TopK(16, 8))
