"""`Layout`, the protocol of ways to store a vector, and `LayerPlan`, the two layouts of a layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from swan.storage.packed import Packed

__all__ = ["MAX_DIM", "LayerPlan", "Layout", "check_dim", "keep_derived"]

MAX_DIM = 256  # a position fits in a byte


class Layout(Protocol):
    """A way to store one vector; `TopK` and `Graded` are layouts. Instances are immutable and hashable.

    Another way to store vectors is a class with these members; it works wherever a layout is expected:

    Example:
        >>> from swan import Packed, pack, unpack
        >>> @dataclass(frozen=True)
        ... class Half:
        ...     d: int
        ...     form = "half"
        ...
        ...     def vector_bytes(self, itemsize=2):
        ...         return 2 * self.d
        ...
        ...     def pack(self, x):
        ...         return Packed((x.half(),), None, None, self, x.dtype)
        ...
        ...     def unpack(self, packed):
        ...         return packed.planes[0].to(packed.dtype)
        ...
        ...     def mix(self, dtype, device):
        ...         return None
        >>> unpack(pack(torch.ones(1, 1, 1, 4), Half(4)))
        tensor([[[[1., 1., 1., 1.]]]])
    """

    form: ClassVar[str]

    @property
    def d(self) -> int:
        """Head dimension."""
        ...

    def vector_bytes(self, itemsize: int = 2) -> float:
        """Count the bytes that one vector takes in a cache whose dtype has `itemsize` bytes, on average over heads."""
        ...

    def pack(self, x: Tensor) -> "Packed":
        """Mix vectors ``[batch, heads, tokens, d]``, where the layout does, and store each independently of others."""
        ...

    def unpack(self, packed: "Packed") -> Tensor:
        """Return the stored vectors, in the coordinates of `mix`."""
        ...

    def mix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the orthonormal matrix ``[d, d]`` that mixes vectors before they are stored, or None."""
        ...


@dataclass(frozen=True)
class LayerPlan:
    r"""The layouts of one layer of a plan, for keys and values apart.

    A history token takes the share $\frac{\text{bytes(key)} + \text{bytes(value)}}{2\,(d_k + d_v)}$, its `retention`,
    of its bfloat16 bytes.

    Args:
        keys: layout of the keys.
        values: layout of the values, of the same or another head dimension.

    Raises:
        TypeError: `keys` or `values` is no layout.

    Example:
        >>> from swan import TopK
        >>> LayerPlan(TopK(64, 40), TopK(64, 24)).retention
        0.328125

    Source: arXiv:2511.18936 for `TopK`, this library for `Graded`.
    """

    keys: Layout
    values: Layout

    def __post_init__(self) -> None:
        for name, layout in (("keys", self.keys), ("values", self.values)):
            if not hasattr(layout, "vector_bytes"):
                raise TypeError(
                    f"{name} must be a layout, such as Graded(((64, 4),)) or TopK(64, keep=32), got {layout!r}"
                )

    @property
    def retention(self) -> float:
        """Bytes stored per history token over the bf16 bytes of the same key and value."""
        return (self.keys.vector_bytes() + self.values.vector_bytes()) / sum(self.dense_nbytes(1))

    def nbytes(self, vectors: int, itemsize: int = 2) -> tuple[int, int]:
        """Count the bytes of so many keys and as many values: tokens times KV heads times rows."""
        keys, values = self.keys.vector_bytes(itemsize), self.values.vector_bytes(itemsize)
        return round(vectors * keys), round(vectors * values)

    def dense_nbytes(self, vectors: int, itemsize: int = 2) -> tuple[int, int]:
        """Count the bytes that the same keys and values take dense."""
        return vectors * self.keys.d * itemsize, vectors * self.values.d * itemsize


def check_dim(d: int) -> None:
    """Raise a ValueError if a head dimension is out of range."""
    if not 1 <= d <= MAX_DIM:
        raise ValueError(f"the head dimension must be between 1 and {MAX_DIM}, got {d}")


def keep_derived(layout: Layout, **values: object) -> None:
    """Set attributes of a frozen layout that follow from its fields; torch.compile traces this."""
    for name, value in values.items():
        object.__setattr__(layout, name, value)
