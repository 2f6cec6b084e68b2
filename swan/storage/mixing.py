"""The orthonormal matrices that mix the coordinates inside the groups of a layout."""

import functools
import math
import re

import torch
from torch import Tensor

from swan.compiling import constant_result, keep_in_place_if_compiling
from swan.storage.codes import PARTS

__all__ = ["MIXES", "mix_of"]


class Mixes:
    """Mixing matrices as attributes of an object: compiled code takes those as inputs and does not build them itself.

    A `constant_result` function cannot return them: two such tensors in a graph get the same name in torch 2.13.
    """


MIXES = Mixes()


def mix_of(groups: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix ``[d, d]`` of groups (size, bits), built at the first call, also while torch.compile traces."""
    if torch.compiler.is_compiling():
        # Sizes and bits may be traced as symbols; the length of a range is a plain number.
        groups = tuple([(len(range(size)), len(range(bits))) for size, bits in groups])
        return getattr(MIXES, _compiled_name(groups, dtype, device))
    name = _name(groups, dtype, device)
    matrix = getattr(MIXES, name, None)
    return _build_and_keep(name, groups, dtype, device) if matrix is None else matrix


@constant_result
def _compiled_name(groups: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> str:
    name = _name(groups, dtype, device)
    if not hasattr(MIXES, name):
        _build_and_keep(name, groups, dtype, device)
    keep_in_place_if_compiling(getattr(MIXES, name))
    return name


@functools.cache
def _name(groups: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> str:
    """Name the attribute of `MIXES` that holds a matrix."""
    return re.sub(r"\W+", "_", f"mix {groups} {dtype} {device}")


@torch.inference_mode(False)  # the matrix may be used under autograd later
def _build_and_keep(name: str, groups: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build a matrix, and keep it if it is a plain tensor: under `FakeTensorMode` it has no numbers."""
    matrix = build_mix(groups, dtype, device)
    if type(matrix) is Tensor:
        setattr(MIXES, name, matrix)
    return matrix


def build_mix(groups: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    blocks = [
        hadamard(size, device) if bits in PARTS else torch.eye(size, dtype=torch.float64, device=device)
        for size, bits in groups
    ]
    return torch.block_diag(*blocks).to(dtype)


def hadamard(size: int, device: torch.device) -> Tensor:
    """Build an orthonormal matrix of entries of like size: Hadamard, times a cosine transform for an odd factor."""
    odd = size // (size & -size)
    n = torch.arange(odd, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi / odd * (n[:, None] + 0.5) * n) * math.sqrt(2 / odd)
    matrix = torch.cat([matrix[:, :1] / math.sqrt(2), matrix[:, 1:]], dim=1)
    butterfly = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device) / math.sqrt(2)
    while matrix.shape[0] < size:
        matrix = torch.kron(butterfly, matrix)
    return matrix
