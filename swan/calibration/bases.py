"""Orthogonal bases from second moments, their columns sorted by importance."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import einsum
from torch import Tensor

from swan.calibration.moments import Moments
from swan.functional.rotation import random_rotation

__all__ = ["Basis", "LayerBases", "layer_bases"]

Basis = Literal["joint", "pca", "random", "identity"]


@dataclass(frozen=True)
class LayerBases:
    """Bases of one layer, float32.

    Args:
        key_basis: ``[kv_heads, d, d]``.
        value_basis: ``[kv_heads, dv, dv]``.
        key_spectrum: share of importance of each column ``[kv_heads, d]``, descending.
        value_spectrum: the same for values.
    """

    key_basis: Tensor
    value_basis: Tensor
    key_spectrum: Tensor
    value_spectrum: Tensor


def layer_bases(moments: Moments, basis: Basis, *, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Compute the key basis and the value basis of one layer, and their spectra.

    With $\bar M = M / \mathrm{tr} M$, importance is measured by $\bar M_Q + \bar M_K$ for keys and by
    $\bar M_V + \bar M_O$ for values; `joint` takes the eigenvectors of these, `pca` those of $M_K$ and
    $M_V$ alone, `random` a Haar rotation, `identity` the given axes.

    Args:
        moments: moments of the layer.
        basis: kind of basis.
        seed: seed of `random`.

    Returns:
        Key basis, value basis ``[kv_heads, d, d]``, and for each the share of importance of every
        column ``[kv_heads, d]``, descending; float64.

    Raises:
        ValueError: the basis is not known.
    """
    if basis not in get_args(Basis):
        raise ValueError(f"basis must be one of {', '.join(get_args(Basis))}, got {basis!r}")
    joint_qk = _unit_trace(moments.q) + _unit_trace(moments.k)
    joint_vo = _unit_trace(moments.v) + _unit_trace(moments.o)
    key_basis, key_spectrum = _sorted_basis(basis, joint_qk, moments.k, seed)
    value_basis, value_spectrum = _sorted_basis(basis, joint_vo, moments.v, seed + 1)
    return key_basis, value_basis, key_spectrum, value_spectrum


def _sorted_basis(basis: Basis, joint: Tensor, alone: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    kv_heads, d, _ = joint.shape
    match basis:
        case "joint":
            columns, measure = torch.linalg.eigh(joint).eigenvectors, joint
        case "pca":
            columns, measure = torch.linalg.eigh(alone).eigenvectors, alone
        case "random":
            columns, measure = random_rotation(kv_heads, d, seed=seed, dtype=joint.dtype, device=joint.device), joint
        case "identity":
            columns, measure = torch.eye(d, dtype=joint.dtype, device=joint.device).expand(kv_heads, -1, -1), joint
    importance = einsum(columns, measure, columns, "h d e, h d f, h f e -> h e")
    order = importance.argsort(dim=-1, descending=True)
    spectrum = importance.gather(-1, order) / importance.sum(-1, keepdim=True).clamp(min=1e-300)
    return columns.gather(-1, order[:, None].expand_as(columns)), spectrum


def _unit_trace(moment: Tensor) -> Tensor:
    trace = einsum(moment, "h d d -> h")[:, None, None]
    return torch.where(trace > 0, moment / trace, 0)
