"""What else a `KVCache` does: crop, reorder, repack, count its bytes, refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swan import Graded, KVCache, LayerPlan, TopK, unpack
from swan.functional import reference
from swan.storage.mixing import build_mix
from tests.strategies import (
    DTYPES,
    U32,
    assert_within,
    attention_bound,
    decode,
    distinct,
    double,
    ids,
    normal,
    plan_layers,
    qkv,
    seeds,
    splits,
    stored,
    windowed_oracle,
)

D, DV = 16, 8
PLAN = LayerPlan(TopK(D, 6, bits=16), Graded.leading(DV, 4))
INT8 = LayerPlan(TopK(D, 6), TopK(DV, 3, positions="index"))
HEADS = (4, 2)
static_or_not = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


def cache_of(plan_layer=PLAN, *, static=False, prefill="windowed", max_length=60, buffer=8, sinks=2) -> KVCache:
    room = {"static": True, "max_length": max_length} if static else {}
    return KVCache(plan_layer, buffer=buffer, sinks=sinks, prefill=prefill, **room)


def sequence(tokens: int, batch: int = 2, dtype=torch.float32) -> list[Tensor]:
    return qkv(0, batch, HEADS, tokens, tokens, D, DV, dtype)


def history(cache: KVCache) -> tuple[Tensor, Tensor]:
    stop = cache.history_length
    return tuple(unpack(packed.tokens(0, stop)) for packed in (cache.k_history, cache.v_history))


def reachable(thing, found=None) -> dict[int, int]:
    """Bytes of every storage that can be reached from an object's attributes."""
    found = {} if found is None else found
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, (list, tuple, dict)):
        for part in thing.values() if isinstance(thing, dict) else thing:
            reachable(part, found)
    elif hasattr(thing, "__dict__"):
        reachable(vars(thing), found)
    return found


def snapshot(cache: KVCache):
    return [t.clone() for t in cache.tensors], cache.length, cache.history_length, cache.plan_layer


def assert_same(cache: KVCache, before) -> None:
    now = snapshot(cache)
    assert now[1:] == before[1:]
    assert all(torch.equal(a, b) for a, b in zip(now[0], before[0], strict=True))


# Crop ---------------------------------------------------------------------------------------------


@static_or_not
@pytest.mark.parametrize("padding", [None, torch.tensor([3, 0])], ids=["plain", "padded"])
@pytest.mark.parametrize(("length", "kept"), [(30, 30), (30, 25), (30, 11), (30, 1), (7, 3)])
def test_crop_then_continue(length, kept, padding, static):
    """What was packed stays packed: the window begins where it began before the crop, until new tokens fill it."""
    q, k, v = sequence(50)
    cache = cache_of(static=static)
    decode(cache, q[:, :, :length], k[:, :, :length], v[:, :, :length], [length], padding=padding)
    cache.crop(kept)
    assert cache.length == kept
    found = decode(cache, q[:, :, kept:], k[:, :, kept:], v[:, :, kept:], [1, 9, *[1] * (40 - kept)])
    starts = (torch.arange(50) - 7).clamp(min=min(length - 8, kept))
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2, padding=padding, window_start=starts)
    assert_within(found, expected[:, :, kept:], attention_bound(q, k, v))


def test_a_rejected_draft_leaves_no_trace():
    """Fewer tokens than the buffer lacks are taken back exactly."""
    q, k, v = sequence(20)
    cache = cache_of(buffer=16)
    decode(cache, q[:, :, :10], k[:, :, :10], v[:, :, :10], [10])
    cache.update(k[:, :, 14:], v[:, :, 14:])
    cache.crop(10)
    found = decode(cache, q[:, :, 10:], k[:, :, 10:], v[:, :, 10:], [4, 6])
    expected = windowed_oracle(q, k, v, PLAN, buffer=16, sinks=2)
    assert_within(found, expected[:, :, 10:], attention_bound(q, k, v))


@static_or_not
def test_crop_to_nothing_is_a_new_cache(static):
    q, k, v = sequence(30)
    cache = cache_of(static=static)
    decode(cache, q.flip(2), k.flip(2), v.flip(2), [30], padding=torch.tensor([3, 0]))
    cache.crop(0)
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2)
    assert_within(decode(cache, q, k, v, [13, 17]), expected, attention_bound(q, k, v))


# Rows ---------------------------------------------------------------------------------------------


@static_or_not
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 1, 1, 2, 2]], ids=["permute", "select", "repeat"])
def test_map_batch_moves_rows(rows, padded, static):
    q, k, v = sequence(40, batch=3)
    padding = torch.tensor([3, 0, 5]) if padded else None
    cache = cache_of(INT8, static=static)
    decode(cache, q[:, :, :25], k[:, :, :25], v[:, :, :25], [25], padding=padding)
    index = torch.tensor(rows)
    cache.map_batch(lambda t: t.index_select(0, index))
    found = decode(cache, q[rows, :, 25:], k[rows, :, 25:], v[rows, :, 25:], [1, 14])
    expected = windowed_oracle(q, k, v, INT8, buffer=8, sinks=2, padding=padding)
    keys, values = (torch.cat([x, stored(x, y)], dim=2) for x, y in ((k, INT8.keys), (v, INT8.values)))
    assert_within(found, expected[rows, :, 25:], attention_bound(q, keys, values))


def test_map_batch_of_nothing():
    cache = cache_of()
    cache.map_batch(lambda t: t[:1])
    assert cache.length == 0


@static_or_not
def test_reset_is_a_new_cache(static):
    q, k, v = sequence(30)
    cache = cache_of(static=static)
    decode(cache, q, k, v, [30], padding=torch.tensor([3, 0]))
    cache.reset()
    assert (cache.length, cache.history_length, cache.nbytes, cache.dense_nbytes) == (0, 0, 0, 0)
    q, k, v = (t.bfloat16() for t in sequence(30, batch=1))
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2)
    assert_within(decode(cache, q, k, v, [30]), expected, attention_bound(q, k, v))


# Repack -------------------------------------------------------------------------------------------

LOWER = LayerPlan(TopK(D, 3, bits=16), Graded.leading(DV, 2))
HIGHER = LayerPlan(TopK(D, 12, bits=16), Graded.leading(DV, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("tokens", [9, 40, 2100])
def test_lowering_is_having_stored_less(tokens, dtype):
    q, k, v = (distinct(i, 2, 2, tokens + 1, d, dtype=dtype) for i, d in enumerate((D, D, DV)))
    lowered, low = cache_of(PLAN), cache_of(LOWER)
    for cache in (lowered, low):
        for part in (slice(tokens - 1), slice(tokens - 1, tokens)):
            cache.update(k[:, :, part], v[:, :, part])
    before = lowered.nbytes
    lowered.repack(LOWER)
    assert lowered.nbytes == low.nbytes
    assert low.history_length == 0 or lowered.nbytes < before
    if low.history_length:
        assert all(torch.equal(a, b) for a, b in zip(history(lowered), history(low), strict=True))
    outs = []
    for cache in (lowered, low):
        cache.update(k[:, :, tokens:], v[:, :, tokens:])
        outs.append(cache.attend(q[:, :, tokens:]))
    assert torch.equal(*outs)


@pytest.mark.parametrize("layouts", [HIGHER, LayerPlan(TopK(D, D, bits=16), TopK(DV, 6, bits=16))], ids=["more", "all"])
def test_raising_keeps_what_was_there(layouts):
    q, k, v = sequence(60)
    cache = cache_of(PLAN)
    decode(cache, q[:, :, :40], k[:, :, :40], v[:, :, :40], [40])
    before, stored_before = history(cache), cache.history_length
    cache.repack(layouts)
    assert all(torch.equal(a, b) for a, b in zip(history(cache), before, strict=True))
    decode(cache, q[:, :, 40:], k[:, :, 40:], v[:, :, 40:], [20])
    now = history(cache)
    assert all(torch.equal(a[:, :, :stored_before], b) for a, b in zip(now, before, strict=True))
    new = slice(2 + stored_before, 2 + cache.history_length)
    assert torch.equal(now[0][:, :, stored_before:], reference.prune(k[:, :, new], layouts.keys))
    assert torch.equal(now[1][:, :, stored_before:], reference.prune(v[:, :, new], layouts.values))


def test_repack_before_and_between():
    q, k, v = sequence(30)
    cache = cache_of(HIGHER)
    cache.repack(PLAN)  # nothing stored yet
    cache.update(k, v)
    cache.repack(PLAN)  # between update and attend, the same layouts
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2)
    assert_within(cache.attend(q), expected, attention_bound(q, k, v))
    cache.crop(5)  # the history is empty again, its memory is not
    cache.repack(LOWER)
    assert (cache.history_length, cache.k_history.format) == (3, LOWER.keys)
    cache.crop(1)
    cache.repack(PLAN)
    assert (cache.history_length, cache.k_history.format) == (0, PLAN.keys)


@st.composite
def any_layouts(draw, d):
    """Every form with every number of bits."""
    if draw(st.booleans()):
        return TopK(d, draw(st.integers(1, d)), draw(st.sampled_from([4, 8, 16])))
    cut = draw(st.integers(1, d - 1))
    bits = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 16]), min_size=2, max_size=2).filter(any))
    return Graded(((cut, bits[0]), (d - cut, bits[1])))


def largest_loss(y: Tensor, layout) -> Tensor:
    """E(y) of `KVCache.repack`, from the vectors and the settings alone."""
    least, step = 2.0**-16, 2 ** (1 / 8)
    if isinstance(layout, TopK):
        kept = reference.prune(y, TopK(layout.d, layout.keep, bits=16))
        peak = y.abs().amax(-1)
        each = {4: (peak * step).clamp(min=least) / 16, 8: peak / 127 * (1 + 2**-8) / 2, 16: 0 * peak}[layout.bits]
        return ((y - kept).square().sum(-1) + layout.keep * each**2).sqrt()
    mixed = y @ build_mix(layout.groups, torch.float64, y.device)
    total, start = torch.zeros(y.shape[:-1], dtype=torch.float64), 0
    for size, bits in layout.groups:
        group = mixed[..., start : start + size]
        if bits == 0:
            total += group.square().sum(-1)
        elif bits < 16:
            scale = (group.abs().amax(-1) * step).clamp(min=least)
            total += size * (scale * 2.0**-bits) ** 2
        start += size
    return total.sqrt()


@given(st.tuples(any_layouts(D), any_layouts(DV)), st.tuples(any_layouts(D), any_layouts(DV)), seeds)
def test_what_a_move_loses_is_bounded(first, then, seed):
    """|x - x_AB| <= E_A(x) + E_B(x_A), of vectors whose coordinates fall off."""
    cache = cache_of(LayerPlan(*first), buffer=1, sinks=0)
    k, v = (normal(seed + i, 1, 2, 21, d) * 2.0 ** -torch.arange(d) for i, d in enumerate((D, DV)))
    cache.update(k, v)
    before = history(cache)
    cache.repack(LayerPlan(*then))
    for x, once, twice, a, b in zip((k, v), before, history(cache), first, then, strict=True):
        x = x[:, :, :20].double()
        rounding = 8 * x.shape[-1] * U32 * x.norm(dim=-1)  # of two products with a mixing matrix, there and back
        bound = largest_loss(x, a) + largest_loss(once.double(), b) + rounding
        assert_within((x - twice).norm(dim=-1), torch.zeros_like(bound), bound)


# Drop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("padding", [None, torch.tensor([7, 0])], ids=["plain", "padded"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
def test_dropping_is_masking(prefill, masked, padding, dtype):
    """As if a mask hid the dropped columns from all later queries; sinks are seen on."""
    q, k, v = sequence(50, dtype=dtype)
    mask = torch.rand(2, 4, 50, 50) < 0.7 if masked else torch.ones(2, 4, 50, 50, dtype=torch.bool)
    hidden = mask.clone()
    cache, other = cache_of(prefill=prefill), cache_of(prefill=prefill)
    start = 0
    for chunk, drop in ((20, 3), (1, 0), (9, 6), (1, 1), (19, 0)):
        now = slice(start, start + chunk)
        cache.update(k[:, :, now], v[:, :, now], padding=padding)
        other.update(k[:, :, now], v[:, :, now], padding=padding)
        found = cache.attend(q[:, :, now], mask=mask[:, :, now] if masked else None)
        expected = other.attend(q[:, :, now], mask=hidden[:, :, now])
        assert_within(found, expected, 2 * attention_bound(*double(q, k, v)) + 4 * torch.finfo(dtype).eps)
        cache.evict(drop)
        start += chunk
        hidden[:, :, start:, 2 : 2 + cache.dropped] = False
        if padding is not None:
            hidden[0, :, start:, 7:9] = mask[0, :, start:, 7:9]  # its sinks
    assert (cache.history_length, cache.dropped, other.history_length) == (30, 10, 40)


def test_dropping_more_than_there_is():
    """What is to be dropped and still in the buffer is seen until it leaves, and is not stored."""
    q, k, v = sequence(50)
    cache = cache_of(prefill="windowed")
    cache.update(k[:, :, :12], v[:, :, :12])
    cache.evict(20)
    assert (cache.length, cache.history_length, cache.k_history) == (12, 0, None)
    decode(cache, q[:, :, 12:], k[:, :, 12:], v[:, :, 12:], [18, 2, 18])
    assert (cache.length, cache.history_length) == (50, 20)
    expected = reference.prune(k[:, :, 22:42], PLAN.keys)
    assert torch.equal(history(cache)[0], expected)


def test_dropping_frees_memory():
    cache = cache_of(INT8)
    cache.update(*sequence(1010)[1:])
    cache.attend(sequence(1010)[0])
    full, columns = cache.nbytes, cache.length
    cache.evict(0)
    assert cache.nbytes == full
    cache.evict(900)
    assert cache.nbytes < full / 4
    cache.evict(100)
    assert (cache.history_length, cache.k_history, cache.length) == (0, None, columns)


def test_what_was_cropped_is_not_dropped():
    """Tokens that come in the place of dropped ones are new, and kept."""
    q, k, v = sequence(50)
    cache = cache_of()
    decode(cache, q[:, :, :40], k[:, :, :40], v[:, :, :40], [40])
    cache.evict(20)
    cache.crop(15)
    assert (cache.dropped, cache.history_length) == (13, 0)
    decode(cache, q[:, :, 15:], k[:, :, 15:], v[:, :, 15:], [35])
    assert (cache.dropped, cache.history_length) == (13, 27)
    cache.crop(0)
    assert cache.dropped == 0


# Bytes --------------------------------------------------------------------------------------------


@static_or_not
@pytest.mark.parametrize("plan_layer", [PLAN, INT8, None], ids=["16", "int8", "window"])
@pytest.mark.parametrize("chunks", [[5], [30, 1], [1] * 30, [10, 1, 19]], ids=["short", "step", "steps", "chunks"])
def test_nbytes_counts_every_storage(chunks, plan_layer, static):
    q, k, v = sequence(sum(chunks))
    cache, start = cache_of(plan_layer, static=static), 0
    for size in chunks:
        part = slice(start, start + size)
        cache.update(k[:, :, part], v[:, :, part], padding=torch.tensor([1, 0]))
        assert cache.nbytes == sum(reachable(cache).values())
        cache.attend(q[:, :, part])
        assert cache.nbytes == sum(reachable(cache).values())
        start += size
    assert cache.dense_nbytes == 2 * 2 * 4 * start * (D + DV)


@given(
    st.tuples(plan_layers(D, DV), plan_layers(D, DV)),
    splits(300).flatmap(lambda chunks: st.tuples(st.just(chunks), st.integers(0, len(chunks) - 1))),
    st.integers(0, 300),
    st.sampled_from(DTYPES),
)
def test_bytes_are_known_before(layouts, chunks_and_move, drop, dtype):
    """All of them, at every step; one of them comes after a drop and a move to other layouts."""
    chunks, move = chunks_and_move
    cache, plan_layer, start = cache_of(layouts[0], buffer=8), layouts[0], 0
    _, k, v = sequence(300, dtype=dtype)
    for step, chunk in enumerate(chunks):
        now = slice(start, start + chunk)
        dropped = drop if step == move else 0
        plan_layer = layouts[1] if step == move else plan_layer
        size = {"rows": 2, "kv_heads": 2, "itemsize": dtype.itemsize}
        parts = cache.nbytes_after(chunk, plan_layer, **size, drop=dropped)
        cache.evict(dropped)
        cache.repack(plan_layer)
        cache.update(k[:, :, now], v[:, :, now])
        cache.attend(torch.zeros(2, 4, chunk, D, dtype=dtype))
        *exact, counters = parts
        assert sum(exact) <= cache.nbytes <= sum(exact) + counters
        assert counters == 8 * 2 * (8 + 2 + 1)
        assert sum(exact[:2]) == sum(p.nbytes for p in (cache.k_history, cache.v_history) if p is not None)
        start += chunk


def test_a_long_history_costs_what_the_plan_says():
    cache = KVCache(LayerPlan(TopK(64, 40), TopK(64, 24)), buffer=16, sinks=4)
    cache.update(*(t.bfloat16() for t in torch.randn(2, 1, 2, 4000, 64)))
    cache.attend(torch.zeros(1, 2, 4000, 64, dtype=torch.bfloat16))
    dense_part = 2 * 2 * (16 + 4) * 64 * 2
    packed = 2 * 2 * 64 * 2 * cache.plan_layer.retention * cache.history_length
    slack = (cache.nbytes - dense_part) / packed - 1
    assert 0 <= slack <= 1 / 32 + 2 * 64 / 4000  # room for 3 % and a block more, in whole blocks
    assert cache.nbytes < 0.36 * cache.dense_nbytes


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill": "sparse"}, "'chunk' or 'windowed', got 'sparse'"),
        ({"static": True}, "needs max_length, .* got None"),
        ({"static": True, "max_length": 0}, "needs max_length, .* got 0"),
        ({"max_length": 9}, "max_length is for static caches"),
        ({"buffer": 0}, "size >= 1"),
        ({"sinks": -1}, "sinks >= 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        KVCache(PLAN, **settings)


K, V = torch.ones(2, 2, 3, D), torch.ones(2, 2, 3, DV)


REFUSED = {
    "3d": (K[0], V, None, ValueError, r"expected keys .*, got \[2, 3, 16\]"),
    "tokens": (K, V[:, :, :2], None, ValueError, r"got \[2, 2, 3, 16\] and \[2, 2, 2, 8\]"),
    "none": (K[:, :, :0], V[:, :, :0], None, ValueError, "at least one token"),
    "keys": (K[..., :8], V, None, ValueError, "the plan stores keys of 16 coordinates, got 8"),
    "values": (K, V[..., :4], None, ValueError, "the plan stores values of 8 coordinates, got 4"),
    "int": (K.int(), V.int(), None, TypeError, "one floating-point dtype, got torch.int32"),
    "mixed": (K, V.half(), None, TypeError, "got torch.float32 and torch.float16"),
    "padding": (K, V, torch.tensor([1]), ValueError, r"left padding, \[2\], got \[1\]"),
}
REFUSED_LATER = {
    "dtype": (K.half(), V.half(), None, TypeError, r"holds torch.float32 keys, got torch.float16; reset\(\)"),
    "device": (K.to("meta"), V.to("meta"), None, ValueError, "the cache is on cpu, got keys on meta"),
    "batch": (K[:1], V[:1], None, ValueError, r"batch and heads \[2, 2\], got \[1, 2\]; reset\(\)"),
    "heads": (K[:, :1], V[:, :1], None, ValueError, r"got \[2, 1\]"),
}


@static_or_not
@pytest.mark.parametrize("case", REFUSED)
def test_an_empty_cache_refuses(case, static):
    k, v, padding, error, message = REFUSED[case]
    cache = cache_of(static=static)
    with pytest.raises(error, match=message):
        cache.update(k, v, padding=padding)
    assert cache.nbytes == 0


@static_or_not
@pytest.mark.parametrize("case", [*REFUSED, *REFUSED_LATER])
def test_a_refused_update_changes_nothing(case, static):
    k, v, padding, error, message = (REFUSED | REFUSED_LATER)[case]
    cache = cache_of(static=static)
    decode(cache, *sequence(20), [19, 1])
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        cache.update(k, v, padding=padding)
    assert_same(cache, before)


def test_a_full_static_cache_says_so():
    q, k, v = sequence(9)
    cache = cache_of(static=True, max_length=9)
    decode(cache, q, k, v, [4, 5])
    before = snapshot(cache)
    with pytest.raises(ValueError, match="holds 9 of 9 tokens, 1 more do not fit; build it with a larger max_length"):
        cache.update(K[:, :, :1], V[:, :, :1])
    assert_same(cache, before)


MASK = torch.ones(2, 4, 5, 20, dtype=torch.bool)


@static_or_not
@pytest.mark.parametrize(
    ("queries", "d", "mask", "error", "message"),
    [
        (4, D, None, ValueError, "5 tokens taken in, queries of 4 came"),
        (5, 8, None, ValueError, r"expected q .*, got \[2, 4, 5, 8\]"),
        (5, D, MASK.float(), TypeError, r"boolean \(True = visible\), got torch.float32"),
        (5, D, MASK[0], ValueError, r"mask \[2 or 1, 4 or 1, 5, 20 or more columns\] .*, got \[4, 5, 20\]"),
        (5, D, MASK[:, :2], ValueError, r"got \[2, 2, 5, 20\]"),
        (5, D, MASK[:, :, :4], ValueError, r"got \[2, 4, 4, 20\]"),
        (5, D, MASK[..., :19], ValueError, r"got \[2, 4, 5, 19\]"),
    ],
    ids=["count", "d", "float", "3d", "heads", "queries", "columns"],
)
def test_a_refused_attend_can_be_repeated(queries, d, mask, error, message, static):
    q, k, v = sequence(20)
    cache = cache_of(static=static)
    decode(cache, q[:, :, :15], k[:, :, :15], v[:, :, :15], [15])
    cache.update(k[:, :, 15:], v[:, :, 15:])
    with pytest.raises(error, match=message):
        cache.attend(torch.zeros(2, 4, queries, d), mask=mask)
    expected = windowed_oracle(q, k, v, PLAN, buffer=8, sinks=2)[:, :, 15:]
    assert_within(cache.attend(q[:, :, 15:]), expected, attention_bound(*double(q, k, v)))
    with pytest.raises(ValueError, match="no tokens to attend to, queries of 5 came"):
        cache.attend(q[:, :, 15:])


@pytest.mark.parametrize("forget", ["reset", "crop", "map_batch"])
def test_attend_needs_its_update(forget):
    q, k, v = sequence(20)
    cache = cache_of()
    cache.update(k, v)
    {"reset": cache.reset, "crop": lambda: cache.crop(19), "map_batch": lambda: cache.map_batch(torch.clone)}[forget]()
    with pytest.raises(ValueError, match="attend follows the update"):
        cache.attend(q)


@pytest.mark.parametrize("length", [-1, 21])
def test_crop_refuses(length):
    cache = cache_of()
    cache.update(*sequence(20)[1:])
    before = snapshot(cache)
    with pytest.raises(ValueError, match=f"cannot crop to {length} tokens, the cache holds 20"):
        cache.crop(length)
    assert_same(cache, before)


def test_a_static_cache_moves_as_a_dynamic_one_and_keeps_its_capacity():
    _, k, v = sequence(60)
    static, dynamic = cache_of(static=True), cache_of()
    shapes = {}
    for part, plan_layer in enumerate([LOWER, HIGHER, PLAN, LOWER, PLAN]):
        tokens = slice(12 * part, 12 * part + 12)
        for cache in (static, dynamic):
            cache.update(k[:, :, tokens], v[:, :, tokens])
            cache.repack(plan_layer)
        assert all(torch.equal(a, b) for a, b in zip(history(static), history(dynamic), strict=True))
        now = [t.shape for t in (*static.k_history.tensors, *static.v_history.tensors)]
        assert shapes.setdefault(plan_layer, now) == now
        assert all(shape[2] == 60 - 8 - 2 + 1 for shape in now)


def test_a_static_cache_takes_its_memory_before_its_tokens():
    q, k, v = sequence(30)
    cache, other = cache_of(static=True), cache_of(static=True)
    cache.allocate(k[:, :, :0], v[:, :, :0])
    size = cache.nbytes
    assert torch.equal(decode(cache, q, k, v, [30]), decode(other, q, k, v, [30]))
    assert cache.nbytes == other.nbytes == size
    for full in (cache, cache_of()):
        with pytest.raises(ValueError, match="only an empty static cache takes its memory at once"):
            full.allocate(k, v)


@static_or_not
def test_repack_needs_a_history(static):
    with pytest.raises(ValueError, match="a cache without history has none; build a new cache"):
        cache_of(None, static=static).repack(LOWER)


@pytest.mark.parametrize(
    ("cache", "tokens", "message"),
    [
        (cache_of(static=True), 1, "a static cache keeps all its tokens; evict them from a dynamic one"),
        (cache_of(), -1, "cannot evict -1 tokens; give 0 or more"),
    ],
    ids=["static", "negative"],
)
def test_drop_refuses(cache, tokens, message):
    with pytest.raises(ValueError, match=message):
        cache.evict(tokens)
    assert cache.dropped == 0


def test_repack_to_another_dimension_changes_nothing():
    q, k, v = sequence(20)
    cache = cache_of()
    decode(cache, q, k, v, [20])
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"of \(16, 8\) coordinates, .* for \(16, 16\)"):
        cache.repack(LayerPlan(LOWER.keys, Graded.leading(D, 4)))
    assert_same(cache, before)


def test_repr():
    assert "prefill='chunk', max_length=9" in repr(KVCache(None, static=True, max_length=9))
    assert "keep=6" in repr(cache_of())
