"""`KVCache`: the winnowed cache of one layer."""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swan.compiling import outside_autocast
from swan.functional.attention import check_attention
from swan.functional.dispatch import Impl, check_cache_impl
from swan.modules import checks
from swan.modules.buffer import DenseBuffer, StaticBuffer
from swan.modules.history import History, StaticHistory
from swan.modules.keeping import PAGE, keep_best, next_page, remember, score_page
from swan.modules.state import CacheState, StaticState
from swan.modules.visible import Visible, attend, recent_and_new, recent_tokens, window_starts
from swan.storage import LayerPlan

__all__ = ["KVCache", "Prefill"]

Prefill = Literal["chunk", "windowed"]


class KVCache(nn.Module):
    """Keys and values of one layer: packed history, dense buffer of the newest tokens, dense sinks.

    A token enters the buffer; the oldest token of a full buffer leaves it, is pruned and packed into
    the history. Query ``i`` sees key ``j`` dense if ``i - j < buffer`` (itself counted) or ``j < sinks``,
    else packed. Several tokens at once are attended in one of two ways: ``"windowed"`` is the same
    as token by token; ``"chunk"`` lets the new tokens see each other dense.

    Keys and values come rotated, and so do queries and outputs (`OrthoRotation`).

    Args:
        plan_layer: layouts of keys and values; None drops tokens that leave the buffer (a sliding window).
        buffer: newest tokens kept dense.
        sinks: first tokens kept dense.
        prefill: way in which several tokens at once are attended.
        static: fixed memory for `max_length` tokens, counters as tensors: one compilation for all
            steps under torch.compile.
        max_length: tokens that a static cache can hold.
        keep: share of the history's tokens that stay, from 0 to 1; None: all of them. After each page of 64 queries
            every KV head drops those that drew least attention: by a running mean of the attention that a token
            received from the queries of a page (half of it from the newest page; of masks only padding counts), times
            the length of its value. A page with a token whose query never attended (`update` alone) is not looked at.
            The mean is stored in a byte a token, and the queries of the page are kept. At 1 tokens are scored only, so
            that `evict` can choose.

    Raises:
        TypeError: `plan_layer` is neither a `LayerPlan` nor None.
        ValueError: settings that do not fit each other.

    Example:
        >>> import torch, swan
        >>> cache = KVCache(swan.LayerPlan(swan.TopK(64, 40), swan.TopK(64, 24)), buffer=16)
        >>> q, k, v = torch.randn(1, 4, 100, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> cache(q, k, v).shape
        torch.Size([1, 4, 100, 64])
        >>> cache.length, cache.history_length
        (100, 80)

    Source: arXiv:2511.18936.
    """

    def __init__(
        self,
        plan_layer: LayerPlan | None,
        *,
        buffer: int = 128,
        sinks: int = 4,
        prefill: Prefill = "chunk",
        static: bool = False,
        max_length: int | None = None,
        keep: float | None = None,
    ) -> None:
        super().__init__()
        checks.check_settings(plan_layer, prefill, static, max_length, keep)
        self.prefill, self.static, self.max_length, self.keep = prefill, static, max_length, keep
        self.state: CacheState = StaticState() if static else CacheState()
        self.buffer = (StaticBuffer if static else DenseBuffer)(buffer, sinks, state=self.state)
        self.history = (
            History(plan_layer, self.state, sinks)
            if max_length is None
            else StaticHistory(plan_layer, self.state, sinks, max(max_length - buffer - sinks, 0))
        )

    def reset(self) -> None:
        """Forget all tokens and free the memory."""
        self.state.reset()

    @property
    def plan_layer(self) -> LayerPlan | None:
        """The layouts in which tokens are stored now."""
        return self.history.plan_layer

    @property
    def length(self) -> int:
        """Tokens seen."""
        return int(self.state.length)

    @property
    def history_length(self) -> int:
        """Tokens in the packed history."""
        return self.history.length

    @property
    def dropped(self) -> int:
        """Tokens after the sinks that the history does not keep (`evict`)."""
        return self.state.dropped

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the cache."""
        return self.state.tensors + self.history.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all its storages: history with its slack, buffer, sinks, counters."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(storages.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same tokens take in a dense cache of the same dtype."""
        recent = [t for t in (self.state.k_recent, self.state.v_recent) if t is not None]
        return sum(self.length * t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in recent)

    @torch.no_grad()
    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Take the memory of a static cache; else its first `update` does.

        Args:
            k: rotated keys ``[batch, kv_heads, tokens, d]`` like those to come; their numbers do not matter.
            v: rotated values ``[batch, kv_heads, tokens, dv]``, likewise.

        Raises:
            ValueError: the cache is dynamic, or has its memory already.
        """
        if not self.static or self.state.k_recent is not None:
            raise ValueError("only an empty static cache takes its memory at once")
        self.buffer.allocate(k, v)
        self.history.allocate(k, v)

    @torch.no_grad()
    @outside_autocast
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
        """Take in new tokens and attend: `update` and `attend` in one call.

        Args:
            q: rotated queries ``[batch, heads, tokens, d]``.
            k: rotated keys ``[batch, kv_heads, tokens, d]``.
            v: rotated values ``[batch, kv_heads, tokens, dv]``.
            mask: which tokens a query may see, as in `attend`.
            padding: left padding, as in `update`.
            scale: factor of the scores.
            impl: how the history is read, as in `attend`; tokens are packed by ``"auto"``.

        Returns:
            Output in the rotated coordinates of the values ``[batch, heads, tokens, dv]``.

        Raises:
            ValueError: as `update` and `attend` do, or a TypeError; then nothing is changed.
        """
        if not torch.compiler.is_compiling():
            self._check(k, v, padding)
            checks.check_queries(q, k.shape[2], self.state)
            check_attention(q, k, v, None)
            checks.check_mask(mask, q, 0 if mask is None else self.length + k.shape[2])
            self._check_choices(mask, self.state.padding if padding is None else padding, self._pages(k.shape[2]))
        if impl != "auto":
            check_cache_impl(impl, q, v, self.plan_layer)
        if self.keep is None:
            return attend(q, self._take_in(k, v, padding), mask, scale, impl)
        outputs, start = [], 0
        for size in self._pages(k.shape[2]):
            tokens, columns = slice(start, start + size), self.length + size
            seen = None if mask is None else mask[:, :, tokens, :columns]
            visible = self._take_in(k[:, :, tokens], v[:, :, tokens], padding)
            outputs.append(attend(q[:, :, tokens], visible, seen, scale, impl))
            self._observe(q[:, :, tokens], columns - size, scale)
            start += size
        return torch.cat(outputs, dim=2)

    @torch.no_grad()
    @outside_autocast
    def update(self, k: Tensor, v: Tensor, *, padding: Tensor | None = None, impl: Impl = "auto") -> Visible:
        """Take in the keys and values of new tokens.

        Args:
            k: rotated keys ``[batch, kv_heads, tokens, d]``.
            v: rotated values ``[batch, kv_heads, tokens, dv]``.
            padding: left padding of each row ``[batch]``, in columns of the whole sequence; sinks and
                window count from there. Give it with the first tokens (again, until each row has begun).
            impl: how tokens that leave the buffer are packed, as in `swan.pack`.

        Returns:
            The tokens that the queries of the new tokens see, for `attend`; good until the next update.

        Raises:
            ValueError: shapes or devices do not fit the cache, a static cache is full, or `impl` is unknown or cannot
                store the layouts here; then nothing is changed.
            TypeError: the dtype is not the cache's.
        """
        if not torch.compiler.is_compiling():
            self._check(k, v, padding)
            if len(pages := self._pages(k.shape[2])) > 1:
                raise ValueError(
                    f"a windowed cache that drops tokens looks at its history after {pages[0]} more tokens; update it "
                    "with no more than these, or take in and attend in one call: cache(q, k, v)"
                )
        if impl != "auto":
            self.history.kernel(k, v, impl)  # raises an error, if it must, before anything is changed
        return self._take_in(k, v, padding, impl)

    @torch.no_grad()
    @outside_autocast
    def attend(
        self,
        q: Tensor,
        visible: Visible,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        impl: Impl = "auto",
    ) -> Tensor:
        """Attend with the queries of the tokens that the last `update` took in.

        Args:
            q: rotated queries ``[batch, heads, tokens, d]``, as many tokens as were taken in.
            visible: the result of that `update`.
            mask: boolean ``[batch or 1, heads or 1, tokens, columns]`` over the whole sequence, True where
                a query sees a token, also one after it; by default causal, from each row's first real token.
            scale: factor of the scores, ``d ** -0.5`` by default.
            impl: how the history is read, as in `packed_attention`. Where a kernel is named, but there is no history
                or new tokens see only each other, `dense_attention` chooses by ``"auto"``.

        Returns:
            Output in the rotated coordinates of the values ``[batch, heads, tokens, dv]``.

        Raises:
            ValueError: another `update` came since, or shapes do not fit.
            TypeError: the mask is not boolean.
        """
        if not torch.compiler.is_compiling():
            checks.check_queries(q, visible.queries, self.state)
            checks.check_latest(visible, self.state)
            checks.check_mask(mask, q, 0 if mask is None else self.length)
            self._check_choices(mask, self.state.padding, [visible.queries])
        out = attend(q, visible, mask, scale, impl)
        if self.keep is not None:
            self._observe(q, self.length - visible.queries, scale)
        return out

    @torch.no_grad()
    @outside_autocast
    def repack(self, plan_layer: LayerPlan) -> None:
        """Move the history to other layouts; new tokens are stored in them from now on.

        Lowering frees memory at once; raising brings no pruned numbers back. While it runs, the keys or the values of
        the history exist twice, and 1024 tokens of them dense. A static cache keeps its capacity: each pair of layouts
        has tensors of the same shapes whenever it comes back, so compiled code that has seen it serves again.

        Args:
            plan_layer: the new layouts.

        Raises:
            ValueError: the cache has no history, or the layouts are of another dimension.
        """
        if self.plan_layer is None:
            raise ValueError("cannot change layouts: a cache without history has none; build a new cache")
        old, new = ((layer.keys.d, layer.values.d) for layer in (self.plan_layer, plan_layer))
        if new != old:
            raise ValueError(f"the cache stores keys and values of {old} coordinates, the new layouts are for {new}")
        self.history.repack(plan_layer)

    @torch.no_grad()
    def evict(self, tokens: int) -> None:
        """Forget the oldest tokens after the sinks, in all rows alike; those that stay keep their columns.

        With `keep`, each KV head forgets those that it would drop next instead, as far as they have scores. History
        token ``i`` is column ``sinks + dropped + i`` of the whole sequence, for masks too. Where `tokens`
        is more than the history holds, the next ones that leave the buffer are not stored either, until so many
        are gone. Memory is freed at once, but for the room that a history of this length keeps ahead.

        Args:
            tokens: how many.

        Raises:
            ValueError: `tokens` is negative, or the cache is static.

        Example:
            >>> import swan
            >>> cache = KVCache(LayerPlan(*[swan.TopK(64, 40)] * 2), buffer=16, sinks=4)
            >>> _, _ = cache.update(*torch.randn(2, 1, 2, 100, 64)), cache.evict(30)
            >>> cache.length, cache.history_length, cache.dropped
            (100, 50, 30)
        """
        if tokens < 0:
            raise ValueError(f"cannot evict {tokens} tokens; give 0 or more")
        scores = self.state.scores
        chosen = 0 if scores is None else min(tokens, scores.shape[2])
        keep_best(self.state, self.history, chosen)
        self.history.evict(tokens - chosen)

    def crop(self, length: int) -> None:
        """Forget all tokens from `length` on.

        Tokens that have left the buffer stay packed: after removing ``n`` tokens the buffer holds ``n``
        fewer until new ones come, so keep ``buffer`` at least as long as an assistant's draft.

        Args:
            length: tokens to keep.

        Raises:
            ValueError: `length` is negative or more than the cache holds, or tokens before it were dropped by score.
        """
        checks.check_crop(length, self.state)
        if length == 0 and not self.static:
            return self.reset()
        first, left = int(self.state.first), self._columns_left()
        owed = max(self.state.dropped - left, 0)  # to be dropped of the next tokens that leave
        self.buffer.crop(length)
        self.history.crop(first)
        self.state.dropped = min(self.state.dropped, self._columns_left()) + owed
        self.state.observed = min(self.state.observed, -(-length // PAGE) * PAGE)  # the page it cuts is not looked at
        self.state.asked = min(self.state.asked, length)
        if self.state.scores is not None:
            self.state.scores = self.state.scores[:, :, : self.history_length].clone()

    @torch.no_grad()
    def map_batch(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, such as ``lambda t: t.index_select(0, rows)``, to the batch axis of everything stored."""
        if self.state.k_recent is not None:
            self.state.apply_to_rows(fn)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        limit = "" if self.max_length is None else f", max_length={self.max_length}"
        keep = "" if self.keep is None else f", keep={self.keep:g}"
        return f"{self.plan_layer}, prefill={self.prefill!r}{limit}{keep}"

    def _columns_left(self) -> int:
        """Count the columns after the sinks that have left the buffer."""
        return max(int(self.state.first) - self.buffer.sinks, 0)

    def _pages(self, tokens: int) -> list[int]:
        """Split new tokens where a windowed cache looks at its history, so that the split does not depend on them."""
        if self.keep is None or self.prefill == "chunk":
            return [tokens]
        ends = [*range(next_page(self.length), self.length + tokens, PAGE), self.length + tokens]
        return [end - start for start, end in itertools.pairwise([self.length, *ends])]

    def _observe(self, q: Tensor, first_query: int, scale: float | None) -> None:
        """Score the history by the pages that these queries fill, and drop what is too much."""
        assert self.keep is not None
        state, history = self.state, self.history
        pages = remember(state, q, first_query)
        for column, queries in pages:
            score_page(state, history, self.buffer, column, queries, scale)
        if pages:
            keep_best(state, history, history.length - math.ceil(self.keep * (history.length + state.dropped)))

    def _check_choices(self, mask: Tensor | None, padding: Tensor | None, sizes: list[int]) -> None:
        """Raise a ValueError if a mask hides tokens of a history that is, or by then will be, chosen by score.

        Args:
            mask: that of the new tokens.
            padding: left padding of each row.
            sizes: of the pieces in which the new tokens are taken in, with a choice after some of them.
        """
        if mask is None or self.keep is None:
            return
        state, sinks, start, length = self.state, self.buffer.sinks, 0, self.length
        chosen, dropped, observed = state.chosen, state.dropped, state.observed_from()
        for size in sizes:
            checks.check_choice(mask[:, :, start : start + size], sinks, chosen, padding)
            start, length = start + size, length + size
            left = max(length - self.buffer.size, int(state.first)) - sinks
            kept = math.ceil(self.keep * left)
            if length % PAGE == 0 and length > observed and left - dropped > max(kept, 0):
                chosen, dropped = left + sinks, left - kept

    def _take_in(self, k: Tensor, v: Tensor, padding: Tensor | None, impl: Impl = "auto") -> Visible:
        state, buffer, queries = self.state, self.buffer, k.shape[2]
        if self.static and state.k_recent is None:
            self.allocate(k, v)
        windowed = self.prefill == "windowed"
        if self.keep is not None:
            state.observed = state.observed_from()
        length, first = state.before()
        recent: tuple[Tensor, Tensor, Tensor | None] | None = None
        if queries > 1:
            alone = padding is None and state.is_empty() and (not windowed or queries <= buffer.size)
            recent = (k, v, None) if alone else recent_and_new(buffer, k, v)
        self._store(k, v, padding, impl, length, first)
        if recent is None:
            recent = recent_tokens(buffer)
        window, stop = window_starts(length, first, buffer.size, queries, k.device, windowed=windowed)
        return Visible(
            *recent,
            *self.history.until(stop),
            start=self.history.start,
            queries=queries,
            first_query=length,
            window=window,
            sinks=buffer.sinks,
            padding=state.padding,
        )

    def _store(
        self, k: Tensor, v: Tensor, padding: Tensor | None, impl: Impl, length: int | Tensor, first: int | Tensor
    ) -> None:
        """Write new tokens into buffer and history: by a kernel where there is one, else by each of them."""
        state, buffer, history, queries = self.state, self.buffer, self.history, k.shape[2]
        packs = isinstance(length, Tensor) or length + queries - buffer.size > history.start
        kernel = history.kernel(k, v, impl) if packs else None
        if kernel is None:
            return history.append(buffer.push(k, v, padding), impl)
        buffer.prepare(k, v, padding)
        buffer.count(queries)
        history.reserve(k, v)
        recent, packed = (state.k_recent, state.v_recent), (state.k_history, state.v_history)
        kernel(k, v, recent, packed, (length, first), state.padding, buffer.sinks, history.start)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination |= {prefix + name: t for name, t in self.state.to_dict(self.history_length).items()}

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any, **__: Any) -> None:
        tensors = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        checks.check_saved(tensors, self.plan_layer, self.buffer.size, self.buffer.sinks, self.max_length, self.keep)
        self.reset()
        if tensors:
            if self.static:
                self.allocate(tensors["keys"], tensors["values"])
            self.state.from_dict(tensors, self.plan_layer)

    def _check(self, k: Tensor, v: Tensor, padding: Tensor | None) -> None:
        checks.check_new(k, v, padding, self.plan_layer, self.state)
        if self.max_length is not None:
            checks.check_room(k.shape[2], self.length, self.max_length)
