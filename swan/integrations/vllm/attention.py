"""Attention of one sequence over pages, in the windowed form: a query sees the newest tokens dense, older ones packed.

So the result depends neither on how a prompt is cut into chunks nor on what was in the cache already.
"""

import torch
from torch import Tensor

from swan.functional.attention import dense_attention, merge_attention, packed_attention
from swan.integrations.vllm.pages import DensePages, PackedPages
from swan.kernels import Seen

__all__ = ["windowed_attention"]

QUERIES = 512  # queries at a time
TOKENS = 4096  # packed tokens that are copied out of their pages at a time


def windowed_attention(
    q: Tensor,
    length: int,
    packed: PackedPages,
    packed_table: Tensor,
    dense: DensePages,
    dense_table: Tensor,
    *,
    buffer: int,
    scale: float,
) -> Tensor:
    r"""Attend with the last queries of a sequence: query $i$ sees key $j \le i$ dense where $i - j < b$, else packed.

    Args:
        q: rotated queries ``[1, heads, queries, d]``, of the last tokens.
        length: tokens of the sequence, these included; all are stored.
        packed: pages of all its tokens.
        packed_table: those of this sequence ``[pages]``.
        dense: pages of the newest tokens.
        dense_table: those of this sequence; entries of pages that no query sees any more are not read.
        buffer: tokens that a query sees dense, $b$, itself counted.
        scale: factor of the scores.

    Returns:
        Output in rotated coordinates ``[1, heads, queries, dv]``.
    """
    outputs = []
    for start in range(0, q.shape[2], QUERIES):
        queries = q[:, :, start : start + QUERIES]
        first = length - q.shape[2] + start
        columns = torch.arange(first, first + queries.shape[2], device=q.device)
        parts = [_to_window(queries, first, columns, dense, dense_table, buffer, scale)]
        stop = first + queries.shape[2] - buffer  # the last query sees the columns before this one packed
        for begin in range(0, stop, TOKENS):
            k, v = packed.read(packed_table, begin, min(begin + TOKENS, stop))
            seen = None if queries.shape[2] == 1 else Seen(None, columns - buffer + 1, begin)
            parts.append(packed_attention(queries, k, v, mask=seen, scale=scale, return_lse=True))
            parts = [merge_attention(parts)]
        outputs.append(parts[0][0])
    return torch.cat(outputs, dim=2)


def _to_window(
    q: Tensor, first: int, columns: Tensor, dense: DensePages, table: Tensor, buffer: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the dense tokens, of which each query sees its newest."""
    begin, stop = max(first - buffer + 1, 0), first + q.shape[2]
    k, v = dense.read(table, begin, stop)
    mask = None
    if q.shape[2] > 1:
        keys = torch.arange(begin, stop, device=q.device)
        behind = columns[:, None] - keys[None]
        mask = ((behind >= 0) & (behind < buffer))[None, None]
    return dense_attention(q, k, v, mask=mask, scale=scale, return_lse=True)
