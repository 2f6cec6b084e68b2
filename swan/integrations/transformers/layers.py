"""Winnowed layers in transformers' cache protocol, and checks of the layers that are not winnowed."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from swan.calibration.capture import hides
from swan.compiling import constant_result
from swan.integrations.transformers.attention import Pending, computed_dtype
from swan.modules import KVCache

__all__ = [
    "StaticSwanLayer", "SwanLayer", "check_croppable", "check_excluded", "check_layers", "is_full", "layer_bytes",
]  # fmt: skip


_said = False  # whether it was said that dynamic caches are not for torch.compile


class SwanLayer(CacheLayerMixin):
    """One winnowed layer in transformers' cache protocol. The work is done in the attention function."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, kv: KVCache, bases: str) -> None:
        super().__init__()
        self.kv, self.bases = kv, bases
        self.home: torch.device | None = None  # the device that an offloaded layer goes back to
        self.is_initialized = not kv.static

    def __repr__(self) -> str:
        return f"SwanLayer({self.kv.plan_layer})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: memory is allocated with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Hand new tokens on to the attention function."""
        if torch.compiler.is_compiling() and not self.kv.static:
            _say_what_to_compile()
        self.prefetch()
        return Pending(key_states, self.kv, self.bases), Pending(value_states, self.kv, self.bases)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of masks."""
        return self.kv.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.kv.length

    def get_max_length(self) -> int:
        """Return the number of tokens that fit, -1 for no limit."""
        return self.kv.max_length or -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.15

    def reset(self) -> None:
        """Forget all tokens."""
        self.kv.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        # Negative: tokens to remove. Positive: the length to keep, in versions before 5.15.
        length = self.kv.length
        self.kv.crop(max(length + tokens_to_remove, 0) if tokens_to_remove <= 0 else min(tokens_to_remove, length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        self.kv.map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.kv.map_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.kv.map_batch(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Move to the CPU."""
        if self.home is None and self.kv.state.k_recent is not None:
            self.home = self.kv.state.k_recent.device
            self.kv.to("cpu")

    def prefetch(self) -> None:
        """Come back from the CPU."""
        if self.home is not None:
            self.kv.to(self.home)
            self.home = None


class StaticSwanLayer(SwanLayer):
    """One winnowed layer with fixed memory. Its length is a tensor: compiled code does not depend on it."""

    is_compileable = True
    supports_early_init = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory."""
        dtype = computed_dtype(key_states)
        self.kv.allocate(key_states.to(dtype), value_states.to(dtype))
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of masks."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        """Return the number of tokens seen."""
        return self.kv.state.length

    def reset(self) -> None:
        """Forget all tokens."""
        self.kv.crop(0)


@constant_result
def _say_what_to_compile() -> bool:
    """Warn, the first time that code on a dynamic cache is compiled; return whether that was done."""
    global _said
    if not _said:
        _said = True
        warnings.warn(
            "this SwanCache is dynamic: its shapes change from step to step, and torch.compile compiles each anew; "
            "SwanCache(model, levels=[0.33], static=True, max_length=4096) is meant for it",
            stacklevel=2,
        )
    return _said


def layer_bytes(layer: Any) -> tuple[int, int]:
    """Count the bytes that a layer of any kind holds, and those of a dense cache."""
    if isinstance(layer, SwanLayer):
        return layer.kv.nbytes, layer.kv.dense_nbytes
    states = [getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states")]
    size = sum(t.untyped_storage().nbytes() for t in pytree.tree_leaves(states) if isinstance(t, Tensor))
    return size, size


def is_full(layer: Any, config: Any) -> bool:
    """Tell if a layer of transformers keeps all tokens: its window, if it has one, hides nothing from the model."""
    if type(layer) is DynamicSlidingWindowLayer:
        return not hides(layer.sliding_window, config)
    return type(layer) is DynamicLayer


def check_layers(layers: list[Any], attention: list[int], config: Any) -> None:
    """Check that transformers would keep only full and sliding attention in the caches of attention layers.

    Raises:
        ValueError: there are layers of other kinds, or none of full attention.
    """
    kinds = [type(layers[index]) if index < len(layers) else None for index in attention]
    other = {kind.__name__ for kind in kinds if kind and kind not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if other or None in kinds:
        raise ValueError(
            f"{len(attention)} attention layers with a cache of their own each were expected, got {len(layers)} caches"
            + (f" with {', '.join(sorted(other))} among them" if other else "")
        )
    if not any(is_full(layer, config) for layer in layers):
        raise ValueError("every layer attends to a sliding window only; there is no history to winnow")


def check_croppable(layers: list[Any]) -> None:
    """Raise a ValueError if a layer of transformers cannot forget its last tokens."""
    for index, layer in enumerate(layers):
        if not isinstance(layer, SwanLayer) and (reason := _uncroppable(layer)) is not None:
            raise ValueError(f"layer {index}, a {type(layer).__name__} of transformers, cannot forget tokens: {reason}")


def _uncroppable(layer: Any) -> str | None:
    if not hasattr(layer, "crop"):
        return "it has no way to"
    recurrent = getattr(layer, "is_recurrent_states_initialized", False)
    if any(recurrent.values()) if isinstance(recurrent, dict) else recurrent:
        return "its state holds them for good"
    records = getattr(layer, "record_past", False)
    if hasattr(layer, "conv_states") and not records:
        return "call cache.activate_past_recording() before they come"
    if records or not getattr(layer, "is_sliding", False):
        return None
    length = int(layer.get_seq_length())
    if hasattr(layer, "max_cache_len"):
        return "its window has moved on; use a dynamic cache" if length > layer.max_cache_len else None
    return "call cache.activate_past_recording() before they come" if length >= layer.sliding_window else None


def check_excluded(exclude: tuple[int, ...], layers: list[Any], config: Any) -> None:
    """Raise a ValueError if other layers than those of full attention are excluded, or all of them."""
    full = [index for index, layer in enumerate(layers) if is_full(layer, config)]
    if not set(exclude) <= set(full):
        raise ValueError(f"exclude takes layers of full attention, here {full}, got {list(exclude)}")
    if len(exclude) == len(full):
        raise ValueError("every layer of full attention is excluded; there is no history to winnow")
