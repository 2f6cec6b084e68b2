"""Second moments of queries, keys and values, summed while a model runs; activations are never kept."""

from dataclasses import dataclass, fields

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

__all__ = ["Moments", "output_projection"]

OUTPUT_NAMES = ("o_proj", "out_proj", "wo", "dense", "c_proj")


@dataclass
class Moments:
    r"""Sums $\sum_t x_t x_t^\top$ of one layer, float64 ``[kv_heads, d, d]``.

    Args:
        q: queries after RoPE, summed over the heads of each query group.
        k: keys after RoPE.
        v: values.
        o: $\sum_h W_{O,h}^\top W_{O,h}$ of the output projection over each query group, zero if it is not known.
        tokens: tokens summed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    tokens: int = 0

    @classmethod
    def begin(cls, q: Tensor, k: Tensor, v: Tensor, attention: nn.Module | None) -> "Moments":
        """Begin with zero moments for queries, keys and values like these, and the output moment of `attention`."""
        kv_heads, d, dv = k.shape[1], k.shape[3], v.shape[3]
        zeros_k, zeros_v = (torch.zeros(kv_heads, n, n, dtype=torch.float64, device=k.device) for n in (d, dv))
        projection = None if attention is None else output_projection(attention)
        o = zeros_v.clone()
        if projection is not None:
            o = _output_moment(projection, q.shape[1], kv_heads, dv, k).to(zeros_v)
        return cls(zeros_k.clone(), zeros_k.clone(), zeros_v, o)

    @torch.no_grad()
    def add(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Add the tokens of one forward.

        Args:
            q: ``[batch, heads, tokens, d]``.
            k: ``[batch, kv_heads, tokens, d]``.
            v: ``[batch, kv_heads, tokens, dv]``.
            real: boolean ``[batch, tokens]``, False for padding.
        """
        for moment, x in ((self.q, q), (self.k, k), (self.v, v)):
            wide = rearrange(x, "b (h g) t d -> h b g t d", h=k.shape[1]).double()
            if real is not None:
                wide = torch.where(real[:, None, :, None], wide, 0)
            moment += einsum(wide, wide, "h b g t d, h b g t e -> h d e")
        self.tokens += k.shape[0] * k.shape[2] if real is None else int(real.sum())

    def without(self, part: "Moments") -> "Moments":
        """Return the moments of all tokens but those of a part of them."""
        q, k, v = (getattr(self, name) - getattr(part, name) for name in "qkv")
        return Moments(q, k, v, self.o, self.tokens - part.tokens)

    def check(self, name: str) -> None:
        """Raise ValueError where a moment is not finite or no token was seen."""
        if self.tokens == 0:
            raise ValueError(f"{name} saw no tokens; give calibrate at least one batch")
        for field in fields(self):
            moment = getattr(self, field.name)
            if isinstance(moment, Tensor) and not torch.isfinite(moment).all():
                raise ValueError(
                    f"{name}: the {field.name} activations hold NaN or infinity; calibrate in float32 or bfloat16, "
                    "and check the model on the calibration text"
                )


def output_projection(attention: nn.Module) -> nn.Module | None:
    """Return the output projection of an attention module by its usual names, or None."""
    for name in OUTPUT_NAMES:
        child = getattr(attention, name, None)
        if isinstance(child, nn.Module):
            return child
    return None


@torch.no_grad()
def _output_moment(projection: nn.Module, heads: int, kv_heads: int, dv: int, like: Tensor) -> Tensor:
    """Compute the Gram matrix of the outputs of the projection for each value coordinate.

    The module is applied to unit vectors, so that quantized and adapted projections count as they act.
    """
    weight = next(projection.parameters(), like)
    dtype = weight.dtype if weight.is_floating_point() else like.dtype
    unit = torch.eye(heads * dv, dtype=dtype, device=like.device)  # offloaded weights come there
    columns = (projection(unit) - projection(torch.zeros_like(unit[:1]))).double()
    by_head = rearrange(columns, "(h g d) o -> h g d o", h=kv_heads, d=dv)
    return einsum(by_head, by_head, "h g d o, h g e o -> h d e")
