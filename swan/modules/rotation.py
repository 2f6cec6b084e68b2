"""`OrthoRotation`: `rotate` and `inverse_rotate` as a module."""

from torch import Tensor, nn

from swan.functional.rotation import check_basis, inverse_rotate, rotate

__all__ = ["OrthoRotation"]


class OrthoRotation(nn.Module):
    r"""Rotates vectors into a fixed orthogonal basis: $x' = x P_h$ for each KV head $h$.

    Args:
        basis: ``[kv_heads, d, d]``, orthogonal. Kept as a buffer, so it is in the state_dict and
            follows ``.to()``.

    Shape:
        ``[batch, heads, tokens, d]`` in and out, ``heads`` a multiple of ``kv_heads``.

    Raises:
        ValueError: the basis is not square, not finite or not orthogonal.

    Example:
        >>> import torch, swan
        >>> rotation = OrthoRotation(swan.random_rotation(2, 16, seed=0))
        >>> x = torch.randn(1, 2, 5, 16)
        >>> torch.allclose(rotation.inverse(rotation(x)), x, atol=1e-5)
        True

    Source: arXiv:2511.18936.
    """

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        check_basis(basis)
        self.register_buffer("basis", basis.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate `x` into the basis; raises as `rotate` does."""
        return rotate(x, self.basis)

    def inverse(self, x: Tensor) -> Tensor:
        r"""Rotate back from the basis, $x = x' P_h^\top$; raises as `inverse_rotate` does."""
        return inverse_rotate(x, self.basis)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return f"kv_heads={self.basis.shape[0]}, d={self.basis.shape[1]}"
