"""Fused kernels over `Packed`, one file each. None of them is imported before it is used."""

from typing import NamedTuple

from torch import Tensor


class Recent(NamedTuple):
    """Tokens that are not packed: keys and values ``[batch, kv_heads, tokens, d]``, and which a query sees or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None
