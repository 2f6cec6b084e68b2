"""Attention over pages, in the windowed form: a query sees the newest tokens of its sequence dense, older ones packed.

So the result depends neither on how a prompt is cut into chunks nor on what was in the cache already.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from swan.functional.attention import dense_attention, merge_attention, packed_attention
from swan.functional.dispatch import pages_kernel
from swan.integrations.vllm.pages import DensePages, PackedPages
from swan.kernels import Seen

__all__ = ["Batch", "Decoding", "batch_attention", "windowed_attention"]

QUERIES = 512  # queries at a time
BLOCK = 64  # the least queries that are attended to their windows together
TOKENS = 4096  # packed tokens that are copied out of their pages at a time, or those of a larger page


@dataclass
class Batch:
    """The sequences of a batch, for all layers.

    Args:
        starts: where the new tokens of each sequence begin, and where those of the last end.
        lengths: tokens of each sequence, the new ones included.
        packed_table: pages of each sequence ``[sequences, pages]``.
        dense_table: pages of its newest tokens, likewise; entries of those that no query sees any more are not read.
        buffer: tokens that a query sees dense, itself counted.
        sinks: first tokens that all queries of a sequence see dense.
    """

    starts: list[int]
    lengths: list[int]
    packed_table: Tensor
    dense_table: Tensor
    buffer: int
    sinks: int

    @property
    def counts(self) -> list[int]:
        """New tokens of each sequence."""
        return [stop - start for start, stop in itertools.pairwise(self.starts)]

    @cached_property
    def decoding(self) -> "Decoding | None":
        """Those that have one new token, if there are any."""
        single = [index for index, count in enumerate(self.counts) if count == 1]
        if not single:
            return None
        device = self.packed_table.device
        rows, starts, lengths = torch.tensor(
            [(index, self.starts[index], self.lengths[index]) for index in single], device=device
        ).unbind(1)
        before = lengths[:, None] - self.buffer  # the window begins there, unless the sequence is shorter
        first = torch.arange(self.sinks, device=device).expand(len(single), -1)
        return Decoding(
            starts,
            self.packed_table[rows].long(),
            self.dense_table[rows].long(),
            before.clamp(min=0),
            before + torch.arange(self.buffer, device=device),
            torch.where(first < before, first, -1),
        )


@dataclass(frozen=True)
class Decoding:
    """Sequences that have one new token.

    Attributes:
        places: of their queries ``[sequences]``.
        packed_table: their pages ``[sequences, pages]``, int64.
        dense_table: likewise.
        ends: the columns before which packed tokens end ``[sequences, 1]``.
        window: columns of the newest tokens ``[sequences, buffer]``; below 0 there is none.
        sinks: columns of the sinks ``[sequences, sinks]``; -1 for those that are in the window.
    """

    places: Tensor
    packed_table: Tensor
    dense_table: Tensor
    ends: Tensor
    window: Tensor
    sinks: Tensor


def batch_attention(q: Tensor, batch: Batch, packed: PackedPages, dense: DensePages, scale: float) -> Tensor:
    """Attend with the new tokens of all sequences of a batch, as `windowed_attention` does for each.

    Those that have one new token are attended together, by a kernel that reads pages, where there is one.

    Args:
        q: rotated queries of all sequences, one after the other ``[1, heads, queries, d]``.
        batch: the sequences.
        packed: pages of all tokens.
        dense: pages of the newest tokens.
        scale: factor of the scores.

    Returns:
        Output in rotated coordinates ``[1, heads, queries, dv]``; zeros for queries of no sequence.
    """
    out = q.new_zeros(*q.shape[:3], packed.values.shape[-1])
    kernel = pages_kernel(q[:, :, :1], packed.keys, packed.values)
    if kernel is not None and (some := batch.decoding) is not None:
        recent = dense.newest(some.dense_table, some.window)
        if packed.first is not None:
            recent = recent.beside(packed.first.newest(some.packed_table, some.sinks))
        each = rearrange(q[:, :, some.places], "1 h s d -> s h 1 d")
        table, sinks = some.packed_table, packed.sinks
        found, _ = kernel(each, packed.keys, packed.values, table, sinks, some.ends, scale, recent)
        out[:, :, some.places] = rearrange(found, "s h 1 d -> 1 h s d").to(q.dtype)
    for index, count in enumerate(batch.counts):
        if count > 1 or (count == 1 and kernel is None):
            new = slice(batch.starts[index], batch.starts[index + 1])
            out[:, :, new] = windowed_attention(q[:, :, new], batch, index, packed, dense, scale)
    return out


def windowed_attention(
    q: Tensor, batch: Batch, index: int, packed: PackedPages, dense: DensePages, scale: float
) -> Tensor:
    r"""Attend with the last queries of one sequence.

    Query $i$ sees key $j \le i$ dense where $i - j < b$ or $j < s$, else packed; $b$ and $s$ are buffer and sinks.

    Args:
        q: rotated queries ``[1, heads, queries, d]``, of the last tokens.
        batch: the sequences; all tokens are stored.
        index: which one.
        packed: pages of all tokens.
        dense: pages of the newest tokens.
        scale: factor of the scores.

    Returns:
        Output in rotated coordinates ``[1, heads, queries, dv]``.
    """
    length, packed_table = batch.lengths[index], batch.packed_table[index]
    after_sinks = torch.tensor([batch.sinks], device=q.device)
    step = max(TOKENS // packed.tokens, 1) * packed.tokens
    outputs = []
    for start in range(0, q.shape[2], QUERIES):
        queries = q[:, :, start : start + QUERIES]
        first = length - q.shape[2] + start
        out, lse = _attend_to_dense(queries, first, batch, index, packed, dense, scale)
        before = first - batch.buffer + 1  # the first query sees those before this one packed
        stop = before + queries.shape[2] - 1  # the last query
        ends = torch.arange(before, before + queries.shape[2], device=q.device)
        for begin in range(0, stop, step):
            k, v = packed.read(packed_table, begin, min(begin + step, stop))
            seen = Seen(after_sinks, ends, begin)
            part = packed_attention(queries, k, v, mask=seen, scale=scale, return_lse=True)
            out, lse = merge_attention([(out.float(), lse), part])
        outputs.append(out.to(q.dtype))
    return torch.cat(outputs, dim=2)


def _attend_to_dense(
    q: Tensor, first: int, batch: Batch, index: int, packed: PackedPages, dense: DensePages, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to what queries from column `first` on see dense, in blocks of about a window beside the keys of theirs.

    So the work grows with the queries times the window, not times the queries. Returns output and log-sum-exp.
    """
    buffer, queries = batch.buffer, q.shape[2]
    block = min(max(buffer, BLOCK), queries)
    blocks = -(-queries // block)
    behind = blocks * block - queries  # queries of the last block that there are not
    begin, stop = first - buffer + 1, first + queries  # of all windows; below 0 there are no tokens
    device = q.device
    starts = begin + block * torch.arange(blocks, device=device)[:, None, None]  # of the first window of each block
    i, j = torch.arange(block, device=device)[:, None], torch.arange(block + buffer - 1, device=device)
    masks = [(j >= i) & (j < i + buffer) & (starts + j >= 0)]
    sides = []
    for x in dense.read(batch.dense_table[index], max(begin, 0), stop):
        there = torch.nn.functional.pad(x, (0, 0, max(-begin, 0), behind))
        sides.append([rearrange(there.unfold(2, len(j), block), "1 h n d t -> n h t d")])
    if packed.first is not None and (sinks := min(batch.sinks, stop - buffer)) > 0:  # before some window
        masks.append(torch.arange(sinks, device=device) < starts + i)
        for side, x in zip(sides, packed.first.read(batch.packed_table[index], 0, sinks), strict=True):
            side.append(x.expand(blocks, -1, -1, -1))
    k, v = (torch.cat(side, dim=2) for side in sides)
    padded = torch.nn.functional.pad(q, (0, 0, 0, behind))
    rows, mask = rearrange(padded, "1 h (n i) d -> n h i d", n=blocks), torch.cat(masks, dim=-1)[:, None]
    out, lse = dense_attention(rows, k, v, mask=mask, scale=scale, return_lse=True)
    whole = rearrange(out, "n h i d -> 1 h (n i) d"), rearrange(lse, "n h i -> 1 h (n i)")
    return whole[0][:, :, :queries], whole[1][:, :, :queries]
