"""Attention in float64 on the device, and what the results of kernels may differ from it by.

The kernels round queries to half precision and weights to two bytes; tensor code, which serves elsewhere, rounds keys,
values and weights to the dtype, whose epsilon is e. So an error of a score is at most
``(2**-10 + e) * |q| * |k| * scale`` (norms); a weight is off by twice that, ``2**-9`` and ``e``. As errors of tokens
are independent, the error of an output, as a norm, is below ``2 * 2**-9`` of the output, and ``e / 2`` for each of
keys, values, weights and outputs, which are rounded to the dtype.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from swan import Packed
from swan.storage.packed import mixing, unpack_mixed

WEIGHTS, QUERIES = 2.0**-9, 2.0**-10
U32 = torch.finfo(torch.float32).eps / 2


class Part(NamedTuple):
    """Keys and values ``[batch, kv_heads, tokens, d]`` in float64, and which of them each query sees (None: all)."""

    keys: Tensor
    values: Tensor
    seen: Tensor | None = None


class Expected(NamedTuple):
    """The output, its log-sum-exp, and the output of the magnitudes of the values."""

    out: Tensor
    lse: Tensor
    magnitude: Tensor


class Limits(NamedTuple):
    """Bounds of errors: of each number, of a row of the output over its norm, of a log-sum-exp."""

    number: Tensor
    norm: float
    lse: float


def history(k: Packed, v: Packed, seen: Tensor | None = None) -> Part:
    """Return the tokens of a history as they are stored, without another rounding."""
    return Part(wide(k), wide(v), seen)


def wide(packed: Packed) -> Tensor:
    """Unpack in float64."""
    values = unpack_mixed(dataclasses.replace(packed, dtype=torch.float64)).double()
    matrix = mixing(packed)
    return values if matrix is None else values @ matrix.double().mT


def attention(q: Tensor, *parts: Part) -> Expected:
    """Attend to all parts together; zero where a query sees nothing."""
    groups = q.shape[1] // parts[0].keys.shape[1]
    keys = torch.cat([part.keys for part in parts], dim=2).repeat_interleave(groups, dim=1)
    values = torch.cat([part.values for part in parts], dim=2).repeat_interleave(groups, dim=1)
    scores = q.double() @ keys.mT * q.shape[-1] ** -0.5
    if any(part.seen is not None for part in parts):
        shape = q.shape[0], q.shape[1], q.shape[2]
        seen = [
            torch.ones(*shape, part.keys.shape[2], dtype=torch.bool, device=q.device)
            if part.seen is None
            else part.seen.expand(*shape, -1)
            for part in parts
        ]
        scores = scores.masked_fill(~torch.cat(seen, dim=-1), -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0)
    return Expected(weights @ values, torch.logsumexp(scores, dim=-1), weights @ values.abs())


def limits(q: Tensor, expected: Expected, dtype: torch.dtype, group: int, *parts: Part) -> Limits:
    """Bound the errors of an attention.

    Args:
        q: queries, in plain coordinates.
        expected: of `attention`.
        dtype: of the cache and of the output.
        group: the largest group of coordinates that is stored mixed: in others its errors are up to sqrt(group) larger.
        parts: keys and values.
    """
    eps, spread = torch.finfo(dtype).eps, math.sqrt(group)
    keys, values = _longest(*(part.keys for part in parts)), _longest(*(part.values for part in parts))
    queries = _longest(q.double())
    score = (QUERIES + eps) * queries * keys * q.shape[-1] ** -0.5
    tokens = sum(part.keys.shape[2] for part in parts)
    number = (WEIGHTS + eps + 2 * score) * spread * expected.magnitude.amax(-1, keepdim=True)
    number = number + eps * expected.out.abs() + 4 * U32 * (tokens + 16) * values
    return Limits(number, 2 * WEIGHTS + 2 * eps, score + U32 * (tokens + 16) + 2.0**-13)


def _longest(*vectors: Tensor) -> float:
    return max(float(x.norm(dim=-1).max()) for x in vectors)


def windowed(length: int, queries: Tensor, buffer: int, sinks: int, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which tokens queries there see dense, and which packed, ``[batch or 1, 1, queries, length]``."""
    device = queries.device
    first = torch.zeros(1, device=device) if padding is None else padding
    first, i, j = first.view(-1, 1, 1, 1), queries.view(1, 1, -1, 1), torch.arange(length, device=device)
    seen = (j <= i) & (j >= first)
    dense = (i - j < buffer) | (j < first + sinks)
    return seen & dense, seen & ~dense
