"""Rivals that drop tokens: which ones go, what queries see then, and what is counted."""

import pytest
import torch

from swan import Graded, LayerPlan
from swan.evaluation.baselines import Eviction, fit_linear_scores
from swan.evaluation.baselines.eviction import (
    EvictingCache,
    ExpectedAttention,
    Linear,
    Received,
    Scorer,
    features,
    received_later,
)
from swan.evaluation.perplexity import evaluate
from swan.functional import reference
from tests.strategies import normal, one_thread  # noqa: F401
from tests.tiny import calibration_of, tiny, tokens

BUFFER, SINKS, D = 8, 2, 16
DIMS = ((32, 32),) * 2


class ByFirstCoordinate(Scorer):
    """A score that a test can set: the first coordinate of the key, over the length of the value."""

    def see(self, q, keys, scale):
        pass

    def scores(self, keys, values, scale):
        return keys[..., 0] / values.norm(dim=-1)


def cache_of(share, bits=16, scorer=None):
    plan_layer = LayerPlan(*[Graded(((D, bits),))] * 2)
    return EvictingCache(plan_layer, share, scorer or ByFirstCoordinate(), BUFFER, SINKS)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("sizes", [[40], [25, 15], [20] + [1] * 20])
def test_queries_see_sinks_their_buffer_and_what_stays(bits, sizes):
    cache, tokens = cache_of(0.5, bits), 40
    k, v, q = normal(0, 1, 2, tokens, D), normal(1, 1, 2, tokens, D), normal(2, 1, 4, tokens, D)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        out = cache(q[:, :, part], k[:, :, part], v[:, :, part], impl="compiled")
        start += size
    # the last query: what stays is the better half, chosen anew after each chunk of those that stayed before
    staying, kept = 0, torch.zeros(2, tokens, dtype=torch.bool)
    for size in sizes:
        staying += size
        left = max(staying - BUFFER, SINKS)
        alive = kept.clone()
        alive[:, max(staying - size - BUFFER, SINKS) : left] = True
        score = k[0, :, :, 0].masked_fill(~alive, -torch.inf)
        best = score.topk((left - SINKS) // 2).indices
        kept = torch.zeros_like(kept).scatter(1, best, value=True)
    assert torch.equal(cache.kept[0], kept[:, SINKS : tokens - BUFFER])
    layout = Graded(((D, bits),))
    stored = [torch.cat([x[:, :, :SINKS], unpacked(x[:, :, SINKS:32], layout), x[:, :, 32:]], dim=2) for x in (k, v)]
    seen = kept.clone()
    seen[:, :SINKS] = seen[:, 32:] = True
    mask = seen.repeat_interleave(2, dim=0)[None, :, None]
    expected, _ = reference.dense_attention(q[:, :, -1:].double(), *(x.double() for x in stored), mask=mask)
    torch.testing.assert_close(out[:, :, -1:].double(), expected, rtol=1e-5, atol=1e-5)


def unpacked(x, layout):
    from swan import pack, unpack

    return unpack(pack(x, layout))


def test_bytes_are_those_of_what_stays():
    whole, half = (cache_of(share) for share in (1.0, 0.5))
    for cache in (whole, half):
        cache(normal(0, 1, 4, 40, D), normal(1, 1, 2, 40, D), normal(2, 1, 2, 40, D))
    assert whole.nbytes - half.nbytes == 15 * 2 * 2 * D * 4  # of 30 tokens, two heads, keys and values
    assert Eviction("snapkv", 0.5, DIMS).retention == 0.5
    assert Eviction("snapkv", 0.5, DIMS, 4).retention == 0.5 * (16 + 1) / 64


def test_expected_attention_is_that_of_normal_queries():
    d, count = 8, 20_000
    mean, mix = 2 * normal(0, d), normal(1, d, d) / 2
    q = mean + normal(2, 1, 1, count, d) @ mix
    keys, scale = normal(3, 1, 1, 6, d), 0.4
    scorer = ExpectedAttention()
    for part in q.split(7000, dim=2):
        scorer.see(part, keys, scale)
    weights = (scale * q @ keys.mT).double().exp().mean(2)
    torch.testing.assert_close(
        scorer.scores(keys, keys, scale).double(), weights / weights.sum(-1, keepdim=True), rtol=0.1, atol=0
    )


def test_attention_received_in_the_buffer():
    """A key that one query of its buffer looks for is found; what later queries look for is not known."""
    q, keys = torch.zeros(1, 2, 30, 4), torch.zeros(1, 1, 30, 4)
    keys[0, 0, 10, 0] = keys[0, 0, 20, 1] = 1
    q[0, :, 14, 0] = q[0, :, 29, 1] = 50
    scorer = Received(BUFFER)
    for start in (0, 12, 24):
        part = slice(start, start + 12)
        scorer.see(q[:, :, part], keys[:, :, : start + 12], 1.0)
    received = scorer.received[0, 0]
    uniform = sum(2 / n for n in range(11, 11 + BUFFER))
    assert received[10].item() == pytest.approx(uniform - 2 / 15 + 2, rel=1e-4)
    assert received[9].item() == pytest.approx(sum(2 / n for n in range(10, 10 + BUFFER)) - 2 / 15, rel=1e-4)
    assert received[20] < received[10] - 1  # the query that looks for it comes later
    pooled = scorer.scores(keys[:, :, :22], keys[:, :, :22], 1.0)[0, 0]
    assert pooled[11].item() == pytest.approx(received[9:14].mean().item(), rel=1e-5)
    assert pooled[21].item() == pytest.approx(received[19:22].mean().item(), rel=1e-5)


def test_linear_scores_are_fitted():
    """Attention that follows a direction of the key is predicted: the fit is close, and a random order is not."""
    model = tiny(head_dim=32)
    calibration = calibration_of(model)
    weights = fit_linear_scores(model, [tokens(4, 120, seed=s) for s in range(3)], calibration, buffer=BUFFER)
    assert [w.shape for w in weights] == [(2, 67)] * 2
    k, v, direction = normal(0, 1, 1, 400, 6), normal(1, 1, 1, 400, 6), normal(2, 6)
    q = direction.expand(1, 2, 400, 6)
    later = received_later(q, k, 1.0, BUFFER).log()
    x = features(k, v)[:, :, : later.shape[-1]]
    fitted = torch.linalg.lstsq(x[0, 0], later[0, 0]).solution
    expected = Linear(fitted[None]).scores(k, v, 1.0)[0, 0].log()
    assert torch.corrcoef(torch.stack([expected, k[0, 0] @ direction]))[0, 1] > 0.98


def test_scored_on_a_model():
    model, ids = tiny(head_dim=32), tokens(2, 200)
    calibration = calibration_of(model)
    linear = fit_linear_scores(model, [tokens(4, 120, seed=s) for s in range(3)], calibration, buffer=16)
    scores = ("expected attention", "snapkv", "linear score")
    methods = [
        Eviction(s, share, DIMS, bits, linear, 16)
        for s in scores
        for share, bits in ((1.0, 16), (0.7, 16), (0.3, 16), (0.7, 4))
    ]
    _, *rows = evaluate(model, ids, methods, calibration)
    for everything, most, few, coded in zip(*[iter(rows)] * 4, strict=True):
        assert everything["kl"] == pytest.approx(0, abs=1e-6)
        assert 0 < most["kl"] < few["kl"]
        assert most["kl"] < coded["kl"]
        assert coded["settings"] == {"share": 0.7, "buffer": 16, "sinks": 4}
        assert coded["form"] == f"{most['form']}, 4 bit"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "oracle"}, "score must be one of expected attention, snapkv, linear score, got 'oracle'"),
        ({"share": 0.0}, "expected a share above 0 and at most 1, and 4 or 16 bits, got 0.0, 16"),
        ({"bits": 3}, "got 0.5, 3"),
        ({"score": "linear score"}, "needs the weights that fit_linear_scores returns"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Eviction(**{"score": "snapkv", "share": 0.5, "dims": DIMS} | settings)


def test_short_texts_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="texts of more than two buffers, 16 tokens"):
        fit_linear_scores(model, [tokens(1, 16)], calibration_of(model), buffer=8)


def test_padding_is_refused():
    cache = cache_of(0.5)
    with pytest.raises(ValueError, match="without padding"):
        cache(*(normal(0, 1, 2, 4, D) for _ in range(3)), padding=torch.zeros(1))
