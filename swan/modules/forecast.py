"""Forecasts of the bytes and tokens that a dynamic cache will hold, before anything is stored."""

from swan.modules.cache import KVCache
from swan.modules.history import grown
from swan.modules.state import PAGE
from swan.storage import LayerPlan

__all__ = ["history_after", "nbytes_after"]

COLUMN_BYTES = 8  # the padding of a row is an int64


def history_after(cache: KVCache, tokens: int, drop: int = 0) -> int:
    """Count the tokens in the history after so many more, if `drop` of them are dropped."""
    if cache.plan_layer is None:
        return 0
    first = max(int(cache.state.first), cache.length + tokens - cache.buffer.size)
    return max(first - cache.history.start - drop, 0)


def nbytes_after(
    cache: KVCache,
    tokens: int,
    plan_layer: LayerPlan,
    *,
    rows: int,
    kv_heads: int,
    itemsize: int,
    drop: int = 0,
    group: int = 1,
) -> list[int]:
    """Count the bytes that each piece of a cache will hold.

    The sum of the pieces is `KVCache.nbytes` after ``evict(drop)``, ``repack(plan_layer)`` and an `update` with so many
    tokens, or up to ``8 * rows`` bytes of padding more; with `KVCache.keep` at most that, before the tokens with the
    least scores are dropped. Growing, repeating rows, lowering the layouts and dropping tokens copy piece by piece:
    while they run, at most the largest piece exists twice.

    Args:
        cache: of one layer, dynamic.
        tokens: new tokens.
        plan_layer: the layouts to store the history in.
        rows: batch size.
        kv_heads: heads of keys and values.
        itemsize: bytes of a number in the cache's dtype.
        drop: tokens of the history to drop before.
        group: query heads for each KV head.

    Returns:
        Bytes of the keys and of the values of the history, of the recent keys and of the recent values, and the
        most that padding takes; with `KVCache.keep` also those of the queries and of the scores.

    Example:
        >>> import torch, swan
        >>> layer = swan.LayerPlan(swan.TopK(64, 40), swan.TopK(64, 24))
        >>> cache = KVCache(layer, buffer=16)
        >>> nbytes_after(cache, 1000, layer, rows=1, kv_heads=2, itemsize=4)
        [108800, 73984, 10240, 10240, 8]
        >>> _ = cache.update(*torch.randn(2, 1, 2, 1000, 64))
        >>> cache.nbytes
        203264
    """
    capacity, stored = cache.history.capacity, history_after(cache, tokens, drop)
    if drop:
        capacity = min(capacity, grown(history_after(cache, 0, drop)))
    if stored > capacity:
        capacity = grown(stored)
    slots, vectors = cache.buffer.sinks + cache.buffer.slots_after(tokens), rows * kv_heads
    history = plan_layer.nbytes(vectors * capacity, itemsize)
    pieces = [*history, *plan_layer.dense_nbytes(vectors * slots, itemsize), COLUMN_BYTES * rows]
    if cache.keep is None:
        return pieces
    return [*pieces, vectors * group * PAGE * plan_layer.keys.d * itemsize, vectors * stored]
