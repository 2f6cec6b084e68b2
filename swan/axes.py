"""The functions of einops, of which those that only move numbers are single nodes where torch.compile traces.

A decode step is traced in half the time. They are einops' own functions: compiled code that calls them may be cached.
"""

import torch
from einops import einsum, rearrange, repeat

__all__ = ["einsum", "rearrange", "repeat"]

torch.compiler.allow_in_graph(rearrange)
torch.compiler.allow_in_graph(repeat)
