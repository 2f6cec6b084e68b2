"""Tokens and requests that fit into the memory of a server, in blocks of pages of all layers, as vLLM counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swan.calibration import Plan
from swan.integrations.vllm.layer import layers_of, slots_of, window_tokens

__all__ = ["Capacity", "dense_capacity", "packed_capacity"]

NOBODYS = 1  # the block to which vLLM points entries of block tables that hold nothing


@dataclass(frozen=True)
class Capacity:
    """What fits into the memory that each process of a server has for its cache.

    Attributes:
        token_bytes: bytes of a token in all layers, in one process, with its share of the sinks that pages hold.
        window_bytes: bytes of the dense window of a request.
        block_tokens: tokens of a block, which holds the pages of all layers.
        blocks: blocks that fit.
        tokens: tokens that fit, but for windows.
        requests: requests of the length asked for that are answered at once, each with its window, beside one step of
            prompts that are read.
        reserved_requests: the same as vLLM logs it (its maximum concurrency): as if the windows of all requests had
            pages for the tokens of a whole step.
    """

    token_bytes: int
    window_bytes: int
    block_tokens: int
    blocks: int
    tokens: int
    requests: float
    reserved_requests: float


def packed_capacity(
    plan: Plan,
    memory: int,
    length: int,
    *,
    kv_heads: int,
    dtype: torch.dtype = torch.bfloat16,
    block_tokens: int = 128,
    batched_tokens: int = 2048,
) -> Capacity:
    """Count what fits with packed pages and a dense window.

    Args:
        plan: layouts of all layers.
        memory: bytes for the cache of one process.
        length: tokens of a request.
        kv_heads: KV heads of one process.
        dtype: dtype of the model.
        block_tokens: tokens of a packed page (vLLM's `block_size`).
        batched_tokens: tokens on their way at a time: vLLM's `max_num_batched_tokens`, twice that where it schedules
            the next step while one runs.

    Raises:
        ValueError: a layer of the plan has no history.
    """
    slots, page = slots_of(plan, block_tokens, dtype), window_tokens(plan, block_tokens, dtype)
    dense = sum(sum(layer.dense_nbytes(1, dtype.itemsize)) for layer in layers_of(plan))
    block = kv_heads * max(block_tokens * sum(slots), page * dense)
    blocks = memory // block

    def window_pages(new: int) -> int:
        return _whole(min(plan.buffer - 1 + new, length), page) + 1  # a window may begin within a page

    packed, resting, usable = _whole(length, block_tokens), window_pages(1), max(blocks - NOBODYS, 0)
    return Capacity(
        token_bytes=kv_heads * sum(slots),
        window_bytes=resting * block,
        block_tokens=block_tokens,
        blocks=blocks,
        tokens=usable * block_tokens,
        requests=max(usable - _whole(batched_tokens, page), 0) / (packed + resting),
        reserved_requests=blocks / (packed + window_pages(batched_tokens)),
    )


def dense_capacity(
    dims: Sequence[tuple[int, int]],
    memory: int,
    length: int,
    *,
    kv_heads: int,
    dtype: torch.dtype = torch.bfloat16,
    block_tokens: int = 128,
) -> Capacity:
    """Count what fits in vLLM's own pages, dense ones: see `packed_capacity`."""
    token = kv_heads * dtype.itemsize * sum(d + dv for d, dv in dims)
    blocks, pages = memory // (block_tokens * token), _whole(length, block_tokens)
    usable = max(blocks - NOBODYS, 0)
    return Capacity(token, 0, block_tokens, blocks, usable * block_tokens, usable / pages, blocks / pages)


def _whole(tokens: int, page: int) -> int:
    return math.ceil(tokens / page)
