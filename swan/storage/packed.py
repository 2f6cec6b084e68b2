"""`Packed`: vectors as a layout stores them, and `unpack`, which returns them dense.

Every stored tensor has the axes ``[batch, heads, tokens, bytes or values]``, so one index selects tokens in all; heads
are all of them, but for `ByHead`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from swan.compiling import outside_autocast
from swan.storage.layout import Layout

__all__ = ["Packed", "check_vectors", "mixing", "unpack", "unpack_mixed"]


@dataclass(frozen=True)
class Packed:
    """Vectors ``[batch, heads, tokens, d]`` as a layout stores them; a registered pytree.

    Args:
        planes: values; for `TopK` one tensor ``[batch, heads, tokens, keep]`` in the order of the
            coordinates (at 4 bits packed in bytes), for `Graded` one uint8 tensor of all groups below 16 bits
            and one of the groups of 16 bits, as far as there are any; for `ByHead` all tensors of each run of heads.
        scales: ``[batch, heads, tokens, 1]``, for `Graded` uint8 with one for each group below 16 bits; or None.
        positions: uint8 ``[batch, heads, tokens, position_bytes]`` or None.
        format: the layout, which says how to read them.
        dtype: dtype of the vectors.

    Example:
        >>> from swan import TopK, pack
        >>> packed = pack(torch.randn(1, 2, 100, 64), TopK(64, keep=32))
        >>> packed.shape, packed.nbytes, packed.tokens(0, 10).shape
        ((1, 2, 100, 64), 8400, (1, 2, 10, 64))

    Source: the formats are those of `TopK` and `Graded`.
    """

    planes: tuple[Tensor, ...]
    scales: Tensor | None
    positions: Tensor | None
    format: Layout
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All stored tensors."""
        scales = () if self.scales is None else (self.scales,)
        positions = () if self.positions is None else (self.positions,)
        return (*self.planes, *scales, *positions)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, tokens, d)``."""
        batch, heads, tokens = self.planes[0].shape[:3]
        return batch, getattr(self.format, "kv_heads", heads), tokens, self.format.d

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.planes[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors (not of storage that they share with others)."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Packed":
        """Apply `fn` to each stored tensor; return a new `Packed` of the results."""
        scales = None if self.scales is None else fn(self.scales)
        positions = None if self.positions is None else fn(self.positions)
        return Packed(tuple([fn(plane) for plane in self.planes]), scales, positions, self.format, self.dtype)

    def tokens(self, start: int, stop: int) -> "Packed":
        """Return a view of tokens `start` to `stop`."""
        planes = tuple([t[:, :, start:stop] for t in self.planes])
        scales = None if self.scales is None else self.scales[:, :, start:stop]
        positions = None if self.positions is None else self.positions[:, :, start:stop]
        return Packed(planes, scales, positions, self.format, self.dtype)


pytree.register_pytree_node(
    Packed,
    lambda p: ([p.planes, p.scales, p.positions], (p.format, p.dtype)),
    lambda children, context: Packed(*children, *context),
    serialized_type_name="swan.Packed",
)


@outside_autocast
def unpack(packed: Packed) -> Tensor:
    r"""Return the vectors that a `Packed` stores, pruned coordinates as zeros: $\hat x$ of `TopK` and `Graded`.

    Args:
        packed: packed vectors, from `pack`, or some of their tokens.

    Returns:
        ``[batch, heads, tokens, d]`` in ``packed.dtype``.

    Example:
        >>> from swan import TopK, pack
        >>> x = torch.randn(1, 2, 5, 64)
        >>> torch.equal(unpack(pack(x, TopK(64, keep=64, bits=16))), x)
        True

    Source: arXiv:2511.18936.
    """
    values, matrix = unpack_mixed(packed), mixing(packed)
    return values if matrix is None else values @ matrix.mT


def mixing(packed: Packed) -> Tensor | None:
    """Return the orthonormal matrix ``[d, d]`` that mixed vectors before they were stored, or None.

    ``unpack(p) == unpack_mixed(p) @ mixing(p).mT``: attention applies it to queries and outputs, not to tokens.
    """
    return packed.format.mix(packed.dtype, packed.planes[0].device)


def unpack_mixed(packed: Packed) -> Tensor:
    """Unpack into the coordinates of `mixing`."""
    return packed.format.unpack(packed)


def check_vectors(x: Any, layout: Layout) -> None:
    """Raise a TypeError or ValueError if `x` is not vectors of a layout."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected a floating-point tensor, got {got}")
    if x.ndim != 4 or x.shape[-1] != layout.d:
        raise ValueError(f"expected vectors [batch, heads, tokens, {layout.d}] for {layout}, got {list(x.shape)}")
    if (heads := getattr(layout, "kv_heads", x.shape[1])) != x.shape[1]:
        raise ValueError(f"the layout is for {heads} KV heads, got {x.shape[1]}")
