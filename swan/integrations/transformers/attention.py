"""The attention function that transformers calls: on the winnowed cache where there is one."""

from typing import Any, NoReturn, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from swan.calibration.capture import CHANGE_SCORES, boolean_mask, given
from swan.compiling import constant_result
from swan.functional.rotation import inverse_rotate, rotate
from swan.modules import KVCache

__all__ = ["NAME", "Pending", "Strayed", "computed_dtype", "swan_attention_forward"]

NAME = "swan"  # name of the attention function in transformers
UNSUPPORTED = (*CHANGE_SCORES, "cu_seq_lens_q", "cache", "output_attentions")


class Strayed(AttributeError):
    """Raised where another function than swan's attention uses the keys and values of a `SwanCache`."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"a SwanCache reached an attention function that is not swan's (it asked for {name!r}); call "
            "swan.attach(model, calibration), and leave the attention implementation at 'swan' while the cache is used"
        )


class Pending:
    """Keys or values of new tokens on their way from `Cache.update` to swan's attention function."""

    def __init__(self, states: Tensor, cache: KVCache, bases: str) -> None:
        self.states, self.cache, self.bases = states, cache, bases

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Strayed(name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise Strayed(func.__name__)


def swan_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend on the winnowed cache where there is one, else by transformers' own SDPA attention."""
    if not isinstance(key, Pending):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if unsupported := given(kwargs, UNSUPPORTED):
        raise ValueError(f"swan's attention does not support {', '.join(unsupported)}")
    if key.bases != module.swan_bases:
        raise ValueError(
            "this SwanCache was made for a model with other bases; make one for this model: swan.SwanCache(model, ...)"
        )
    cache, key_basis, value_basis = key.cache, module.swan_key_basis, module.swan_value_basis
    assert isinstance(key_basis, Tensor)
    dtype, device = computed_dtype(query), query.device
    query, keys, values = (t.to(dtype) for t in (query, key.states, value.states))
    key_basis = key_basis.to(device, dtype)  # it is there already but where accelerate moves layers
    value_basis = None if value_basis is None else cast(Tensor, value_basis).to(device, dtype)
    mask = boolean_mask(module, attention_mask, query, kwargs.get("is_causal"), cache.state.length)
    out = cache(
        rotate(query, key_basis),
        rotate(keys, key_basis),
        values if value_basis is None else rotate(values, value_basis),
        mask=mask,
        padding=_padding(cache, mask, query.shape[2]),
        scale=scaling,
    )
    if value_basis is not None:
        out = inverse_rotate(out, value_basis)
    return rearrange(out, "b h t d -> b t h d").contiguous(), None


def computed_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which attention is computed: under autocast norms and RoPE may have left another."""
    device_type = x.device.type
    casting = _has_autocast(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if casting else x.dtype


@constant_result  # torch.compile of torch 2.11 does not trace what it asks
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _padding(cache: KVCache, mask: Tensor | None, queries: int) -> Tensor | None:
    """Read the left padding of each row from a mask, until each row has begun; None where there is none."""
    length, earlier, static = cache.state.length, cache.state.padding, cache.static
    if mask is None or (not static and (length > 0 if earlier is None else bool((earlier < length).all()))):
        return None
    new = mask.any((1, 2)).index_select(-1, torch.arange(queries, device=mask.device) + length)
    before = torch.where(new.any(-1), new.int().argmax(-1), queries)  # new tokens before the first that some query sees
    padding = before if earlier is None else torch.where(earlier < length, earlier, length + before)
    return padding if earlier is not None or bool(padding.any()) else None
