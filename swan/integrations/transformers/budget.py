"""`Budget`: the bytes that a `SwanCache` may hold, and the steps that make room for new tokens in them."""

import warnings
from typing import TYPE_CHECKING, Any, Literal

from swan.calibration import Plan
from swan.integrations.transformers.layers import SwanLayer
from swan.modules.forecast import history_after, nbytes_after
from swan.modules.history import BLOCK

if TYPE_CHECKING:
    from swan.integrations.transformers.cache import SwanCache

__all__ = ["Budget", "OnFull"]

OnFull = Literal["raise", "evict"]


class Budget:
    """Lowers the level of a cache, and then drops tokens, before tokens come that would not fit.

    Args:
        nbytes: the most bytes that the cache may hold.
        on_full: the response at the least level: ``"raise"`` a ValueError, or ``"evict"`` tokens.
        warned: True once the one warning that tokens are dropped was given.
    """

    def __init__(self, nbytes: int, on_full: OnFull, warned: bool = False) -> None:
        self.nbytes, self.warned = nbytes, warned
        self.on_full: OnFull = on_full
        self.dense_itemsize = 0  # of layers that are not winnowed: they store tokens in the dtype in which they come

    def check_raise(self, cache: "SwanCache", plan: Plan) -> None:
        """Raise a ValueError if a cache, as it is, would not fit at a plan."""
        stored = cache.stored
        if plan.retention <= cache.retention or stored is None:
            return
        needed = self._needed(cache, plan, 0, stored.shape[0], stored.element_size())
        if needed > self.nbytes:
            raise ValueError(
                f"retention {plan.retention:.3g} would need {needed} bytes, the budget is {self.nbytes}; the cache "
                f"stays at {cache.retention:.3g}"
            )

    def make_room_for_rows(self, cache: "SwanCache", rows: int) -> None:
        """Make room for the same tokens in so many rows, where they are more."""
        stored = cache.stored
        if stored is not None and rows > stored.shape[0]:
            self.make_room(cache, 0, rows, stored.element_size())

    def make_room(self, cache: "SwanCache", tokens: int, rows: int, itemsize: int) -> None:
        """Lower the level, then drop tokens, until the budget holds so many more tokens in so many rows.

        Raises:
            ValueError: there is no room to make, or `on_full` is ``"raise"``; nothing has changed.
        """
        if self._needed(cache, cache.plan, tokens, rows, itemsize) <= self.nbytes:
            return
        levels = cache.dial.levels
        for plan in levels:
            fits = plan.retention < cache.retention and self._needed(cache, plan, tokens, rows, itemsize) <= self.nbytes
            if fits:
                return cache.move_to(plan)
        least = levels[-1]
        history = max(history_after(kv, tokens) for kv in cache.winnowed.values())
        drops = [min(n, history) for n in range(BLOCK, history + BLOCK, BLOCK)]
        drop = next((n for n in drops if self._needed(cache, least, tokens, rows, itemsize, n) <= self.nbytes), None)
        if drop is None or self.on_full == "raise":
            raise ValueError(self._full(cache, tokens, rows, itemsize, history if drop is None else None))
        if not self.warned:
            self.warned = True
            which = "oldest tokens outside the sinks" if least.keep is None else "tokens that drew least attention"
            warnings.warn(
                f"the budget of {self.nbytes} bytes is full at the least retention, {least.retention:.3g}: from now on "
                f"the {which} are dropped; a larger budget keeps them, on_full='raise' stops instead",
                stacklevel=2,
            )
        for kv in cache.winnowed.values():
            kv.evict(drop)
        cache.move_to(least)

    def _needed(self, cache: "SwanCache", plan: Plan, tokens: int, rows: int, itemsize: int, drop: int = 0) -> int:
        """Count the bytes that so many more tokens need: all pieces, and the largest once more, while it is moved."""
        pieces = []
        for (index, (kv_heads, d, dv)), plan_layer in zip(cache.shapes.items(), plan.layers, strict=True):
            layer = cache.layers[index]
            if isinstance(layer, SwanLayer):
                assert plan_layer is not None
                sizes = {"rows": rows, "kv_heads": kv_heads, "itemsize": itemsize, "group": cache.groups[index]}
                pieces += nbytes_after(layer.kv, tokens, plan_layer, **sizes, drop=drop)
            else:
                vector_bytes = kv_heads * (d + dv) * (self.dense_itemsize or itemsize)
                pieces.append(_dense_nbytes_after(layer, tokens, rows, vector_bytes))
        return sum(pieces) + max(pieces)

    def _full(self, cache: "SwanCache", tokens: int, rows: int, itemsize: int, history: int | None) -> str:
        """Say why so many more tokens do not fit (given `history`, not even without that history) and what helps."""
        least = cache.dial.levels[-1]
        needed = self._needed(cache, least, tokens, rows, itemsize, history or 0)
        text = f"{rows} x {cache.get_seq_length() + tokens} tokens"
        content = text if history is None else f"buffer and sinks of {text} alone"
        content += f" with {len(cache.exclude)} dense layers" if cache.exclude else ""
        evict = "on_full='evict', which drops tokens, a shorter text, " if history is None else ""
        return (
            f"the budget of {self.nbytes} bytes is full: {content} need {needed} bytes at the least retention, "
            f"{least.retention:.3g}; give a larger budget, {evict}fewer rows or a smaller buffer"
        )


def _dense_nbytes_after(layer: Any, tokens: int, rows: int, vector_bytes: int) -> int:
    """Count the bytes of a dense or sliding layer, before or after so many more tokens, whichever are more."""
    if layer.keys is None or layer.keys.numel() == 0:
        length = now = 0
    else:
        length = layer.keys.shape[-2]
        now = sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values)) * rows // layer.keys.shape[0]
    stored = length + tokens
    if layer.is_sliding and tokens > 1 and not getattr(layer, "record_past", False):
        stored = min(stored, layer.sliding_window - 1)  # see `SwanCache.update`
    return max(now, stored * rows * vector_bytes)
