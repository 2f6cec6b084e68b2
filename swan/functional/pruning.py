"""Pruning as mathematics: dense tensors in and out; differentiable in coordinates that are kept unrounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swan.functional.packing import pack
from swan.storage import Graded, unpack

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["graded_prune", "topk_prune"]


def topk_prune(x: Float[Tensor, "... d"], keep: int) -> Float[Tensor, "... d"]:
    r"""Keep each vector's largest coordinates: $x_i$ if $|x_i|$ is among the `keep` largest, else 0.

    Among equal magnitudes the choice is arbitrary; exactly `keep` coordinates are kept.
    ``unpack(pack(x, TopK(d, keep, bits=16)))`` is the same tensor.

    Args:
        x: vectors along the last axis.
        keep: coordinates kept, 1 to ``d``.

    Returns:
        The pruned vectors, same shape and dtype.

    Raises:
        ValueError: `keep` is outside 1 to ``d``.

    Example:
        >>> topk_prune(torch.tensor([3.0, -1.0, 0.5, -2.0]), keep=2)
        tensor([ 3.,  0.,  0., -2.])

    Source: arXiv:2511.18936.
    """
    d = x.shape[-1]
    if not 1 <= keep <= d:
        raise ValueError(f"keep must be between 1 and d = {d}, got {keep}")
    index = x.abs().topk(keep, dim=-1).indices
    mask = torch.zeros_like(x, dtype=torch.bool).scatter(-1, index, True)
    return torch.where(mask, x, 0)


def graded_prune(x: Float[Tensor, "... d"], groups: tuple[tuple[int, int], ...]) -> Float[Tensor, "... d"]:
    r"""Keep the same coordinates of each vector, group by group with the group's bits: what a graded layout stores.

    16 bits keep a coordinate as it is, 0 prunes it; between, a group $x_g$ is mixed, rounded to $2^b$ steps of its own
    scale $s$, and mixed back, $\hat x_g = R_b(x_g H)\, H^\top$ with $|R_b(y) - y| \le 2^{-b} s$ from 4 bits on, and
    $R_b(y) \cdot y \approx y \cdot y$ of 3 bits and fewer (`Graded`).
    ``unpack(pack(x, Graded(groups)))`` is the same tensor.

    Args:
        x: vectors along the last axis, in a basis sorted by importance.
        groups: pairs ``(size, bits)`` as in `Graded`; ``((k, 16), (d - k, 0))`` keeps the leading k.

    Returns:
        The pruned vectors, same shape and dtype.

    Raises:
        ValueError: groups are not valid or their sizes do not sum to ``d``.

    Example:
        >>> graded_prune(torch.tensor([3.0, -1.0, 0.5, -2.0]), ((2, 16), (2, 0)))
        tensor([ 3., -1.,  0.,  0.])

    Source: this library; see `Graded`.
    """
    layout = Graded(groups)
    if layout.d != x.shape[-1]:
        raise ValueError(f"groups sum to {layout.d} coordinates, x has {x.shape[-1]}")
    if layout.mixed:
        return unpack(pack(x.reshape(1, 1, -1, layout.d), layout)).reshape(x.shape)
    mask = torch.zeros(layout.d, dtype=torch.bool, device=x.device)
    for start, stop, _ in layout.stored:
        mask[start:stop] = True
    return torch.where(mask, x, 0)
