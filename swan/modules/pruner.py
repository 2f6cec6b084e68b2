"""`StructuredPruner`: `pack` as a module."""

from torch import Tensor, nn

from swan.functional.packing import pack
from swan.storage import Layout, Packed

__all__ = ["StructuredPruner"]


class StructuredPruner(nn.Module):
    """Prunes vectors and stores the rest: ``pack(x, layout)``.

    Args:
        layout: a `TopK`, `Graded` or other `Layout`.

    Shape:
        ``[batch, heads, tokens, d]`` in, a `Packed` of the same shape out.

    Example:
        >>> import torch, swan
        >>> pruner = StructuredPruner(swan.TopK(64, keep=32))
        >>> packed = pruner(torch.randn(1, 2, 100, 64))
        >>> packed.shape, packed.nbytes
        ((1, 2, 100, 64), 8400)

    Source: arXiv:2511.18936.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Packed:
        """Store `x` in the layout.

        Raises:
            ValueError: `x` does not have 4 axes or its last one is not the layout's ``d``.
            TypeError: `x` is not floating point.
        """
        return pack(x, self.layout)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return repr(self.layout)
