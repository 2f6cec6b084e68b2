"""Rivals that keep some tokens only: a token that has left the buffer stays or goes by a score, for each KV head.

Of the tokens that have left the buffer the share with the highest scores stays. That is settled anew after each chunk
(512 tokens in an evaluation), for all queries of the chunk, which is in the rival's favour: they see nothing of tokens
that lose against later ones of their own chunk, and so no more than the share. What has gone does not come back.
Scores are computed from dense keys and values of all tokens, which are not counted, and neither are the scores
themselves nor the lists of what stays: keys are rotated by RoPE already, so attention needs no positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from swan.calibration import Calibration, Plan
from swan.calibration.bases import Basis
from swan.calibration.capture import Observed, call, evaluating, observing
from swan.evaluation.perplexity import CHUNK
from swan.functional import rotate
from swan.functional.dispatch import Impl
from swan.modules import KVCache
from swan.modules.visible import attend
from swan.storage import Graded, LayerPlan

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["EvictingCache", "Eviction", "Score", "fit_linear_scores"]

Score = Literal["expected attention", "snapkv", "linear score"]
POOLED = 5  # neighbouring tokens whose attention is averaged, as in kvpress
RIDGE = 1e-3  # over the mean square of a feature
LEAST_LOG = -30.0  # of an attention of 0


@dataclass(frozen=True)
class Eviction:
    """A share of the history's tokens for each KV head, at 16 bits or at 4.

    Scores, each times the length of the value:

    - ``"expected attention"``: the mean of exp(score) over normal queries with the mean and the covariance of those so
      far, normalized over tokens and averaged over the heads of the group. As in kvpress, but that queries are taken
      as they were rotated, not rotated to the places to come.
    - ``"snapkv"``: the attention that the token received while it was in the buffer, averaged over 5 neighbours.
    - ``"linear score"``: the logarithm of the attention received later, as a linear function of the token's key and
      value that was fitted on calibration text (`fit_linear_scores`): KVzap with the least of its models, which reads
      the hidden state.

    At 4 bits a token takes one scale byte after a Hadamard transform, ``d / 2 + 1`` bytes, rounded up to whole words of
    codes.

    Args:
        score: what tokens are chosen by.
        share: of the tokens that stay, above 0 and at most 1.
        dims: head dimensions of keys and values of each layer; None where it has a sliding window.
        bits: 16 or 4.
        linear: for each layer what `fit_linear_scores` returns, for that score.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.

    Raises:
        ValueError: an unknown score, a share or bits out of range, or a linear score without weights.

    Source: arXiv:2510.00636 (expected attention), arXiv:2404.14469 (SnapKV), arXiv:2601.07891 (KVzap).
    """

    score: Score
    share: float
    dims: tuple[tuple[int, int] | None, ...]
    bits: int = 16
    linear: tuple[Tensor | None, ...] | None = field(default=None, repr=False, compare=False)
    buffer: int = 64
    sinks: int = 4
    basis: Basis | None = field(default="identity", init=False, repr=False)
    seed: int = field(default=0, init=False, repr=False)
    chunk: int = field(default=CHUNK, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {self.score!r}")
        if not 0 < self.share <= 1 or self.bits not in (4, 16):
            raise ValueError(f"expected a share above 0 and at most 1, and 4 or 16 bits, got {self.share}, {self.bits}")
        if self.score == "linear score" and self.linear is None:
            raise ValueError("a linear score needs the weights that fit_linear_scores returns")

    @property
    def form(self) -> str:
        """Return the name of the score, and the bits of what stays if it is coded."""
        return self.score if self.bits == 16 else f"{self.score}, {self.bits} bit"

    @property
    def plan(self) -> Plan:
        """Return the layouts of the tokens that stay."""
        layers = [pair and LayerPlan(*[Graded(((n, self.bits),)) for n in pair]) for pair in self.dims]
        return Plan(tuple(layers), buffer=self.buffer, sinks=self.sinks)

    @property
    def retention(self) -> float:
        """Return the bytes per history token over those in bf16."""
        return self.share * self.plan.retention

    def cache(self, model: "PreTrainedModel") -> "Cache":
        """Make a cache for an attached model."""
        from swan.integrations.transformers import SwanCache
        from swan.integrations.transformers.layers import SwanLayer

        cache = SwanCache(model, self.plan, prefill="windowed")
        for row, index in enumerate(cache.shapes):
            layer = cache.layers[index]
            if isinstance(layer, SwanLayer):
                layer.kv = EvictingCache(layer.kv.plan_layer, self.share, self._scorer(row), self.buffer, self.sinks)
        return cache

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"share": self.share, "buffer": self.buffer, "sinks": self.sinks}

    def _scorer(self, layer: int) -> "Scorer":
        match self.score:
            case "expected attention":
                return ExpectedAttention()
            case "snapkv":
                return Received(self.buffer)
            case "linear score":
                assert self.linear is not None
                weights = self.linear[layer]
                assert weights is not None, f"layer {layer} was not fitted"
                return Linear(weights)


class Scorer(ABC):
    """Scores of tokens, from all queries, keys and values so far."""

    @abstractmethod
    def see(self, q: Tensor, keys: Tensor, scale: float) -> None:
        """Take note of new queries ``[batch, heads, queries, d]``; `keys` are those of all tokens so far."""

    @abstractmethod
    def scores(self, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Score tokens ``[batch, kv_heads, tokens]``, given the first tokens of the sequence; higher ones stay."""


class ExpectedAttention(Scorer):
    r"""The attention to expect of normal queries: $\exp(s\,\mu\cdot k + s^2 k^\top\Sigma k / 2)$ over its sum."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None  # [batch, heads, d]
        self.products: Tensor | None = None  # [batch, heads, d, d]

    def see(self, q: Tensor, keys: Tensor, scale: float) -> None:
        """Add queries to the sums."""
        q = q.double()
        total, products = q.sum(dim=2), q.mT @ q
        self.sum = total if self.sum is None else self.sum + total
        self.products = products if self.products is None else self.products + products
        self.count += q.shape[2]

    def scores(self, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return the mean over the heads of a group."""
        assert self.sum is not None and self.products is not None
        mean = self.sum / self.count
        covariance = self.products / self.count - mean[..., None] * mean[..., None, :]
        mean, covariance = (
            rearrange(t.float(), "b (h g) ... -> b h g ...", h=keys.shape[1]) for t in (mean, covariance)
        )
        linear = einsum(mean, keys, "b h g d, b h t d -> b h g t")
        square = einsum(keys, covariance, keys, "b h t d, b h g d e, b h t e -> b h g t")
        return (scale * linear + scale**2 / 2 * square).softmax(dim=-1).mean(dim=2)


class Received(Scorer):
    """The attention that a token received while it was in the buffer, averaged over neighbours."""

    def __init__(self, buffer: int) -> None:
        self.buffer = buffer
        self.received: Tensor | None = None  # [batch, kv_heads, tokens]

    def see(self, q: Tensor, keys: Tensor, scale: float) -> None:
        """Add the attention of new queries to the tokens in their buffer."""
        weights, distance = attention_of(q, keys, scale)
        weights = weights.masked_fill(distance >= self.buffer, 0)
        new = reduce(weights, "b (h g) i t -> b h t", "sum", h=keys.shape[1])
        if self.received is not None:
            new[..., : self.received.shape[-1]] += self.received
        self.received = new

    def scores(self, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return averages over neighbours, as far as those have left the buffer too."""
        assert self.received is not None
        received = self.received[..., : keys.shape[2]]
        return nn.functional.avg_pool1d(received, POOLED, stride=1, padding=POOLED // 2, count_include_pad=False)


class Linear(Scorer):
    """The exponential of a linear function of keys and values."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def see(self, q: Tensor, keys: Tensor, scale: float) -> None:
        """Do nothing: queries do not count."""

    def scores(self, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return what is expected of each token alone."""
        weights = self.weights.to(keys.device)
        return einsum(features(keys, values), weights, "b h t f, h f -> b h t").exp()


class EvictingCache(KVCache):
    """A windowed cache that keeps a share of its history; dropped tokens are hidden, not freed.

    Args:
        plan_layer: layouts of what stays.
        share: of the history's tokens that stay.
        scorer: what they are chosen by.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.
    """

    def __init__(self, plan_layer: LayerPlan | None, share: float, scorer: Scorer, buffer: int, sinks: int) -> None:
        super().__init__(plan_layer, buffer=buffer, sinks=sinks, prefill="windowed")
        self.share, self.scorer = share, scorer
        self.dense: tuple[Tensor, Tensor] | None = None  # keys and values of all tokens, to compute scores
        self.kept: Tensor | None = None  # [batch, kv_heads, tokens that have left the buffer]

    @property
    def nbytes(self) -> int:
        """Bytes without those of tokens that are hidden."""
        hidden = 0 if self.kept is None else int((~self.kept[0, 0]).sum())
        packed = [p.tokens(0, hidden) for p in (self.state.k_history, self.state.v_history) if p is not None]
        return super().nbytes - sum(p.nbytes for p in packed)

    @torch.no_grad()
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        scale: float | None = None,
        impl: Impl = "auto",
    ) -> Tensor:
        """Take in new tokens, settle which of the history stay, and attend.

        Raises:
            ValueError: rows are padded.
        """
        if padding is not None:
            raise ValueError("a rival that evicts tokens is scored on rows of tokens without padding")
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        visible = self._take_in(k, v, None)
        earlier = self.dense or (k[:, :, :0], v[:, :, :0])
        keys, values = (torch.cat(pair, dim=2) for pair in zip(earlier, (k, v), strict=True))
        self.dense = keys, values
        self.scorer.see(q, keys, factor)
        self._settle(keys, values, factor)
        seen = self._seen(q)
        return attend(q, visible, seen if mask is None else seen & mask, scale, impl)

    def _settle(self, keys: Tensor, values: Tensor, scale: float) -> None:
        """Choose, for each KV head, the tokens of the history with the highest scores that were not dropped before."""
        sinks, left = self.buffer.sinks, max(int(self.state.first), self.buffer.sinks)
        if left == sinks:
            return
        tokens = left - sinks
        scores = self.scorer.scores(keys[:, :, :left], values[:, :, :left], scale)[..., sinks:]
        scores = scores * values[:, :, sinks:left].norm(dim=-1)
        if self.kept is not None:
            dropped = nn.functional.pad(~self.kept, (0, tokens - self.kept.shape[-1]))
            scores = scores.masked_fill(dropped, -torch.inf)
        best = scores.topk(int(self.share * tokens), dim=-1).indices
        self.kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, value=True)

    def _seen(self, q: Tensor) -> Tensor:
        """Say which columns each query sees: sinks, its buffer, and what stays of the history."""
        column = torch.arange(self.length, device=q.device)
        query = column[-q.shape[2] :, None]
        recent = (column < self.buffer.sinks) | (column > query - self.buffer.size)
        seen = recent[None, None]
        if self.kept is not None:
            sinks = self.buffer.sinks
            kept = nn.functional.pad(self.kept, (sinks, self.length - sinks - self.kept.shape[-1]))
            seen = seen | kept.repeat_interleave(q.shape[1] // kept.shape[1], dim=1)[:, :, None]
        return seen & (column <= query)


@torch.no_grad()
def fit_linear_scores(
    model: "PreTrainedModel", batches: Sequence[Tensor], calibration: Calibration, *, buffer: int = 64
) -> tuple[Tensor | None, ...]:
    """Fit the logarithm of the attention that tokens receive after they have left the buffer, by ridge regression.

    The attention of the query in place ``i`` counts ``i + 1`` times, so that late tokens, which none but queries with
    many tokens see, are not worse than early ones.

    Args:
        model: a transformers model that is not attached.
        batches: token ids ``[rows, tokens]`` of calibration text, of more than two buffers.
        calibration: of the model.
        buffer: recent tokens kept dense.

    Returns:
        For each layer weights of `features` ``[kv_heads, features]``, in the identity basis; None where it has a
        sliding window.

    Raises:
        ValueError: a batch has too few tokens.
    """
    if any(batch.shape[1] <= 2 * buffer for batch in batches):
        raise ValueError(f"linear scores need texts of more than two buffers, {2 * buffer} tokens")
    bases = calibration.with_basis("identity").layers
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    rows: dict[int, int] = {}

    def observe(index: int, observed: Observed) -> None:
        row = rows.setdefault(index, len(rows))
        if observed.sliding:
            return
        k, v = (
            rotate(observed.k, bases[row].key_basis.to(observed.k)),
            rotate(observed.v, bases[row].value_basis.to(observed.v)),
        )
        later = received_later(observed.q, observed.k, observed.scale, buffer)
        x, y = (
            features(k, v)[:, :, : later.shape[-1]].double(),
            later.clamp(min=1e-13).log().clamp(min=LEAST_LOG).double(),
        )
        new = einsum(x, x, "b h t f, b h t e -> h f e"), einsum(x, y, "b h t f, b h t -> h f")
        sums[row] = new if row not in sums else (sums[row][0] + new[0], sums[row][1] + new[1])

    with evaluating(model), observing(model, observe):
        for batch in batches:
            call(model.base_model, batch)
    return tuple(_solved(*sums[row]) if row in sums else None for row in range(len(bases)))


def _solved(squares: Tensor, products: Tensor) -> Tensor:
    ridge = torch.diag_embed(RIDGE * squares.diagonal(dim1=-2, dim2=-1) + 1e-9)
    return torch.linalg.solve(squares + ridge, products).float()


def features(k: Tensor, v: Tensor) -> Tensor:
    """Return what a linear score reads of each token: its key, its value, the logarithms of their lengths, and 1."""
    logs = [x.norm(dim=-1, keepdim=True).clamp(min=1e-6).log() for x in (k, v)]
    return torch.cat([k, v, *logs, torch.ones_like(logs[0])], dim=-1).float()


def received_later(q: Tensor, k: Tensor, scale: float, buffer: int) -> Tensor:
    """Return the mean attention that tokens receive after they have left the buffer ``[batch, kv_heads, tokens]``.

    Times the number of tokens that a query sees. Tokens with fewer than a buffer of such queries are left out.
    """
    weights, distance = attention_of(q, k, scale)
    tokens = k.shape[2]
    seen = torch.arange(1, tokens + 1, device=k.device)[:, None]
    weights = (weights * seen).masked_fill(distance < buffer, 0)
    total = reduce(weights, "b (h g) i t -> b h t", "sum", h=k.shape[1])
    queries = (distance >= buffer).sum(0)
    return (total / queries.clamp(min=1) / (q.shape[1] // k.shape[1]))[..., : tokens - 2 * buffer]


def attention_of(q: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return causal attention ``[batch, heads, queries, tokens]`` of the last queries, and how far back tokens are."""
    place = torch.arange(keys.shape[2], device=q.device)
    distance = place[-q.shape[2] :, None] - place
    scores = q @ keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1).mT * scale
    return scores.masked_fill(distance < 0, -torch.inf).softmax(dim=-1), distance
