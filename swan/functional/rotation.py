"""Orthogonal rotations of queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import einsum, rearrange
from torch import Tensor

from swan.compiling import constant_result

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["check_basis", "fold_value_rotation", "inverse_rotate", "random_rotation", "rotate"]


def rotate(
    x: Float[Tensor, "batch heads tokens d"], basis: Float[Tensor, "kv_heads d d"]
) -> Float[Tensor, "batch heads tokens d"]:
    r"""Rotate vectors into a basis: $x' = x P_h$ for each KV head $h$.

    Queries rotate with the basis of the KV head that their query group shares, so
    $q' \cdot k' = q P P^\top k = q \cdot k$: attention scores do not change.

    Args:
        x: queries, keys or values; ``heads`` is a multiple of ``kv_heads``.
        basis: one orthogonal matrix per KV head, columns sorted by importance, dtype of `x`.

    Returns:
        The rotated vectors, same shape and dtype.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes differ.

    Example:
        >>> basis = random_rotation(2, 16, seed=0)
        >>> q, k = torch.randn(1, 6, 3, 16), torch.randn(1, 2, 5, 16)
        >>> rotate(q, basis).shape
        torch.Size([1, 6, 3, 16])

    Source: arXiv:2511.18936.
    """
    return _apply(x, basis)


def inverse_rotate(
    x: Float[Tensor, "batch heads tokens d"], basis: Float[Tensor, "kv_heads d d"]
) -> Float[Tensor, "batch heads tokens d"]:
    r"""Rotate vectors back from a basis: $x = x' P_h^\top$, the inverse of `rotate`.

    Args:
        x: rotated vectors, for instance attention outputs over rotated values.
        basis: the basis that `rotate` was given.

    Returns:
        The vectors in the original coordinates, same shape and dtype.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes differ.

    Example:
        >>> basis, x = random_rotation(2, 16, seed=0), torch.randn(1, 2, 5, 16)
        >>> torch.allclose(inverse_rotate(rotate(x, basis), basis), x, atol=1e-5)
        True

    Source: arXiv:2511.18936.
    """
    return _apply(x, basis, inverse=True)


@constant_result  # torch.compile cannot trace a generator; the same seed draws the same
def random_rotation(
    kv_heads: int, d: int, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Float[Tensor, "kv_heads d d"]:
    r"""Draw orthogonal matrices uniformly (Haar): $Q$ of $G = QR$, signs fixed by $\mathrm{diag}(R)$.

    Args:
        kv_heads: number of matrices.
        d: head dimension.
        seed: seed of the draw, the same on every device.
        dtype: dtype of the result; the draw is made in float64.
        device: device of the result.

    Returns:
        ``[kv_heads, d, d]``.

    Example:
        >>> basis = random_rotation(1, 16, seed=0)
        >>> torch.allclose(basis[0] @ basis[0].T, torch.eye(16), atol=1e-5)
        True

    Source: Mezzadri, arXiv:math-ph/0609050.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(kv_heads, d, d, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    signs = torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))
    return (q * signs[:, None, :]).to(dtype=dtype, device=device)


@torch.no_grad()
def fold_value_rotation(
    v_weight: Float[Tensor, "kv_d dim"],
    o_weight: Float[Tensor, "dim heads_d"],
    basis: Float[Tensor, "kv_heads d d"],
    v_bias: Float[Tensor, " kv_d"] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Fold a value basis into the projections: $W_V' = P^\top W_V$, $b_V' = P^\top b_V$, $W_O' = W_O P$.

    Values come out rotated at no cost per token, and the layer computes the same function. The output
    bias does not change. Products are formed in float64 and rounded once.

    Args:
        v_weight: weight of the value projection, ``[kv_heads * d, dim]``.
        o_weight: weight of the output projection, ``[dim, heads * d]``; ``heads`` a multiple of
            ``kv_heads``.
        basis: value basis.
        v_bias: bias of the value projection.

    Returns:
        New value weight, output weight and value bias (None if there was none), in the dtypes of
        the inputs.

    Raises:
        ValueError: shapes do not fit the basis.

    Example:
        >>> v, o = torch.nn.Linear(32, 32), torch.nn.Linear(64, 32)
        >>> basis = random_rotation(2, 16, seed=0)
        >>> w_v, w_o, b_v = fold_value_rotation(v.weight, o.weight, basis, v.bias)
        >>> w_v.shape, w_o.shape, b_v.shape
        (torch.Size([32, 32]), torch.Size([32, 64]), torch.Size([32]))

    Source: arXiv:2511.18936.
    """
    kv_heads, d, _ = basis.shape
    if v_weight.shape[0] != kv_heads * d or o_weight.shape[1] % (kv_heads * d):
        raise ValueError(
            f"a basis {list(basis.shape)} needs a value weight [{kv_heads * d}, dim] and an output weight "
            f"[dim, a multiple of {kv_heads * d}], got {list(v_weight.shape)} and {list(o_weight.shape)}"
        )
    wide = basis.double()
    v_heads = rearrange(v_weight.double(), "(h d) i -> h d i", h=kv_heads)
    v_folded = einsum(wide, v_heads, "h d e, h d i -> h e i")
    o_heads = rearrange(o_weight.double(), "o (h g d) -> o h g d", h=kv_heads, d=d)
    o_folded = einsum(o_heads, wide, "o h g d, h d e -> o h g e")
    bias = None
    if v_bias is not None:
        b_heads = rearrange(v_bias.double(), "(h d) -> h d", h=kv_heads)
        bias = rearrange(einsum(wide, b_heads, "h d e, h d -> h e"), "h e -> (h e)").to(v_bias.dtype)
    return (
        rearrange(v_folded, "h e i -> (h e) i").to(v_weight.dtype),
        rearrange(o_folded, "o h g e -> o (h g e)").to(o_weight.dtype),
        bias,
    )


def check_basis(basis: Tensor) -> None:
    """Raise ValueError unless `basis` is ``[kv_heads, d, d]``, finite and orthogonal."""
    if basis.ndim != 3 or basis.shape[1] != basis.shape[2]:
        raise ValueError(f"a basis has the shape [kv_heads, d, d], got {list(basis.shape)}")
    if not torch.isfinite(basis).all():
        raise ValueError("the basis holds NaN or infinity; calibrate again")
    gram = einsum(basis.double(), basis.double(), "h d e, h d f -> h e f")
    error = (gram - torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)).abs().max().item()
    tolerance = 8 * torch.finfo(basis.dtype).eps
    if error > tolerance:
        raise ValueError(
            f"the basis is not orthogonal: max |P^T P - I| = {error:.2g} is above {tolerance:.2g} for "
            f"{basis.dtype}; pass orthogonal matrices, such as random_rotation or a Calibration gives"
        )


def _apply(x: Tensor, basis: Tensor, *, inverse: bool = False) -> Tensor:
    """Multiply the vectors of each head with the matrix of its KV head, or its inverse."""
    if not torch.compiler.is_compiling():
        if basis.ndim != 3 or basis.shape[1] != basis.shape[2]:
            raise ValueError(f"a basis has the shape [kv_heads, d, d], got {list(basis.shape)}")
        if x.ndim != 4 or x.shape[-1] != basis.shape[-1] or x.shape[1] % basis.shape[0]:
            raise ValueError(
                f"expected x [batch, heads, tokens, {basis.shape[-1]}] with heads a multiple of "
                f"{basis.shape[0]}, got {list(x.shape)}"
            )
        if x.dtype != basis.dtype:
            raise TypeError(f"x is {x.dtype} and the basis is {basis.dtype}; use basis.to({x.dtype})")
        if x.device != basis.device:
            raise ValueError(f"x is on {x.device} and the basis on {basis.device}; move one of them")
    if torch.is_autocast_enabled(device := "cuda" if x.is_cuda else "cpu"):  # as `outside_autocast`, which adds a call
        with torch.autocast(device, enabled=False):
            return _apply(x, basis, inverse=inverse)
    (batch, heads, tokens, d), kv_heads = x.shape, basis.shape[0]
    matrices = basis.mT if inverse else basis
    # Four times in each step, so plain reshapes, and few: those of einops take longer than the product.
    if batch == 1:
        return torch.bmm(x.reshape(kv_heads, -1, d), matrices).view(x.shape)
    rows = x.reshape(batch, kv_heads, heads // kv_heads, tokens, d).transpose(0, 1)
    product = torch.bmm(rows.reshape(kv_heads, -1, d), matrices)
    return product.view(rows.shape).transpose(0, 1).reshape(x.shape)
