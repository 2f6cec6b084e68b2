"""The functions of einops, each a single node where torch.compile traces: half the time to trace a decode step."""

import einops
import torch
from torch import Tensor

__all__ = ["einsum", "rearrange", "repeat"]


@torch.compiler.allow_in_graph
def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`einops.rearrange`."""
    return einops.rearrange(x, pattern, **sizes)


@torch.compiler.allow_in_graph
def repeat(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`einops.repeat`."""
    return einops.repeat(x, pattern, **sizes)


@torch.compiler.allow_in_graph
def einsum(a: Tensor, b: Tensor, pattern: str) -> Tensor:
    """`einops.einsum` of two tensors."""
    return einops.einsum(a, b, pattern)
