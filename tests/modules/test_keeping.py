"""Caches that drop the tokens that drew least attention, beside plain code that knows only the rule."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swan import Graded, KVCache, LayerPlan, TopK, pack, unpack
from swan.modules.keeping import NEWEST, PAGE, PAGES, attention_received

D, KV_HEADS, GROUP = 16, 2, 3
LAYERS = {
    "graded": LayerPlan(Graded(((8, 8), (8, 4))), Graded(((16, 5),))),
    "topk": LayerPlan(TopK(D, 10), TopK(D, 12)),
}


def text(tokens, *, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, heads, tokens, D, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    return 2 * q, k, v * torch.rand(batch, KV_HEADS, tokens, 1, generator=generator).to(dtype)


def cache_of(layer="graded", **settings):
    return KVCache(LAYERS[layer], **({"buffer": PAGE, "sinks": 2, "prefill": "windowed", "keep": 0.5} | settings))


def run(cache, q, k, v, sizes, padding=None):
    outs, start = [], 0
    for size in sizes:
        new = slice(start, start + size)
        outs.append(cache(q[:, :, new], k[:, :, new], v[:, :, new], padding=padding))
        start += size
    return torch.cat(outs, dim=2)


def plain(q, k, v, layer, keep, buffer, sinks):
    """Decode token by token in float64, by the rule alone; return outputs and the columns that stay, for each KV head.

    A score is compared where it is far from the next one, so that steps of an eighth of an octave hold.
    """
    q, k, v = q[0].double(), k[0].double(), v[0].double()
    k_stored, v_stored = (
        unpack(pack(x[None].float(), layout))[0].double() for x, layout in ((k, layer.keys), (v, layer.values))
    )
    alive = [set() for _ in range(KV_HEADS)]
    means: list[dict[int, float]] = [{} for _ in range(KV_HEADS)]
    outputs = torch.zeros_like(q)
    for i in range(q.shape[1]):
        for head in range(KV_HEADS):
            left = i - buffer
            if left >= sinks:
                alive[head].add(left)
            recent = sorted({*range(min(sinks, i + 1)), *range(max(i - buffer + 1, 0), i + 1)})
            packed = sorted(alive[head])
            keys = torch.cat([k[head, recent], k_stored[head, packed]])
            values = torch.cat([v[head, recent], v_stored[head, packed]])
            for row in range(head * GROUP, (head + 1) * GROUP):
                outputs[row, i] = (keys @ q[row, i] * D**-0.5).softmax(0) @ values
        if (i + 1) % PAGE:
            continue
        for head in range(KV_HEADS):
            packed = sorted(alive[head])
            if not packed:
                continue
            sums = dict.fromkeys(packed, 0.0)
            for query in range(i + 1 - PAGE, i + 1):
                recent = sorted({*range(sinks), *range(i - buffer + 1, query + 1)})
                keys = torch.cat([k[head, recent], k_stored[head, packed]])
                for row in range(head * GROUP, (head + 1) * GROUP):
                    weights = (keys @ q[row, query] * D**-0.5).softmax(0)[len(recent) :]
                    for token, weight in zip(packed, weights.tolist(), strict=True):
                        sums[token] += weight / PAGE
            for token, mean in sums.items():
                old = means[head].get(token)
                new = mean if old is None else (1 - NEWEST) * old + NEWEST * mean
                means[head][token] = 2 ** (round(math.log2(new) * 8) / 8)
            left = i + 1 - buffer - sinks
            surplus = len(packed) - math.ceil(keep * left)
            worst = sorted(packed, key=lambda j: means[head][j] * v_stored[head, j].norm().item())
            alive[head] -= set(worst[: max(surplus, 0)])
    return outputs, alive


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_decoding_is_that_of_plain_code(layer, keep):
    q, k, v = text(5 * PAGE + 7)
    cache = cache_of(layer, keep=keep)
    found = run(cache, q, k, v, [1] * q.shape[2])
    expected, alive = plain(q, k, v, LAYERS[layer], keep, PAGE, 2)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-2, atol=2e-3)
    assert cache.history_length == len(alive[0]) == len(alive[1])
    stored = unpack(cache.state.k_history.tokens(0, cache.history_length))[0]
    for head in range(KV_HEADS):
        torch.testing.assert_close(stored[head], unpack(pack(k, LAYERS[layer].keys))[0, head, sorted(alive[head])])


@given(st.lists(st.integers(1, 150), min_size=1, max_size=6), st.sampled_from([0.2, 0.5, 1.0]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_windowed_the_split_into_chunks_does_not_matter(sizes, keep, padded):
    q, k, v = text(sum(sizes), batch=2)
    padding = torch.tensor([0, 11]) if padded else None
    whole, parts = cache_of(keep=keep), cache_of(keep=keep)
    a, b = run(whole, q, k, v, [sum(sizes)], padding), run(parts, q, k, v, sizes, padding)
    torch.testing.assert_close(a[0], b[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(a[1, :, 11:], b[1, :, 11:], rtol=1e-2, atol=1e-3)
    assert (whole.length, whole.history_length, whole.dropped) == (parts.length, parts.history_length, parts.dropped)
    if whole.state.scores is not None:
        assert (whole.state.scores.int() - parts.state.scores.int()).abs().max() <= 1  # sums in another order


def test_padding_goes_first_and_changes_nothing_else():
    """Until the first choice a padded row is as if it were alone; then its padding goes, where alone tokens go."""
    q, k, v = text(4 * PAGE, seed=3)
    pad = PAGE  # a whole page
    padded = [torch.nn.functional.pad(t, (0, 0, pad, 0)) for t in (q, k, v)]
    alone, beside = cache_of(keep=0.9), cache_of(keep=0.9)
    a = run(alone, q, k, v, [q.shape[2]])
    b = run(beside, *padded, [q.shape[2] + pad], torch.tensor([pad]))[:, :, pad:]
    before = 2 * PAGE  # the first choice
    torch.testing.assert_close(a[:, :, :before], b[:, :, :before], rtol=1e-4, atol=1e-5)
    assert alone.dropped < beside.dropped <= pad  # of the padding
    kept = unpack(beside.state.k_history.tokens(0, beside.history_length))[:, :, pad - beside.dropped :]
    torch.testing.assert_close(kept, unpack(pack(k, LAYERS["graded"].keys))[:, :, 2 : 2 + kept.shape[2]])


def test_attention_received_is_the_sum_of_weights():
    q, k, v = text(3 * PAGE + 5, dtype=torch.float64)
    cache = cache_of(keep=1.0)
    cache(q, k, v)
    stored, start = cache.history_length, cache.history.start
    kept = unpack(cache.state.k_history.tokens(0, stored))
    column = q.shape[2] - 20
    found, seen = attention_received(cache.state, cache.history, cache.buffer, column, q[:, :, -20:])
    columns = torch.cat(
        [torch.arange(2), torch.arange(start, start + stored), torch.arange(start + stored, q.shape[2])]
    )
    keys = torch.cat([k[:, :, :2], kept, k[:, :, start + stored :]], dim=2).repeat_interleave(GROUP, dim=1)
    scores = q[:, :, -20:] @ keys.mT * D**-0.5
    scores.masked_fill_(columns > torch.arange(column, q.shape[2])[:, None], -math.inf)
    expected = scores.softmax(-1)[..., 2 : 2 + stored].unflatten(1, (KV_HEADS, GROUP)).sum((2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert (seen == 20).all()


def test_a_prompt_is_scored_by_its_last_pages():
    q, k, v = text((PAGES + 3) * PAGE + 9)
    chunk = cache_of(prefill="chunk", keep=0.5)
    out = chunk(q, k, v)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)  # a chunk sees itself dense
    left = q.shape[2] - PAGE - 2
    assert chunk.history_length == math.ceil(0.5 * left) and chunk.dropped == left - chunk.history_length
    assert chunk.state.observed == (PAGES + 3) * PAGE
    changed = q.clone()
    changed[:, :, : 2 * PAGE] = 0  # pages before the last ones
    other = cache_of(prefill="chunk", keep=0.5)
    other(changed, k, v)
    assert torch.equal(other.state.scores, chunk.state.scores)


def test_bytes_are_counted():
    q, k, v = text(20 * PAGE)
    cache, full = cache_of(keep=0.25), cache_of(keep=None)
    for each in (cache, full):
        run(each, q, k, v, [q.shape[2]])
    layer, stored = LAYERS["graded"], cache.history_length
    capacity = cache.history.capacity
    vector = layer.keys.vector_bytes() + layer.values.vector_bytes()
    recent = 2 * KV_HEADS * (PAGE + 2) * D * 4
    queries = KV_HEADS * GROUP * PAGE * D * 4
    assert cache.nbytes == KV_HEADS * (capacity * vector + cache.state.scores.shape[2]) + recent + queries
    assert capacity - stored <= 2 * PAGE
    assert cache.nbytes < full.nbytes


def test_evict_drops_those_of_least_score():
    q, k, v = text(4 * PAGE)
    by_score, by_age = cache_of(keep=1.0), cache_of(keep=None)
    for each in (by_score, by_age):
        run(each, q, k, v, [q.shape[2]])
        each.evict(20)
    assert by_score.history_length == by_age.history_length
    kept = unpack(by_score.state.k_history.tokens(0, by_score.history_length))
    assert not torch.equal(kept, unpack(by_age.state.k_history.tokens(0, by_age.history_length)))
    by_score.evict(10_000)  # more than there are scores, or tokens
    assert by_score.history_length == 0
    cache_of(keep=1.0).load_state_dict(by_score.state_dict())
    run(by_score, *(t[:, :, :3] for t in (q, k, v)), [1, 1, 1])


@pytest.mark.parametrize("change", ["copy", "state dict", "rows", "repack", "to"])
def test_goes_on_after(change):
    q, k, v = text(4 * PAGE + 10)
    cache, n = cache_of(), 3 * PAGE + 17
    run(cache, *(t[:, :, :n] for t in (q, k, v)), [n])
    match change:
        case "copy":
            other = copy.deepcopy(cache)
        case "state dict":
            other = cache_of()
            other.load_state_dict(cache.state_dict())
        case "rows":
            other = copy.deepcopy(cache)
            other.map_batch(lambda t: t.repeat_interleave(2, dim=0))
            other.map_batch(lambda t: t[1:])
        case "repack":
            other = copy.deepcopy(cache)
            other.repack(LAYERS["graded"])
        case "to":
            other = copy.deepcopy(cache).to(torch.float64).to(torch.float32)
    rest = [t[:, :, n:] for t in (q, k, v)]
    sizes = [1] * rest[0].shape[2]
    torch.testing.assert_close(run(other, *rest, sizes), run(cache, *rest, sizes), rtol=1e-4, atol=1e-5)
    assert torch.equal(other.state.scores, cache.state.scores) and other.dropped == cache.dropped


def test_crop_goes_back_to_the_last_choice():
    q, k, v = text(4 * PAGE + 10)
    cache = cache_of()
    run(cache, q, k, v, [q.shape[2]])
    with pytest.raises(ValueError, match="some were dropped for the sake of later ones"):
        cache.crop(cache.state.chosen - 1)
    cache.crop(4 * PAGE - 2)  # before the end of the last page: it is not looked at twice
    assert cache.length == 4 * PAGE - 2
    scores = cache.state.scores.clone()
    run(cache, *(t[:, :, -12:-4] for t in (q, k, v)), [4, 4])
    assert torch.equal(cache.state.scores, scores)
    cache.crop(0)
    assert cache.length == 0 and cache.state.scores is None and cache.state.queries is None


def test_pages_after_a_crop_are_looked_at():
    """Going back far, the pages that come anew count as the first did."""
    q, k, v = text(6 * PAGE)
    cache = cache_of(keep=1.0)
    run(cache, q, k, v, [q.shape[2]])
    cache.crop(PAGE + 6)
    run(cache, *(t[:, :, PAGE + 6 : 4 * PAGE] for t in (q, k, v)), [40, 3 * PAGE - 46])
    assert cache.state.observed == 4 * PAGE and cache.state.scores.shape[2] == cache.history_length > 0


@pytest.mark.parametrize("saved", [False, True], ids=["goes on", "saved"])
@pytest.mark.parametrize("lonely", [1, 10])
def test_a_page_with_a_token_that_nobody_asked_for_is_not_looked_at(lonely, saved):
    """Its old queries would count a second time; the page after it counts whole."""
    q, k, v = text(4 * PAGE)
    cache, at = cache_of(), 2 * PAGE + 20
    run(cache, *(t[:, :, :at] for t in (q, k, v)), [at])
    scores = cache.state.scores.clone()
    cache.update(k[:, :, at : at + lonely], v[:, :, at : at + lonely])
    if saved:
        tensors, cache = cache.state_dict(), cache_of()
        cache.load_state_dict(tensors)
    rest = [t[:, :, at + lonely :] for t in (q, k, v)]
    run(cache, *(t[:, :, : 44 - lonely] for t in rest), [10, 34 - lonely])
    assert cache.length == 3 * PAGE and torch.equal(cache.state.scores, scores)
    run(cache, *(t[:, :, -PAGE:] for t in rest), [PAGE])
    assert cache.state.observed == 4 * PAGE and not torch.equal(cache.state.scores, scores)
    assert cache.history_length == math.ceil(0.5 * (3 * PAGE - 2))


def test_masks_may_hide_padding_only_once_tokens_were_chosen():
    q, k, v = text(3 * PAGE)
    cache = cache_of()
    run(cache, q, k, v, [q.shape[2]])
    one, seen = [t[:, :, :1] for t in (q, k, v)], torch.ones(1, 1, 1, q.shape[2] + 1, dtype=torch.bool)
    before = cache.length
    seen[..., 5] = False
    with pytest.raises(ValueError, match="a mask can hide left padding of its first 128 columns, and nothing else"):
        cache(*one, mask=seen)
    assert cache.length == before
    seen[..., 5] = True
    expected = copy.deepcopy(cache)(*one)
    torch.testing.assert_close(cache(*one, mask=seen), expected)


def test_masks_of_a_call_that_drops_tokens_on_its_way():
    q, k, v = text(4 * PAGE)
    cache, causal = cache_of(), torch.ones(1, 1, 4 * PAGE, 4 * PAGE, dtype=torch.bool).tril()
    torch.testing.assert_close(cache(q, k, v, mask=causal), run(cache_of(), q, k, v, [4 * PAGE]))
    hiding, cache = causal.clone(), cache_of()
    hiding[:, :, 2 * PAGE, 5] = False  # the first choice was at 2 * PAGE
    with pytest.raises(ValueError, match="a mask can hide left padding of its first 64 columns, and nothing else"):
        cache(q, k, v, mask=hiding)
    assert cache.length == 0
    earlier = causal.clone()
    earlier[:, :, 2 * PAGE - 1, 5] = False
    assert not torch.equal(cache(q, k, v, mask=earlier), run(cache_of(), q, k, v, [4 * PAGE]))


def test_queries_of_another_number_of_heads_are_refused():
    q, k, v = text(PAGE + 9)
    cache = cache_of()
    run(cache, q, k, v, [q.shape[2]])
    fewer = [t[:, :KV_HEADS, :3] for t in (q, k, v)]
    with pytest.raises(ValueError, match="by the attention of 6 query heads, got 2"):
        cache(*fewer)
    assert cache.length == q.shape[2]


def test_update_stops_where_the_history_is_looked_at():
    q, k, v = text(2 * PAGE)
    cache = cache_of()
    with pytest.raises(ValueError, match="looks at its history after 64 more tokens"):
        cache.update(k, v)
    assert cache.length == 0
    outs = []
    for half in (slice(0, PAGE), slice(PAGE, 2 * PAGE)):
        outs.append(cache.attend(q[:, :, half], cache.update(k[:, :, half], v[:, :, half])))
    torch.testing.assert_close(torch.cat(outs, dim=2), run(cache_of(), q, k, v, [2 * PAGE]))


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, math.nan])
def test_keep_is_a_share(keep):
    with pytest.raises(ValueError, match="keep is the share of tokens that stay, above 0 and at most 1"):
        cache_of(keep=keep)


def test_keep_needs_a_dynamic_cache_with_a_history():
    with pytest.raises(TypeError, match="a number, got str"):
        cache_of(keep="half")
    with pytest.raises(ValueError, match="a static cache keeps all its tokens"):
        cache_of(static=True, max_length=100)
    with pytest.raises(ValueError, match="a cache without history has none to keep"):
        KVCache(None, keep=0.5)


@pytest.mark.parametrize("name", ["observed", "chosen", "queries", "scores"])
def test_saved_states_are_checked(name):
    q, k, v = text(4 * PAGE)
    cache = cache_of()
    run(cache, q, k, v, [q.shape[2]])
    good = cache.state_dict()
    for broken in (good[name].double(), good[name][..., :-1] if good[name].ndim else torch.tensor(10**9 + 1)):
        if name == "scores" and broken.dtype == torch.uint8:
            continue  # fewer scores than tokens are what a page leaves
        with pytest.raises(ValueError, match="saved cache"):
            cache_of().load_state_dict(good | {name: broken})
    with pytest.raises(ValueError, match="of a saved cache must be nothing"):
        cache_of(keep=None).load_state_dict(good)
