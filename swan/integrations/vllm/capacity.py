"""Tokens and requests that fit into the memory of a server, counted as vLLM counts: in blocks of pages of all layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swan.calibration import Plan
from swan.integrations.vllm.layer import window_tokens

__all__ = ["Capacity", "dense_capacity", "packed_capacity"]


@dataclass(frozen=True)
class Capacity:
    """What fits into the memory that each process of a server has for its cache.

    Attributes:
        token_bytes: bytes of a token in all layers, in one process.
        window_bytes: bytes of the dense window of a request.
        block_tokens: tokens of a block, which holds the pages of all layers.
        blocks: blocks that fit.
        tokens: tokens that fit, but for windows.
        request_blocks: blocks that vLLM sets apart for a request of the length asked for.
        requests: such requests that fit.
    """

    token_bytes: float
    window_bytes: int
    block_tokens: int
    blocks: int
    tokens: int
    request_blocks: int
    requests: float


def packed_capacity(
    plan: Plan,
    memory: int,
    length: int,
    *,
    kv_heads: int,
    itemsize: int = 2,
    block_tokens: int = 128,
    batched_tokens: int = 2048,
) -> Capacity:
    """Count what fits with packed pages and a dense window.

    While a request is read, its window has pages for all tokens of a step beside it: vLLM counts those, too.

    Args:
        plan: layouts of all layers.
        memory: bytes for the cache of one process.
        length: tokens of a request.
        kv_heads: KV heads of one process.
        itemsize: bytes of a number of the model's dtype.
        block_tokens: tokens of a packed page (vLLM's `block_size`).
        batched_tokens: tokens that vLLM computes in one step (its `max_num_batched_tokens`).

    Raises:
        ValueError: a layer of the plan has no history.
    """
    layers = [layer for layer in plan.layers if layer is not None]
    if len(layers) != len(plan.layers):
        raise ValueError("swan serves models without layers with a sliding window only")
    slots = [sum(layer.nbytes(1, itemsize)) for layer in layers]
    dense = sum(layers[0].dense_nbytes(1, itemsize))
    page = window_tokens(block_tokens, sum(slots) / len(slots), dense)
    block = kv_heads * max(block_tokens * sum(slots), page * dense * len(layers))
    blocks = memory // block
    in_flight = min(plan.buffer - 1 + batched_tokens, length)
    window_pages = _whole(in_flight, page) + 1  # the window may begin within a page
    resting_pages = _whole(min(plan.buffer, length), page) + 1
    return _capacity(
        kv_heads * sum(slots), resting_pages * block, block_tokens, blocks, _whole(length, block_tokens) + window_pages
    )


def dense_capacity(
    dims: Sequence[tuple[int, int]],
    memory: int,
    length: int,
    *,
    kv_heads: int,
    itemsize: int = 2,
    block_tokens: int = 128,
) -> Capacity:
    """Count what fits in vLLM's own pages, dense ones: see `packed_capacity`."""
    token = kv_heads * itemsize * sum(d + dv for d, dv in dims)
    return _capacity(token, 0, block_tokens, memory // (block_tokens * token), _whole(length, block_tokens))


def _capacity(token_bytes: float, window_bytes: int, block_tokens: int, blocks: int, request_blocks: int) -> Capacity:
    # One block is nobody's: vLLM points entries of block tables that are not there to it.
    usable = max(blocks - 1, 0)
    return Capacity(
        token_bytes,
        window_bytes,
        block_tokens,
        blocks,
        usable * block_tokens,
        request_blocks,
        usable / request_blocks,
    )


def _whole(tokens: int, page: int) -> int:
    return math.ceil(tokens / page)
