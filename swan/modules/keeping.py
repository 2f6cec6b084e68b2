"""Which tokens of a history stay: those that drew attention lately."""

import math

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from swan.modules.buffer import DenseBuffer
from swan.modules.history import TILE, History
from swan.modules.state import PAGE, CacheState
from swan.storage import Packed, unpack
from swan.storage.codes import OCTAVE

__all__ = ["PAGE", "attention_received", "keep_best", "next_page", "remember", "score_page"]

PAGES = 4  # the last pages of a prompt that are looked at
NEWEST = 0.5  # weight of the newest page in the running mean of the attention received
LEAST = 28  # a score byte c means 2 ** (c / 8 - LEAST)


def next_page(length: int) -> int:
    """Return the column at which the page of the query at column `length` ends."""
    return (length // PAGE + 1) * PAGE


def remember(state: CacheState, q: Tensor, first_query: int) -> list[tuple[int, Tensor]]:
    """Take queries into the page that is being filled; return those pages that are full now.

    Args:
        state: that of the cache, with the queries in it.
        q: rotated queries ``[batch, heads, tokens, d]`` of the newest tokens.
        first_query: column of the first.

    Returns:
        The first column and the queries ``[batch, heads, PAGE, d]`` of the last `PAGES` full pages, oldest first.
    """
    if state.queries is None:
        state.queries = q.new_zeros(*q.shape[:2], PAGE, q.shape[3])
    begun, state.asked = first_query % PAGE, first_query + q.shape[2]
    if begun + q.shape[2] < PAGE:
        state.queries[:, :, begun : begun + q.shape[2]] = q
        return []
    queries, start = torch.cat([state.queries[:, :, :begun], q], dim=2), first_query - begun
    full = queries.shape[2] // PAGE
    rest = queries[:, :, full * PAGE :]
    state.queries[:, :, : rest.shape[2]] = rest
    pages = [(start + n * PAGE, queries[:, :, n * PAGE : (n + 1) * PAGE]) for n in range(max(full - PAGES, 0), full)]
    return [page for page in pages if page[0] >= state.observed]


@torch.no_grad()
def score_page(
    state: CacheState, history: History, buffer: DenseBuffer, column: int, q: Tensor, scale: float | None
) -> None:
    """Move the score of each token of the history towards the attention that a page of queries gives it."""
    stored, scored = history.length, 0 if state.scores is None else state.scores.shape[2]
    state.observed = column + PAGE
    if stored == 0:
        return
    received, seen = attention_received(state, history, buffer, column, q, scale)
    mean = received / seen.clamp(min=1)
    if state.scores is not None:
        mean[:, :, :scored] = torch.lerp(_mean_of(state.scores), mean[:, :, :scored], NEWEST)
    seen_by_some = int((seen > 0).sum())  # those after are scored by the next page
    state.scores = _score_of(mean[:, :, : max(seen_by_some, scored)])


def attention_received(
    state: CacheState, history: History, buffer: DenseBuffer, column: int, q: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Compute the attention that tokens of the history receive from queries, as the tokens are stored now.

    With $p_{ij}$ the weight of token $j$ for query row $i$ among all tokens up to the query's, it is $\sum_i p_{ij}$
    over the queries and the heads of a query group. Tiles of 1024 tokens are unpacked, twice.

    Args:
        state: that of the cache.
        history: its history.
        buffer: its buffer.
        column: column of the first query.
        q: rotated queries ``[batch, heads, queries, d]``.
        scale: factor of the scores, ``d ** -0.5`` by default.

    Returns:
        ``[batch, kv_heads, tokens]``, float32, and how many of the queries come after each token ``[tokens]``.
    """
    keys, recent, stored = state.k_history, state.k_recent, history.length
    assert keys is not None and recent is not None
    queries, device = q.shape[2], q.device
    rows = rearrange(q, "b (h g) i d -> b h (g i) d", h=recent.shape[1]).float() * (scale or q.shape[3] ** -0.5)
    at = repeat(torch.arange(queries, device=device) + column, "i -> (g i)", g=rows.shape[2] // queries)[:, None]
    first = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    if state.padding is not None:
        first = state.padding.view(-1, 1, 1, 1)

    def scores(k: Tensor, columns: Tensor, since: Tensor) -> Tensor:
        columns = columns[:, None, None]  # [batch or 1, 1, 1, tokens]
        product = einsum(rows, k.float(), "b h i d, b h j d -> b h i j")
        return product.masked_fill_(~((columns <= at) & (columns >= since)), -math.inf)

    def tile(start: int) -> Tensor:
        stop = min(start + TILE, stored)
        columns = torch.arange(start, stop, device=device)[None] + history.start
        return scores(unpack(keys.tokens(start, stop)), columns, first + buffer.sinks)

    starts = range(0, stored, TILE)
    lse = scores(recent, buffer.columns(), first).logsumexp(-1)
    for start in starts:
        lse = torch.logaddexp(lse, tile(start).logsumexp(-1))
    lse = lse.nan_to_num(neginf=math.inf)[..., None]  # a query of padding sees nothing
    received = [tile(start).sub_(lse).exp_().sum(2) for start in starts]
    columns = torch.arange(stored, device=device) + history.start
    return torch.cat(received, dim=-1), (column + queries - columns).clamp(0, queries)


def keep_best(state: CacheState, history: History, drop: int) -> None:
    """Drop so many tokens of the history, in each row and KV head those of the least score times length of the value.

    The others keep their order, and are read as the newest columns of the history. Padding goes first, and tokens that
    no page has scored yet stay.
    """
    if drop < 1 or state.scores is None:
        return
    values, scored, stored = state.v_history, state.scores.shape[2], history.length
    assert values is not None
    rank = _mean_of(state.scores) * _lengths(values, scored)
    if state.padding is not None:
        place = torch.arange(scored, device=rank.device)
        rank = rank.masked_fill(place < state.padding.view(-1, 1, 1) - state.dropped, -1)
    kept = rank.topk(scored - min(drop, scored), dim=-1).indices.sort(dim=-1).values
    state.scores = state.scores.gather(2, kept)
    after = torch.arange(scored, stored, device=kept.device).expand(*kept.shape[:2], -1)
    history.choose(torch.cat([kept, after], dim=-1))


def _lengths(values: Packed, stop: int) -> Tensor:
    tiles = [unpack(values.tokens(start, min(start + TILE, stop))) for start in range(0, stop, TILE)]
    return torch.cat([torch.linalg.vector_norm(tile.float(), dim=-1) for tile in tiles], dim=-1)


def _score_of(mean: Tensor) -> Tensor:
    """Return the score byte of a mean attention, in steps of an eighth of an octave; NaN has the highest, and stays."""
    mean = mean.nan_to_num(nan=math.inf)
    return ((mean.clamp(min=2.0**-LEAST).log2() + LEAST) * OCTAVE).round().clamp(0, 255).to(torch.uint8)


def _mean_of(score: Tensor) -> Tensor:
    return torch.exp2(score.float() / OCTAVE - LEAST)
