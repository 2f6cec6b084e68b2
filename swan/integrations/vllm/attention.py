"""Attention over pages, in the windowed form: a query sees the newest tokens of its sequence dense, older ones packed.

So the result depends neither on how a prompt is cut into chunks nor on what was in the cache already.
"""

import itertools
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from swan.functional.attention import dense_attention, merge_attention, packed_attention
from swan.functional.dispatch import pages_kernel
from swan.integrations.vllm.pages import DensePages, PackedPages
from swan.kernels import Seen

__all__ = ["batch_attention", "windowed_attention"]

QUERIES = 512  # queries at a time
TOKENS = 4096  # packed tokens that are copied out of their pages at a time, or those of a larger page


def batch_attention(
    q: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    packed: PackedPages,
    packed_table: Tensor,
    dense: DensePages,
    dense_table: Tensor,
    *,
    buffer: int,
    scale: float,
) -> Tensor:
    """Attend with the new tokens of all sequences of a batch, as `windowed_attention` does for each.

    Those that have one new token are attended together, by a kernel that reads pages, where there is one.

    Args:
        q: rotated queries of all sequences, one after the other ``[1, heads, queries, d]``.
        starts: where the queries of each sequence begin, and where those of the last end.
        lengths: tokens of each sequence, the new ones included.
        packed: pages of all tokens.
        packed_table: pages of each sequence ``[sequences, pages]``.
        dense: pages of the newest tokens.
        dense_table: likewise.
        buffer: tokens that a query sees dense, itself counted.
        scale: factor of the scores.

    Returns:
        Output in rotated coordinates ``[1, heads, queries, dv]``; zeros for queries of no sequence.
    """
    out = q.new_zeros(*q.shape[:3], packed.values.shape[-1])
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    kernel = pages_kernel(q[:, :, :1], packed.keys, packed.values)
    single = [index for index, count in enumerate(counts) if count == 1 and kernel is not None]
    if kernel is not None and single:
        rows = torch.tensor(single, device=q.device)
        places = torch.tensor([starts[index] for index in single], device=q.device)
        ends = torch.tensor([[max(lengths[index] - buffer, 0)] for index in single], device=q.device)
        columns = torch.tensor([lengths[index] for index in single], device=q.device)[:, None] - buffer
        recent = dense.newest(dense_table[rows], columns + torch.arange(buffer, device=q.device))
        if packed.first is not None:  # those that are in the window are seen there
            sinks = torch.arange(packed.sinks, device=q.device).expand(len(single), -1)
            recent = recent.beside(packed.first.newest(packed_table[rows], torch.where(sinks < columns, sinks, -1)))
        each = rearrange(q[:, :, places], "1 h s d -> s h 1 d")
        table = packed_table[rows].long()
        found, _ = kernel(each, packed.keys, packed.values, table, packed.sinks, ends, scale, recent)
        out[:, :, places] = rearrange(found, "s h 1 d -> 1 h s d").to(q.dtype)
    for index, count in enumerate(counts):
        if count == 0 or (count == 1 and kernel is not None):
            continue
        new = slice(starts[index], starts[index + 1])
        tables = {"packed_table": packed_table[index], "dense_table": dense_table[index]}
        out[:, :, new] = windowed_attention(
            q[:, :, new], lengths[index], packed, dense=dense, buffer=buffer, scale=scale, **tables
        )
    return out


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
    r"""Attend with the last queries of one sequence.

    Query $i$ sees key $j \le i$ dense where $i - j < b$ or $j < s$, else packed; $s$ are the sinks of the pages.

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
    after_sinks = torch.tensor([packed.sinks], device=q.device)
    step = max(TOKENS // packed.tokens, 1) * packed.tokens
    for start in range(0, q.shape[2], QUERIES):
        queries = q[:, :, start : start + QUERIES]
        first = length - q.shape[2] + start
        columns = torch.arange(first, first + queries.shape[2], device=q.device)
        k, v, keys = _dense_tokens(
            packed, packed_table, dense, dense_table, max(first - buffer + 1, 0), int(columns[-1]) + 1
        )
        behind = columns[:, None] - keys[None]
        mask = ((behind >= 0) & ((behind < buffer) | (keys < packed.sinks)))[None, None]
        out, lse = dense_attention(queries, k, v, mask=mask, scale=scale, return_lse=True)
        stop = first + queries.shape[2] - buffer  # the last query sees the columns before this one packed
        for begin in range(0, stop, step):
            k, v = packed.read(packed_table, begin, min(begin + step, stop))
            seen = Seen(after_sinks, columns - buffer + 1, begin)
            part = packed_attention(queries, k, v, mask=seen, scale=scale, return_lse=True)
            out, lse = merge_attention([(out.float(), lse), part])
        outputs.append(out.to(q.dtype))
    return torch.cat(outputs, dim=2)


def _dense_tokens(
    packed: PackedPages, packed_table: Tensor, dense: DensePages, dense_table: Tensor, begin: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and columns of the dense tokens from `begin` to `stop`, and of the sinks before them."""
    k, v = dense.read(dense_table, begin, stop)
    columns = torch.arange(begin, stop, device=k.device)
    before = min(packed.sinks, begin)
    if packed.first is None or before == 0:
        return k, v, columns
    sinks = packed.first.read(packed_table, 0, before)
    k, v = (torch.cat(pair, dim=2) for pair in zip(sinks, (k, v), strict=True))
    return k, v, torch.cat([torch.arange(before, device=k.device), columns])
