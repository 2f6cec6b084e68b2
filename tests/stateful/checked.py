"""A cache of one layer with its oracle beside it: what both do, and the comparison of all that can be seen."""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from swan import KVCache, LayerPlan
from swan.kernels import cpu
from tests.modules.caches import reachable
from tests.stateful.layouts import U32, assert_stored, is_mixed, mixed, plain, read, unit
from tests.stateful.oracle import Answer, Oracle, mean_of

__all__ = [
    "assert_answer",
    "assert_holds",
    "assert_refused",
    "assert_same",
    "follow_choice",
    "follow_dtype",
    "image",
    "product_error",
]


def assert_answer(
    found: Tensor, answer: Answer, plan_layer: LayerPlan | None, *, impl: str, d: int, rotated: bool = False
) -> None:
    """Compare an output with the exact one, to a bound derived from the roundings on its way.

    An error `delta` of all scores changes a weight by a factor of at most exp(2 delta), so the output by that of the
    sum of weights times magnitudes. Scores are off by the roundings of a product of `d` numbers; by those of mixing
    queries, in the dtype with a matrix rounded to it, and of unpacked keys; in half precision by exponentials (2**-13).
    A kernel may round queries to 2**-15 of their largest coordinate, weights times scales to 2**-15 of their largest.
    """
    u, dv = unit(found.dtype), found.shape[-1]
    half_precision = found.dtype in (torch.bfloat16, torch.float16)
    packs, n = plan_layer is not None, answer.columns
    mixes_values = plan_layer is not None and is_mixed(plan_layer.values)
    delta = product_error(answer.score, n, plan_layer, found.dtype, d) + (2.0**-13 if half_precision else 0)
    magnitudes = answer.dense + answer.packed
    lost = mixes_values * (3 + dv**0.5) * u * answer.packed.norm(dim=-1, keepdim=True)
    if impl in ("auto", "cpp") and packs and found.dtype != torch.float64 and cpu.variant() != "generic":
        delta = delta + d**0.5 * 2.0**-15 * answer.score
        lost = lost + dv**0.5 * n * 2.0**-14 * answer.largest
    if rotated:  # of queries, keys and values, and of the output back
        delta = delta + 2 * (u + d * U32) * answer.score
        lost = lost + (4 * u + 2 * dv * U32) * magnitudes.norm(dim=-1, keepdim=True) * (1 + u * dv**0.5)
    bound = (torch.expm1(2 * delta) + 4 * u + 2 * n * U32) * magnitudes + lost
    if rotated:
        bound = bound.norm(dim=-1, keepdim=True) * (1 + dv**0.5 * u)
    bound = bound + torch.finfo(found.dtype).smallest_normal
    assert found.shape == answer.out.shape, f"an output of {list(found.shape)}, expected {list(answer.out.shape)}"
    assert found.isfinite().all(), "the output is not finite"
    error = (found.double() - answer.out).abs()
    worst = (error - bound).max()
    assert worst <= 0, f"the output is off by {worst:.3g} more than its bound, of {bound.max():.3g} at most"


def product_error(largest: Tensor, columns: int, plan_layer: LayerPlan | None, dtype: torch.dtype, d: int) -> Tensor:
    """Bound how far a product of a query and a key, and a log-sum-exp of those, may be off in float32."""
    u, delta = unit(dtype), U32 * ((d + 16) * largest + columns + 16)
    return delta if plan_layer is None else delta + (u + is_mixed(plan_layer.keys) * (2 + d**0.5) * u) * largest


def assert_holds(kv: KVCache, oracle: Oracle, old: LayerPlan | None, uncertain: float = 0.0) -> None:
    """Compare counts and every stored byte; tokens that were packed since the last look are filled into the oracle.

    Args:
        kv: the cache.
        oracle: what it should hold.
        old: the layouts at the last look: if they have changed, all tokens have been packed anew since.
        uncertain: how far a coordinate that was stored may be from the oracle's, relative to its vector's length.
    """
    stored = oracle.stored
    counts, expected = (kv.length, kv.history_length, kv.dropped), (oracle.length, len(stored), oracle.dropped)
    assert counts == expected, f"length, history_length and dropped are {counts}, not {expected}"
    assert kv.nbytes == sum(reachable(kv).values()), "counted bytes are those of the storages"
    assert_scores(kv, oracle)
    recent = kv.state.k_recent, kv.state.v_recent
    dense = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in recent if t is not None)
    assert kv.dense_nbytes == oracle.length * dense
    if not stored:
        return
    new = kv.plan_layer
    histories = kv.state.k_history, kv.state.v_history
    layouts = zip(_layouts(old), _layouts(new), histories, ("keys", "values"), strict=True)
    first = max(oracle.known, stored.start)  # of the columns that are not filled in
    for before, now, history, name in layouts:
        assert history is not None and history.format == now and history.dtype == recent[0].dtype
        dense, packed = getattr(oracle, name), getattr(oracle, f"packed_{name}")
        here = history.tokens(0, len(stored))
        known, fresh = here.tokens(0, first - stored.start), here.tokens(first - stored.start, len(stored))
        filled = packed.clone()
        source = packed[:, :, stored.start : first]
        if before == now:
            change = (plain(read(known)[0], now) - source).abs()
            assert (change <= 1e-13 * source.norm(dim=-1, keepdim=True)).all(), f"stored {name} have changed"
        else:
            filled[:, :, stored.start : first] = assert_stored(
                known, source, unpacked_error(source, before, here.dtype)
            )
        source = dense[:, :, first : stored.stop]
        filled[:, :, first : stored.stop] = assert_stored(fresh, source, uncertain * source.norm(dim=-1, keepdim=True))
        setattr(oracle, f"packed_{name}", filled)
    oracle.known = stored.stop


def assert_scores(kv: KVCache, oracle: Oracle) -> None:
    """Compare the bytes of scores with what they may be, and go on with them."""
    scores = kv.state.scores
    assert (scores is None) == (oracle.scores is None), "tokens have scores when a page has seen them"
    if scores is not None and oracle.scores is not None:
        low, high = oracle.scores
        assert scores.shape == low.shape, f"scores of {list(scores.shape)} tokens, not {list(low.shape)}"
        assert ((low <= scores) & (scores <= high)).all(), "a score is none that it may be"
        oracle.scores = scores.double(), scores.double()


def follow_choice(kv: KVCache, oracle: Oracle, drop: int) -> None:
    """Read from a cache which tokens it has dropped by score, check that it may drop these, and go on without them.

    Args:
        kv: the cache after the choice.
        oracle: what it held before, every byte of it read, and what the scores may have been by then.
        drop: how many tokens go.
    """
    if not drop:
        return
    stored, scores = len(oracle.stored), kv.state.scores
    assert kv.history_length == stored - drop, f"of {stored} tokens {drop} should go, {kv.history_length} are there"
    assert scores is not None and scores.shape[2] == oracle.scored - drop, "scores stay with their tokens"
    places = places_before(kv, oracle, scores)
    assert_best_stay(kv, oracle, scores, places[:, :, : scores.shape[2]])
    oracle.choose(places, scores)


def places_before(kv: KVCache, oracle: Oracle, scores: Tensor) -> Tensor:
    """Find each stored token among those that were stored before: the same bytes and a score that it may have."""
    assert oracle.packed_keys is not None and oracle.packed_values is not None and oracle.scores is not None
    stored, scored, now = len(oracle.stored), oracle.scored, kv.history_length
    here = slice(oracle.stored.start, oracle.stored.stop)
    before = torch.cat([oracle.packed_keys[:, :, here], oracle.packed_values[:, :, here]], dim=-1)
    if now == 0:
        return torch.zeros(*before.shape[:2], 0, dtype=torch.long)
    histories = zip((kv.state.k_history, kv.state.v_history), _layouts(kv.plan_layer), strict=True)
    after = torch.cat([plain(read(packed.tokens(0, now))[0], layout) for packed, layout in histories], dim=-1)
    fits = torch.cdist(after, before, p=math.inf) <= 1e-12 * before.norm(dim=-1)[:, :, None]
    kept = scores.shape[2]
    low, high, score = oracle.scores[0][:, :, None], oracle.scores[1][:, :, None], scores[..., None]
    fits[:, :, :kept, :scored] &= (low <= score) & (score <= high)
    fits[:, :, :kept, scored:] = fits[:, :, kept:, :scored] = False
    fits[:, :, kept:, scored:] &= torch.eye(stored - scored, dtype=torch.bool)  # all of those without a score stay
    places, last = [], torch.full(before.shape[:2], -1)
    for fitting in fits.unbind(2):  # the first place after that of the token before: if any order fits, this one does
        fitting = fitting & (torch.arange(stored) > last[..., None])
        assert fitting.any(-1).all(), "a token has another score, or was not stored before, or not in this order"
        places.append(last := fitting.int().argmax(-1))
    return torch.stack(places, dim=2)


def assert_best_stay(kv: KVCache, oracle: Oracle, scores: Tensor, places: Tensor) -> None:
    """Check that no dropped token ranks above one that stays, as far as scores and lengths of values are known."""
    assert oracle.scores is not None and oracle.packed_values is not None and kv.plan_layer is not None
    column = torch.tensor([*oracle.stored][: oracle.scored])
    values = oracle.packed_values[:, :, column]
    lengths, error = (
        values.norm(dim=-1),
        unpacked_error(values, kv.plan_layer.values, kv.state.v_recent.dtype).norm(dim=-1),
    )
    padding = (column < torch.tensor(oracle.padding)[:, None, None] + oracle.sinks).expand_as(lengths)
    least = (mean_of(oracle.scores[0]) * (lengths - error).clamp(min=0) * (1 - 1e-5)).masked_fill(padding, -1)
    most = (mean_of(scores) * (lengths + error).gather(2, places)).masked_fill(padding.gather(2, places), -1)
    above = least.scatter(2, places, -1).amax(-1, keepdim=True) > most
    assert not above.any(), "a token was dropped that ranks above one that stays"


def unpacked_error(x: Tensor, layout, dtype: torch.dtype) -> Tensor:
    """Bound the rounding of vectors that were unpacked in a dtype, in which the smallest numbers have equal steps."""
    u, least = unit(dtype), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    if not is_mixed(layout):
        return (u + 4 * U32) * x.abs() + least  # scales are powers in float32, like products with them
    return least + (3 * u + layout.d * U32) * layout.d**0.5 * x.norm(dim=-1, keepdim=True).expand_as(x)


def follow_dtype(kv: KVCache, oracle: Oracle) -> None:
    """Check a history whose cache was converted: numbers stored as they are were rounded, codes stayed."""
    stored = oracle.stored
    if not stored:
        return
    columns = slice(stored.start, stored.stop)
    histories = kv.state.k_history, kv.state.v_history
    for layout, history, name in zip(_layouts(kv.plan_layer), histories, ("packed_keys", "packed_values"), strict=True):
        values, half = read(history.tokens(0, len(stored)))
        was = mixed(getattr(oracle, name)[:, :, columns], layout)
        limit = torch.where(half == 0, unit(history.dtype) * was.abs() + torch.finfo(history.dtype).tiny, 1e-12)
        assert ((values - was).abs() <= limit).all(), f"{name} are others in {history.dtype}"
        now = getattr(oracle, name).clone()
        now[:, :, columns] = plain(values, layout)
        setattr(oracle, name, now)


def assert_refused(call: Callable[[], object], message: str, shown: Callable[[], object]) -> None:
    """Check that a call raises a clear error, and that all that is `shown` stays as it was."""
    before = shown()
    try:
        call()
    except (ValueError, TypeError) as error:
        assert re.search(message, str(error)), f"expected an error about {message!r}, got: {error}"
    else:
        raise AssertionError(f"no error about {message!r}")
    assert shown() == before, f"a refused call ({message}) has changed something"


def assert_same(kv: KVCache, other: KVCache) -> None:
    """Compare all that two caches would save, bit for bit.

    But for the greatest padding, which only has to be large enough: it is counted anew when padding is given again.
    """
    one, two = kv.state_dict(), other.state_dict()
    assert one.keys() == two.keys(), f"the caches hold {sorted(one)} and {sorted(two)}"
    for name, t in one.items():
        if name == "padded":
            continue
        assert torch.equal(t, two[name]), f"{name} of the caches differ"


def image(kv: KVCache) -> tuple:
    """All that a cache holds and says, to be compared bit for bit."""
    tensors = [
        (t.dtype, t.shape, t.data_ptr(), t.contiguous().flatten().view(torch.uint8).tolist()) for t in kv.tensors
    ]
    looked = kv.state.observed, kv.state.chosen
    return tensors, kv.length, kv.history_length, kv.dropped, kv.plan_layer, kv.nbytes, looked


def _layouts(plan_layer: LayerPlan | None) -> tuple:
    return (None, None) if plan_layer is None else (plan_layer.keys, plan_layer.values)
