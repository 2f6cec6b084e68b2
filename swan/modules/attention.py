"""`SwanAttention`: a causal self-attention layer that can decode on a winnowed cache."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from swan.functional.attention import dense_attention
from swan.functional.rotation import check_basis, inverse_rotate, rotate
from swan.modules.cache import KVCache

__all__ = ["SwanAttention"]


class SwanAttention(nn.Module):
    r"""Multi-head causal self-attention with grouped queries, and a winnowed cache for decoding.

    Without a cache it is plain attention with gradients. With a `KVCache` it rotates queries and keys
    with the key basis $P_K$ and values with $P_V$, attends on the cache, and rotates the output back,
    $o = \mathrm{attend}(q P_K, k P_K, v P_V)\, P_V^\top$: the same function, until the cache prunes. Bases begin
    as the identity; `swan.calibrate` and `swan.attach` set them.

    Args:
        dim: width of the model.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; `heads` by default.
        head_dim: head dimension, ``dim // heads`` by default.
        rope: base of the rotary position embedding (half-split pairs), or None for no positions.
        qk_norm: RMS-normalize queries and keys per head before RoPE.
        bias: biases in the query, key and value projections.

    Raises:
        ValueError: sizes that do not divide.

    Example:
        >>> import torch, swan
        >>> attention = SwanAttention(64, heads=4, kv_heads=2)
        >>> x = torch.randn(1, 10, 64)
        >>> cache = swan.KVCache(swan.LayerPlan(swan.TopK(16, 16, bits=16), swan.TopK(16, 16, bits=16)))
        >>> torch.allclose(attention(x, cache), attention(x), atol=1e-5)
        True

    Source: arXiv:2511.18936; grouped queries are arXiv:2305.13245, RoPE is arXiv:2104.09864.
    """

    key_basis: Tensor
    value_basis: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope: float | None = 10_000.0,
        qk_norm: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.kv_heads = dim, heads, heads if kv_heads is None else kv_heads
        if heads < 1 or self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if head_dim is None and dim % heads:
            raise ValueError(f"dim ({dim}) is not a multiple of heads ({heads}); give head_dim")
        self.head_dim = dim // heads if head_dim is None else head_dim
        if rope is not None and self.head_dim % 2:
            raise ValueError(f"RoPE pairs coordinates, so head_dim must be even, got {self.head_dim}")
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.rope = rope
        self.register_buffer("key_basis", self._identity())
        self.register_buffer("value_basis", self._identity())
        self._bases_set = False
        self.observer: Callable[[Tensor, Tensor, Tensor, Tensor], Any] | None = None
        """Called with q, k (after RoPE), v and the output ``[batch, tokens, heads, d]`` of each forward without a
        cache; `swan.calibrate` sets it."""

    def forward(self, x: Tensor, cache: KVCache | None = None, *, padding: Tensor | None = None) -> Tensor:
        """Attend over `x` alone, or over the cache and `x`.

        Args:
            x: ``[batch, tokens, dim]``.
            cache: the layer's cache; takes in the tokens of `x`.
            padding: left padding of each row ``[batch]``, in tokens of the whole sequence; a cache
                remembers it.

        Returns:
            ``[batch, tokens, dim]``; the output at padding means nothing.

        Raises:
            ValueError: `x` has another width, or the cache cannot take its tokens.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"expected x [batch, tokens, {self.dim}], got {list(x.shape)}")
        if cache is None:
            q, k, v = self._project(x, 0, padding)
            mask = None if padding is None else _key_mask(padding, x.shape[1])
            out = dense_attention(q, k, v, mask=mask, causal=True)
        else:
            row_padding = cache.state.padding if padding is None else padding
            q, k, v = self._project(x, cache.state.length, row_padding)
            key_basis, value_basis = self.key_basis.to(x.dtype), self.value_basis.to(x.dtype)
            q, k, v = rotate(q, key_basis), rotate(k, key_basis), rotate(v, value_basis)
            out = inverse_rotate(cache(q, k, v, padding=padding), value_basis)
        out = rearrange(out, "b h t d -> b t h d")
        if cache is None and self.observer is not None:
            self.observer(q, k, v, out)
        return self.o_proj(out.flatten(2))

    def set_bases(self, key_basis: Tensor, value_basis: Tensor) -> None:
        """Set both bases ``[kv_heads, d, d]``; caches filled before no longer fit.

        Raises:
            ValueError: wrong shape, or not orthogonal.
        """
        for name, basis in (("key_basis", key_basis), ("value_basis", value_basis)):
            if basis.shape != self.key_basis.shape:
                raise ValueError(f"{name} must be {list(self.key_basis.shape)}, got {list(basis.shape)}")
            check_basis(basis)
        self.key_basis.copy_(key_basis)
        self.value_basis.copy_(value_basis)
        self._bases_set = True

    def reset_bases(self) -> None:
        """Set both bases to the identity, as in a new module."""
        self.set_bases(self._identity(), self._identity())
        self._bases_set = False

    @property
    def has_bases(self) -> bool:
        """True once bases were set, or came with a state dict."""
        identity = self._identity().to(self.key_basis)
        return self._bases_set or any(not torch.equal(basis, identity) for basis in (self.key_basis, self.value_basis))

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, rope={self.rope}"
        )

    def _identity(self) -> Tensor:
        return torch.eye(self.head_dim).repeat(self.kv_heads, 1, 1)

    def _project(self, x: Tensor, start: int | Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b h t d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is None:
            return q, k, v
        # Not a buffer: `.to(torch.bfloat16)` would round it, and with it every position.
        frequencies = self.rope ** -(torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim)
        positions = (torch.arange(x.shape[1], device=x.device) + start)[None]
        if padding is not None:
            positions = positions - padding[:, None]
        angles = positions[:, None, :, None] * frequencies
        return _apply_rope(q, angles), _apply_rope(k, angles), v


def _apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _key_mask(padding: Tensor, tokens: int) -> Tensor:
    columns = torch.arange(tokens, device=padding.device)
    return (columns >= padding[:, None])[:, None, None].expand(-1, -1, tokens, -1)
