"""`KVCache`: the winnowed cache of one layer."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from swan.compiling import keep_in_place
from swan.functional.attention import dense_attention, swan_attention
from swan.functional.dispatch import Impl, is_kernel, pack_impl, store_kernel
from swan.functional.packing import pack
from swan.modules.buffer import DenseBuffer
from swan.storage import LayerPlan, Layout, Packed, unpack

__all__ = ["KVCache", "Prefill"]

Packing = Callable[[Tensor, Layout], Packed]
Prefill = Literal["chunk", "windowed"]
BLOCK = 64  # a growing history is allocated in multiples of this many tokens
TILE = 1024  # tokens that are packed at a time
COLUMN_BYTES = 8


class _Recent(NamedTuple):
    """What the last `update` left for `attend`: dense tokens, and the state before the update."""

    keys: Tensor
    values: Tensor
    columns: Tensor | None  # [batch or 1, tokens]; None where every query sees all up to itself
    queries: int
    length: int | Tensor
    first: int | Tensor


class KVCache(nn.Module):
    """Keys and values of one layer: packed history, dense buffer of recent tokens, dense sinks.

    A token enters the buffer; the oldest token of a full buffer leaves it, is pruned and packed into
    the history. Query ``i`` sees key ``j`` dense if ``i - j < buffer`` (itself counted) or ``j < sinks``,
    else packed. Several tokens at once are attended in one of two forms: ``"windowed"`` is the same
    as token by token; ``"chunk"`` lets the new tokens see each other dense.

    Keys and values come rotated, and so do queries and outputs (`OrthoRotation`).

    Args:
        plan_layer: layouts of keys and values; None drops what leaves the buffer (a sliding window).
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.
        prefill: form in which several tokens at once are attended.
        static: fixed memory for `max_length` tokens, counters as tensors: one compilation for all
            steps under torch.compile.
        max_length: tokens that a static cache can hold.

    Raises:
        TypeError: `plan_layer` is neither a `LayerPlan` nor None.
        ValueError: settings that do not fit each other.

    Example:
        >>> import torch, swan
        >>> cache = KVCache(swan.LayerPlan(swan.TopK(64, 40), swan.TopK(64, 24)), buffer=16)
        >>> k, v = torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> cache.update(k, v)
        >>> cache.attend(torch.randn(1, 4, 100, 64)).shape
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
    ) -> None:
        super().__init__()
        if prefill not in ("chunk", "windowed"):
            raise ValueError(f"prefill must be 'chunk' or 'windowed', got {prefill!r}")
        if not isinstance(plan_layer, LayerPlan | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            advice = "plan.caches()" if hasattr(plan_layer, "layers") else "LayerPlan(keys, values)"
            raise TypeError(
                f"KVCache takes the LayerPlan of one layer, or None, got {type(plan_layer).__name__}; use {advice}"
            )
        check_max_length(static, max_length)
        self.plan_layer, self.prefill, self.max_length = plan_layer, prefill, max_length
        self.buffer = DenseBuffer(buffer, sinks, static=static)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and free the memory."""
        self.buffer.reset()
        self.k_history: Packed | None = None  # room for more tokens than are stored
        self.v_history: Packed | None = None
        self.dropped = 0  # tokens after the sinks that the history does not keep
        self._recent: _Recent | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return int(self.buffer.length)

    @property
    def history_length(self) -> int:
        """Tokens in the packed history."""
        return self.history_after(0)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that the cache holds."""
        packed = [t for history in (self.k_history, self.v_history) if history is not None for t in history.tensors]
        buffer = (self.buffer.keys, self.buffer.values, self.buffer.length, self.buffer.first, self.buffer.padding)
        return packed + [t for t in (*buffer, *(self._recent or ())) if isinstance(t, Tensor)]

    @property
    def nbytes(self) -> int:
        """Bytes of every storage held: history with its slack, buffer, sinks, counters."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(storages.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same tokens take in a dense cache of the same dtype."""
        if self.buffer.keys is None or self.buffer.values is None:
            return 0
        return sum(
            self.length * t.shape[0] * t.shape[1] * t.shape[3] * t.element_size()
            for t in (self.buffer.keys, self.buffer.values)
        )

    def check_room(self, tokens: int) -> None:
        """Raise a ValueError if a static cache cannot hold so many more tokens."""
        if self.max_length is not None and self.length + tokens > self.max_length:
            raise ValueError(
                f"the static cache holds {self.length} of {self.max_length} tokens, {tokens} more do not fit; "
                "build it with a larger max_length"
            )

    def history_after(self, tokens: int, drop: int = 0) -> int:
        """Tokens in the history after so many more, if `drop` of them are dropped."""
        if self.plan_layer is None:
            return 0
        buffer = self.buffer
        first = max(int(buffer.first), self.length + tokens - buffer.size)
        return max(first - buffer.sinks - self.dropped - drop, 0)

    def nbytes_after(
        self, tokens: int, plan_layer: LayerPlan, *, rows: int, kv_heads: int, itemsize: int, drop: int = 0
    ) -> list[int]:
        """Bytes that each part of a dynamic cache will hold: to know them before anything is stored.

        The sum of the parts is `nbytes` after ``evict(drop)``, ``repack(plan_layer)``, an `update` with so many
        tokens and its `attend`, or up to ``8 * rows * (buffer + sinks + 1)`` bytes of columns and padding more.
        Growing, repeating rows, lowering the layouts and dropping tokens copy part by part: while they run, at
        most the largest part exists twice.

        Args:
            tokens: new tokens.
            plan_layer: the layouts to store the history in.
            rows: batch size.
            kv_heads: heads of keys and values.
            itemsize: bytes of a number in the cache's dtype.
            drop: oldest tokens of the history to drop before.

        Returns:
            Bytes of the keys and of the values of the history, of those of the buffer with the sinks, and the most
            that columns and padding take.
        """
        capacity, stored = self._capacity, self.history_after(tokens, drop)
        if drop:
            capacity = min(capacity, _grown(self.history_after(0, drop)))
        if stored > capacity:
            capacity = _grown(stored)
        vectors, slots = rows * kv_heads, self.buffer.sinks + self.buffer.size
        layouts = plan_layer.keys, plan_layer.values
        history = [vectors * capacity * layout.vector_bytes(itemsize) for layout in layouts]
        buffer = [vectors * slots * layout.d * itemsize for layout in layouts]
        return [*history, *buffer, COLUMN_BYTES * rows * (slots + 1)]

    @torch.no_grad()
    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Take the memory of a static cache; its first `update` does, if nothing else did.

        Args:
            k: rotated keys ``[batch, kv_heads, tokens, d]`` like those to come; their numbers do not matter.
            v: rotated values ``[batch, kv_heads, tokens, dv]``, likewise.

        Raises:
            ValueError: the cache is dynamic, or has its memory already.
        """
        if not self.buffer.static or self.buffer.keys is not None:
            raise ValueError("only an empty static cache takes its memory at once")
        self.buffer.allocate(k, v)
        if self.plan_layer is not None:
            self.k_history, self.v_history = (
                _resized(pack(x.new_zeros(*x.shape[:2], 1, layout.d), layout), self._room + 1, 0)
                for x, layout in ((k, self.plan_layer.keys), (v, self.plan_layer.values))
            )
        keep_in_place(*self.tensors)

    @torch.no_grad()
    def update(self, k: Tensor, v: Tensor, *, padding: Tensor | None = None, impl: Impl = "auto") -> None:
        """Take in the keys and values of new tokens.

        Args:
            k: rotated keys ``[batch, kv_heads, tokens, d]``.
            v: rotated values ``[batch, kv_heads, tokens, dv]``.
            padding: left padding of each row ``[batch]``, in columns of the whole sequence; sinks and
                window count from there. Give it with the first tokens (again, until each row has begun).
            impl: how tokens that leave the buffer are packed, as in `swan.pack`.

        Raises:
            ValueError: shapes or devices do not fit the cache, a static cache is full, or `impl` is unknown or cannot
                store the layouts here; then nothing is changed.
            TypeError: the dtype is not the cache's.
        """
        if not torch.compiler.is_compiling():
            self._check(k, v, padding)
        if impl != "auto":
            self._storing(impl, k, v)  # raises, where it cannot, before anything is changed
        buffer, tokens = self.buffer, k.shape[2]
        if buffer.static and buffer.keys is None:
            self.allocate(k, v)
        length, first = buffer.length, buffer.first
        if isinstance(length, Tensor) and isinstance(first, Tensor):
            length, first = length.clone(), first.clone()
        whole = tokens > 1 and self._is_empty() and (self.prefill == "chunk" or tokens <= buffer.size)
        if tokens == 1:
            dense = None
        elif whole and padding is None:
            dense = (k, v, None)
        else:
            dense = self._with_new(k, v)
        evicted = buffer.push(k, v, padding)
        if self.plan_layer is not None:
            self._store(self.plan_layer, *evicted, impl=impl)
        if dense is None:
            dense = self._after_push()
        self._recent = _Recent(*dense, tokens, length, first)

    @torch.no_grad()
    def attend(
        self, q: Tensor, *, mask: Tensor | None = None, scale: float | None = None, impl: Impl = "auto"
    ) -> Tensor:
        """Attention of the queries of the tokens that the last `update` took in.

        Args:
            q: rotated queries ``[batch, heads, tokens, d]``, as many tokens as were taken in.
            mask: boolean ``[batch or 1, heads or 1, tokens, columns]`` over the whole sequence, True where
                a query may see a token; by default causal, from each row's first real token.
            scale: factor of the scores, ``d ** -0.5`` by default.
            impl: how the history is read, as in `packed_attention`; while there is none, and for a kernel where new
                tokens see each other dense, that part is `dense_attention` by "auto".

        Returns:
            Output in the rotated coordinates of the values ``[batch, heads, tokens, dv]``.

        Raises:
            ValueError: there was no `update` for these queries, or shapes do not fit.
            TypeError: the mask is not boolean.
        """
        recent = self._recent
        if recent is None or recent.queries != q.shape[2]:
            expected = "no tokens to attend to" if recent is None else f"{recent.queries} tokens taken in"
            raise ValueError(
                f"attend follows the update with the keys of the same tokens: {expected}, queries of {q.shape[2]} came"
            )
        if mask is not None and not torch.compiler.is_compiling():
            self._check_mask(mask, q)
        if mask is None and recent.columns is None and recent.queries > 1:
            impl = "auto" if is_kernel(impl) else impl
            out = dense_attention(q, recent.keys, recent.values, causal=True, scale=scale, impl=impl)
            self._recent = None  # frees the dense tokens beyond the buffer
            return out
        columns, window, history = recent.columns, self._window(recent), self._visible_history(recent)
        out = swan_attention(
            q,
            *history,
            recent.keys,
            recent.values,
            history_mask=None if history[0] is None else self._history_mask(recent, window, history[0], mask),
            buffer_mask=None if columns is None and mask is None else self._dense_mask(recent, window, columns, mask),
            scale=scale,
            impl="auto" if history[0] is None and is_kernel(impl) else impl,
        )
        if recent.queries > 1 or self.buffer.static:
            self._recent = None  # nor has compiled code to hand it out
        return out

    @torch.no_grad()
    def repack(self, plan_layer: LayerPlan) -> None:
        r"""Move the history to other layouts; new tokens are stored in them from now on.

        Lowering frees memory at once. Raising keeps what old tokens had. While it runs, the keys or the values of
        the history exist twice, and 1024 tokens of them dense. A static cache keeps its capacity: each pair of layouts
        has tensors of the same shapes whenever it comes back, so compiled code that has seen it serves again.

        What a vector $x$ loses on its way through layouts $A$ and then $B$ is at most what each loses:

        $$\lVert x - x_{AB} \rVert \le \lVert x - x_A \rVert + \lVert x_A - x_{AB} \rVert
        \le E_A(x) + E_B(x_A)$$

        with $x_A$ what $A$ keeps of $x$, and $x_{AB}$ what $B$ keeps of $x_A$. For `Graded`, whose groups are
        orthogonal to each other and mixed by orthonormal matrices,

        $$E(y)^2 = \sum_{\text{groups}} \begin{cases} \lVert y_g \rVert^2 & b = 0 \\
        n\, (2^{-b} s)^2 & 1 \le b \le 8 \\ 0 & b = 16 \end{cases}$$

        for groups of $n$ coordinates, $b$ bits and a scale $s \le 2^{1/8} \max_i |y_{g,i}|$ of the mixed
        coordinates, at least $2^{-16}$. For `TopK` it is the squared length of the pruned coordinates, and for each
        kept one $s^2/4$ at 8 bits ($s = \max|y|/127$) and $(s/16)^2$ at 4 (with the $s$ of `Graded`). Rounding to
        the dtype of the cache comes on top.

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
        if self.k_history is not None and self.v_history is not None:
            stored = self.history_length
            self.k_history = _repacked(self.k_history, plan_layer.keys, stored)
            self.v_history = _repacked(self.v_history, plan_layer.values, stored)
        self.plan_layer = plan_layer
        if self.buffer.static:
            keep_in_place(*self.tensors)

    @torch.no_grad()
    def evict(self, tokens: int) -> None:
        """Forget the oldest tokens after the sinks, in all rows alike; those that stay keep their columns.

        History token ``i`` is column ``sinks + dropped + i`` of the whole sequence, for masks too. Where `tokens`
        is more than the history holds, the next ones that leave the buffer are not stored either, until so many
        are gone. Memory is freed at once, but for the room that a history of this length keeps ahead.

        Args:
            tokens: how many.

        Raises:
            ValueError: `tokens` is negative, or the cache is static.

        Example:
            >>> from swan import TopK
            >>> cache = KVCache(LayerPlan(TopK(64, 40), TopK(64, 24)), buffer=16, sinks=4)
            >>> cache.update(*torch.randn(2, 1, 2, 100, 64))
            >>> cache.evict(30)
            >>> cache.length, cache.history_length, cache.dropped
            (100, 50, 30)
        """
        if self.buffer.static:
            raise ValueError("a static cache keeps all its tokens; evict them from a dynamic one")
        if tokens < 0:
            raise ValueError(f"cannot evict {tokens} tokens; give 0 or more")
        stored, kept = self.history_length, self.history_after(0, tokens)
        if tokens and self.k_history is not None and self.v_history is not None:
            capacity = min(self._capacity, _grown(kept))
            self.k_history = _resized(self.k_history.tokens(stored - kept, stored), capacity, kept) if kept else None
            self.v_history = _resized(self.v_history.tokens(stored - kept, stored), capacity, kept) if kept else None
        self.dropped += tokens

    def crop(self, length: int) -> None:
        """Forget all tokens from `length` on.

        Tokens that have left the buffer stay packed: after removing ``n`` tokens the buffer holds ``n``
        fewer until new ones come, so keep ``buffer`` at least as long as an assistant's draft.

        Args:
            length: tokens to keep.

        Raises:
            ValueError: `length` is negative or more than the cache holds.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop to {length} tokens, the cache holds {self.length}")
        if length == 0 and not self.buffer.static:
            return self.reset()
        self.buffer.crop(length)
        if self.dropped:
            self.dropped = min(self.dropped, max(int(self.buffer.first) - self.buffer.sinks, 0))
        self._recent = None

    def map_batch(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to the batch axis of everything stored: select, repeat or reorder rows.

        Args:
            fn: for instance ``lambda t: t.index_select(0, rows)``.
        """
        buffer = self.buffer
        if buffer.keys is None or buffer.values is None:
            return

        def mapped(t: Tensor) -> Tensor:
            new = fn(t)
            return t.copy_(new) if buffer.static and new.shape == t.shape else new

        buffer.keys = mapped(buffer.keys)  # one after the other: only one of them exists twice
        buffer.values = mapped(buffer.values)
        buffer.padding = None if buffer.padding is None else mapped(buffer.padding)
        self.k_history = None if self.k_history is None else self.k_history.map(mapped)
        self.v_history = None if self.v_history is None else self.v_history.map(mapped)
        self._recent = None
        if buffer.static:
            keep_in_place(*self.tensors)

    def move(self, device: torch.device) -> None:
        """Move everything stored to a device; counters of a static cache too."""
        buffer = self.buffer
        for name in ("keys", "values", "length", "first", "padding"):
            if isinstance(held := getattr(buffer, name), Tensor):
                setattr(buffer, name, held.to(device))
        self.k_history = None if self.k_history is None else self.k_history.map(lambda t: t.to(device))
        self.v_history = None if self.v_history is None else self.v_history.map(lambda t: t.to(device))
        self._recent = None
        if buffer.static:
            keep_in_place(*self.tensors)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        limit = "" if self.max_length is None else f", max_length={self.max_length}"
        return f"{self.plan_layer}, prefill={self.prefill!r}{limit}"

    @property
    def _room(self) -> int:
        """Tokens that the history of a static cache holds; one slot more takes what is no token."""
        assert self.max_length is not None
        return max(self.max_length - self.buffer.size - self.buffer.sinks, 0)

    def _is_empty(self) -> bool:
        """Whether there are surely no tokens: compiled code does not read the counter of a static cache."""
        return not (self.buffer.static and torch.compiler.is_compiling()) and self.length == 0

    def _with_new(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dense tokens before the update and the new ones, with their columns."""
        buffer = self.buffer
        new = (torch.arange(k.shape[2], device=k.device) + buffer.length)[None]
        if buffer.keys is None or buffer.values is None:
            return k, v, new
        old = buffer.columns()
        keys, values = torch.cat([buffer.keys, k], dim=2), torch.cat([buffer.values, v], dim=2)
        return keys, values, torch.cat([old, new.expand(old.shape[0], -1)], dim=1)

    def _after_push(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Dense tokens that one query sees: all slots, or those filled so far; columns where some are hidden."""
        buffer = self.buffer
        assert buffer.keys is not None and buffer.values is not None
        if isinstance(buffer.length, Tensor) or isinstance(buffer.first, Tensor) or buffer.padding is not None:
            return buffer.keys, buffer.values, buffer.columns()
        filled = buffer.length - buffer.first
        if buffer.first == 0:
            seen = slice(buffer.sinks, buffer.sinks + filled)
            return buffer.keys[:, :, seen], buffer.values[:, :, seen], None
        full = filled == buffer.size and buffer.first >= buffer.sinks
        return buffer.keys, buffer.values, None if full else buffer.columns()

    def _storing(self, impl: Impl, k: Tensor, v: Tensor) -> tuple[Packing, Packing]:
        """What packs keys and values."""
        layouts = (None, None) if self.plan_layer is None else (self.plan_layer.keys, self.plan_layer.values)
        return store_kernel(pack_impl(impl, k, layouts[0])), store_kernel(pack_impl(impl, v, layouts[1]))

    def _store(self, plan_layer: LayerPlan, k: Tensor, v: Tensor, index: Tensor | None, *, impl: Impl = "auto") -> None:
        """Pack evicted tokens and write them behind the stored ones (dynamic) or at `index` (static)."""
        if k.shape[2] == 0:
            return
        store = self._storing(impl, k, v)
        if index is not None:
            index = torch.where(index < 0, self._room, index)
            self._write(store[0](k, plan_layer.keys), store[1](v, plan_layer.values), index, self._capacity)
            return
        stop, tokens = self.history_length, k.shape[2]  # push has counted the evicted tokens in
        capacity = self._capacity if self._capacity >= stop else _grown(stop)
        for start in range(max(tokens - stop, 0), tokens, TILE):  # the first ones may be dropped already
            tile = slice(start, start + TILE)
            self._write(
                store[0](k[:, :, tile], plan_layer.keys),
                store[1](v[:, :, tile], plan_layer.values),
                stop - tokens + start,
                capacity,
            )

    def _write(self, k: Packed, v: Packed, place: Tensor | int, capacity: int) -> None:
        """Write packed tokens to their places, or from a place on, into a history of this capacity."""
        if self._capacity < capacity:
            stored = place if isinstance(place, int) else 0
            self.k_history = _resized(self.k_history or k, capacity, stored)
            self.v_history = _resized(self.v_history or v, capacity, stored)
        assert self.k_history is not None and self.v_history is not None
        for history, new in ((self.k_history, k), (self.v_history, v)):
            for target, source in zip(history.tensors, new.tensors, strict=True):
                if isinstance(place, int):
                    target[:, :, place : place + source.shape[2]] = source
                else:
                    target.index_copy_(2, place, source)

    @property
    def _capacity(self) -> int:
        return 0 if self.k_history is None else self.k_history.shape[2]

    def _window(self, recent: _Recent) -> Tensor | int:
        """First column that a query sees dense because it is recent: one for all, or ``[queries]``."""
        start = recent.length - self.buffer.size + 1
        if self.prefill == "windowed" and recent.queries > 1:
            start = start + torch.arange(recent.queries, device=recent.keys.device)
        if isinstance(start, Tensor):
            first = recent.first
            return start.clamp(min=first) if isinstance(first, int) else torch.maximum(start, first)
        return max(start, int(recent.first))

    def _visible_history(self, recent: _Recent) -> tuple[Packed | None, Packed | None]:
        """The history up to the last column that some query sees packed; all of it if static."""
        if self.k_history is None or self.v_history is None:
            return None, None
        if self.buffer.static:
            return self.k_history, self.v_history
        return self._seen_packed(self.k_history, self.v_history, recent)

    def _seen_packed(self, k: Packed, v: Packed, recent: _Recent) -> tuple[Packed | None, Packed | None]:
        """Keys and values of a history up to the last column that some query sees packed."""
        last = recent.queries - 1 if self.prefill == "windowed" else 0
        end = max(int(recent.length) + last - self.buffer.size + 1, int(recent.first))
        stop = end - self.buffer.sinks - self.dropped
        return (k.tokens(0, stop), v.tokens(0, stop)) if stop > 0 else (None, None)

    def _history_mask(
        self, recent: _Recent, window: Tensor | int, history: Packed, mask: Tensor | None
    ) -> Tensor | None:
        """Which history tokens each query sees packed: before its window, after the row's sinks."""
        buffer, tokens = self.buffer, history.shape[2]
        same_for_all = isinstance(window, int)
        if mask is None and same_for_all and buffer.padding is None:
            return None
        columns = torch.arange(tokens, device=recent.keys.device) + buffer.sinks + self.dropped
        seen = columns[None, None, None] < (window if same_for_all else window.view(1, 1, -1, 1))
        if buffer.padding is not None:
            seen = seen & (columns >= buffer.padding[:, None] + buffer.sinks)[:, None, None]
        if mask is None:
            return seen.expand(-1, -1, recent.queries, -1)
        given = _columns_of(mask, columns[None])
        return given & seen

    def _dense_mask(self, recent: _Recent, window: Tensor | int, columns: Tensor | None, mask: Tensor | None) -> Tensor:
        """Which dense tokens each query sees: in its window or a sink, not later than itself."""
        buffer = self.buffer
        if columns is None:
            columns = self._plain_columns(recent)
        queries = (torch.arange(recent.queries, device=columns.device) + recent.length)[None, :, None]
        start = window if isinstance(window, int) else window.view(1, -1, 1)
        padding = 0 if buffer.padding is None else buffer.padding[:, None, None]
        key = columns[:, None]
        seen = (key <= queries) & (key >= padding) & ((key >= start) | (key < padding + buffer.sinks))
        seen = seen[:, None]
        return seen if mask is None else seen & _columns_of(mask, columns)

    def _plain_columns(self, recent: _Recent) -> Tensor:
        """Columns of dense tokens where `_Recent` left them out."""
        if recent.queries > 1 or int(self.buffer.first) == 0:
            return torch.arange(recent.keys.shape[2], device=recent.keys.device)[None]
        return self.buffer.columns()

    def _check(self, k: Tensor, v: Tensor, padding: Tensor | None) -> None:
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[2] == 0:
            raise ValueError(
                "expected keys [batch, kv_heads, tokens, d] and values [batch, kv_heads, tokens, dv] with at least one "
                f"token, got {list(k.shape)} and {list(v.shape)}"
            )
        if k.dtype != v.dtype or not k.is_floating_point():
            raise TypeError(f"keys and values must have one floating-point dtype, got {k.dtype} and {v.dtype}")
        for name, new, layout, held in (
            ("keys", k, self.plan_layer and self.plan_layer.keys, self.buffer.keys),
            ("values", v, self.plan_layer and self.plan_layer.values, self.buffer.values),
        ):
            if layout is not None and new.shape[3] != layout.d:
                raise ValueError(f"the plan stores {name} of {layout.d} coordinates, got {new.shape[3]}")
            if held is None:
                continue
            if held.dtype != new.dtype:
                raise TypeError(f"the cache holds {held.dtype} {name}, got {new.dtype}; reset() it to change")
            if held.device != new.device:
                raise ValueError(f"the cache is on {held.device}, got {name} on {new.device}")
            if held.shape[:2] != new.shape[:2]:
                raise ValueError(
                    f"the cache holds {name} of batch and heads {list(held.shape[:2])}, got {list(new.shape[:2])}; "
                    "reset() it for another batch"
                )
        if padding is not None and tuple(padding.shape) != (k.shape[0],):
            raise ValueError(f"padding counts each row's left padding, [{k.shape[0]}], got {list(padding.shape)}")
        self.check_room(k.shape[2])

    def _check_mask(self, mask: Tensor, q: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask must be boolean (True = visible), got {mask.dtype}")
        batch, heads, queries, _ = q.shape
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if not fits or mask.shape[2] != queries or mask.shape[3] < self.length:
            raise ValueError(
                f"expected a mask [{batch} or 1, {heads} or 1, {queries}, {self.length} or more columns] over the "
                f"whole sequence, got {list(mask.shape)}"
            )


def check_max_length(static: bool, max_length: int | None) -> None:
    if static and (max_length is None or max_length < 1):
        raise ValueError(f"a static cache needs max_length, the tokens it can hold; got {max_length}")
    if max_length is not None and not static:
        raise ValueError("max_length is for static caches; a dynamic one grows as it needs")


def _columns_of(mask: Tensor, columns: Tensor) -> Tensor:
    """Entries of a mask over the whole sequence at some columns ``[batch or 1, tokens]``."""
    index = columns.clamp(max=mask.shape[-1] - 1)
    if index.shape[0] == 1:
        return mask.index_select(-1, index[0])
    batch = max(mask.shape[0], index.shape[0])
    mask = mask.expand(batch, -1, -1, -1)
    return mask.gather(-1, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))


def _grown(tokens: int) -> int:
    """Capacity of a history of so many tokens: with room ahead, so that few steps move it; 0 for none."""
    return -(-(tokens + max(BLOCK, tokens // 32)) // BLOCK) * BLOCK if tokens else 0


def _resized(history: Packed, capacity: int, stored: int) -> Packed:
    """A history with room for `capacity` tokens that begins with the first `stored` ones."""

    def resize(t: Tensor) -> Tensor:
        new = t.new_zeros(t.shape[0], t.shape[1], capacity, t.shape[3])
        new[:, :, :stored] = t[:, :, :stored]
        return new

    return history.map(resize)


def _repacked(history: Packed, layout: Layout, stored: int) -> Packed:
    if layout == history.format:
        return history
    capacity = history.shape[2]
    new: Packed | None = None
    for start in range(0, stored, TILE):
        stop = min(start + TILE, stored)
        tile = pack(unpack(history.tokens(start, stop)), layout)
        new = _resized(tile, capacity, 0) if new is None else new
        for target, source in zip(new.tensors, tile.tensors, strict=True):
            target[:, :, start:stop] = source
    return new if new is not None else _resized(pack(unpack(history.tokens(0, 1)), layout), capacity, 0)
