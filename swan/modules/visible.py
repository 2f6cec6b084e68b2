"""`Visible`: the tokens that queries see, dense and packed, and masks of those that each query sees."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swan.functional.attention import dense_attention, swan_attention
from swan.functional.dispatch import Impl, is_kernel
from swan.kernels import Seen
from swan.modules.buffer import DenseBuffer, ring_columns
from swan.storage import Packed

__all__ = ["Visible", "attend", "blocks", "part", "recent_and_new", "recent_tokens", "window_starts"]

QUERIES = 512  # of a windowed chunk at a time, so that masks do not grow with the square of its length


@dataclass(frozen=True)
class Visible:
    """The tokens that the queries of new tokens see. `KVCache.update` returns it; it is good until the next update.

    Where a token's *column* is its place in the whole sequence, the query at column ``i`` sees dense the columns
    from its window's start to ``i``, and the sinks, from its row's padding on; packed those between.

    Attributes:
        k_recent: dense keys ``[batch, kv_heads, tokens, d]``: the buffer, the sinks, and new tokens of a chunk.
        v_recent: dense values, likewise.
        columns: columns of the dense tokens ``[batch or 1, tokens]``; None where none needs hiding: a chunk that sees
            nothing else, causally, or a single query that sees all of them. Then attention needs no mask.
        k_history: packed keys up to the last column that some query sees packed (all room of a static cache), or None.
        v_history: packed values, likewise.
        start: the column of the first packed token.
        queries: how many tokens are new.
        first_query: their first column.
        window: first column of each query's window ``[queries]``, or one for all.
        sinks: first tokens of each row that all its queries see dense.
        padding: left padding of each row ``[batch]``, or None.

    Example:
        >>> import swan
        >>> cache = swan.KVCache(swan.LayerPlan(swan.TopK(64, 40), swan.TopK(64, 24)), buffer=16, prefill="windowed")
        >>> visible = cache.update(*torch.randn(2, 1, 2, 100, 64))
        >>> visible.recent_mask().shape, visible.history_mask().mask(80).sum().item()  # query 20 sees one packed
        (torch.Size([1, 1, 100, 100]), 3240)
    """

    k_recent: Tensor
    v_recent: Tensor
    columns: Tensor | None
    k_history: Packed | None
    v_history: Packed | None
    start: int
    queries: int
    first_query: int | Tensor
    window: int | Tensor
    sinks: int
    padding: Tensor | None

    @property
    def is_new_only(self) -> bool:
        """True where the queries see nothing but their own chunk."""
        return self.columns is None and self.queries > 1

    def history_mask(self, mask: Tensor | None = None) -> Tensor | Seen | None:
        """Say which packed tokens each query sees: as numbers if there is no mask; None: all.

        Args:
            mask: boolean over the whole sequence, ``[batch or 1, heads or 1, queries, columns]``; False hides a token.

        Returns:
            With a mask a boolean one over the packed tokens, ``[batch or 1, heads or 1, queries, tokens]``.
        """
        if self.k_history is None:
            return None
        # Where the window is a number, no packed token is behind it.
        first = None if self.padding is None else self.padding + self.sinks
        end = None if isinstance(self.window, int) else self.window
        seen = None if first is None and end is None else Seen(first, end, self.start)
        if mask is None:
            return seen
        tokens = self.k_history.shape[2]
        inside = at_columns(mask, torch.arange(tokens, device=mask.device)[None] + self.start)
        return inside if seen is None else inside & seen.mask(tokens)

    def recent_mask(self, mask: Tensor | None = None) -> Tensor | None:
        """Mask the dense tokens, as `history_mask` masks the packed ones; causally where no mask is given."""
        columns = self.columns
        if columns is None and mask is None and not self.is_new_only:
            return None
        if columns is None:
            columns = self._plain_columns()
        # A mask says which tokens are seen, those after the query too; without one they are those up to it.
        first = 0 if mask is None else self.queries - 1
        last = (torch.arange(first, self.queries, device=columns.device) + self.first_query)[None, :, None]
        window = self.window if isinstance(self.window, int) else self.window.view(1, -1, 1)
        padding = 0 if self.padding is None else self.padding[:, None, None]
        key = columns[:, None]
        visible = (key <= last) & (key >= padding) & ((key >= window) | (key < padding + self.sinks))
        visible = visible[:, None]
        return visible if mask is None else visible & at_columns(mask, columns)

    def _plain_columns(self) -> Tensor:
        """Return columns where `columns` is None: of a sequence from its beginning, or of sinks and a full ring."""
        tokens, device = self.k_recent.shape[2], self.k_recent.device
        if self.queries > 1 or self.window == 0:
            return torch.arange(tokens, device=device)[None]
        ring = ring_columns(self.first_query, tokens - self.sinks, device)
        return torch.cat([torch.arange(self.sinks, device=device), ring])[None]


def attend(q: Tensor, visible: Visible, mask: Tensor | None, scale: float | None, impl: Impl) -> Tensor:
    """Attend to the tokens that queries see, as `KVCache.attend` says."""
    if mask is None and visible.queries > QUERIES and len(some := blocks(visible)) > 1:
        return torch.cat([attend(q[:, :, block], part(visible, block), None, scale, impl) for block in some], dim=2)
    only_causal = visible.is_new_only and mask is None
    if is_kernel(impl) and (only_causal or visible.k_history is None):
        impl = "auto"
    if only_causal:
        return dense_attention(q, visible.k_recent, visible.v_recent, causal=True, scale=scale, impl=impl)
    return swan_attention(
        q,
        visible.k_history,
        visible.v_history,
        visible.k_recent,
        visible.v_recent,
        history_mask=visible.history_mask(mask),
        buffer_mask=visible.recent_mask(mask),
        scale=scale,
        impl=impl,
    )


def blocks(visible: Visible) -> list[slice]:
    """Queries to be attended with at a time, where each has a window of its own; all of them in compiled code."""
    alike = isinstance(visible.window, int) or visible.window.numel() == 1
    if torch.compiler.is_compiling() or visible.columns is None or alike:
        return [slice(0, visible.queries)]
    return [slice(start, min(start + QUERIES, visible.queries)) for start in range(0, visible.queries, QUERIES)]


def part(visible: Visible, queries: slice) -> Visible:
    """Leave out what some queries of a windowed chunk do not see: new tokens past them or before their windows."""
    assert isinstance(visible.window, Tensor) and visible.columns is not None
    window, first = visible.window[queries], int(visible.first_query)
    begin, end = window[[0, -1]].tolist()
    padding = 0 if visible.padding is None else max(visible.padding.tolist(), default=0)
    old = visible.k_recent.shape[2] - visible.queries  # tokens of the buffer, before the new ones
    stop = old + queries.stop
    head = min(old + max(padding + visible.sinks - first, 0), stop)
    tail = slice(max(old + begin - first, head), stop)
    k, v = (torch.cat([x[:, :, :head], x[:, :, tail]], dim=2) for x in (visible.k_recent, visible.v_recent))
    packed = max(end - visible.start, 0)
    histories = (visible.k_history, visible.v_history) if packed else (None, None)
    k_history, v_history = (x if x is None else x.tokens(0, min(packed, x.shape[2])) for x in histories)
    return replace(
        visible,
        k_recent=k,
        v_recent=v,
        columns=torch.cat([visible.columns[:, :head], visible.columns[:, tail]], dim=1),
        k_history=k_history,
        v_history=v_history,
        queries=queries.stop - queries.start,
        first_query=first + queries.start,
        window=window,
    )


def recent_tokens(buffer: DenseBuffer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the dense keys and values that one query sees once its token is pushed, and columns if some are hidden."""
    state = buffer.state
    assert state.k_recent is not None and state.v_recent is not None
    if isinstance(state.length, Tensor) or isinstance(state.first, Tensor) or state.padding is not None:
        return state.k_recent, state.v_recent, buffer.columns()
    filled = state.length - state.first
    if state.first == 0:
        slots = slice(buffer.sinks, buffer.sinks + filled)
        return state.k_recent[:, :, slots], state.v_recent[:, :, slots], None
    full = filled == buffer.size and state.first >= buffer.sinks
    return state.k_recent, state.v_recent, None if full else buffer.columns()


def recent_and_new(buffer: DenseBuffer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dense keys and values that a chunk sees before it is pushed, the recent and the new, and columns."""
    state = buffer.state
    new = (torch.arange(k.shape[2], device=k.device) + state.length)[None]
    if state.k_recent is None or state.v_recent is None:
        return k, v, new
    old = buffer.columns()
    columns = torch.cat([old, new.expand(old.shape[0], -1)], dim=1)
    return torch.cat([state.k_recent, k], dim=2), torch.cat([state.v_recent, v], dim=2), columns


def window_starts(
    length: int | Tensor, first: int | Tensor, size: int, queries: int, device: torch.device, *, windowed: bool
) -> tuple[int | Tensor, int | None]:
    """Return the first column that each query sees dense because it is in the window of the buffer, and the last.

    All before the last window's start is read packed: where no mask is needed, that alone says which tokens are.

    Args:
        length: tokens before the new ones.
        first: the oldest column in the ring before the new tokens: evicted tokens do not come back.
        size: size of the ring.
        queries: new tokens.
        device: device of the tokens.
        windowed: each query has its own window; else all have that of the first.

    Returns:
        One column for all queries, or ``[queries]``; and the last as a number, or None in a static cache.
    """
    start = length - size + 1
    steps = queries - 1 if windowed else 0
    last = None if isinstance(start, Tensor) else max(start + steps, int(first))
    if steps:
        start = start + torch.arange(queries, device=device)
    if not isinstance(start, Tensor):
        return max(start, int(first)), last
    return start.clamp(min=first) if isinstance(first, int) else torch.maximum(start, first), last


def at_columns(mask: Tensor, columns: Tensor) -> Tensor:
    """Select the entries of a mask over the whole sequence at some columns ``[batch or 1, tokens]``."""
    index = columns.clamp(max=mask.shape[-1] - 1)
    if index.shape[0] == 1:
        return mask.index_select(-1, index[0])
    batch = max(mask.shape[0], index.shape[0])
    mask = mask.expand(batch, -1, -1, -1)
    return mask.gather(-1, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
