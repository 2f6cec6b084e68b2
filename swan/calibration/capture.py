"""Runs a model and observes q, k and v inside its attention function: no hooks per architecture."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from swan.modules import SwanAttention

__all__ = ["attention_layers", "evaluating", "fingerprint", "observing", "swan_layers"]

Observer = Callable[[int, nn.Module, Tensor, Tensor, Tensor, Tensor | None], None]
OBSERVE = "swan_observe"  # name of the observing attention function in transformers
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments of attention functions that change the scores

_observer: Observer | None = None


def swan_layers(model: nn.Module) -> list[SwanAttention]:
    """The `SwanAttention` modules of a model of one's own, in order."""
    return [module for module in model.modules() if isinstance(module, SwanAttention)]


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a transformers model by their layer index."""
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal"):
            found[index] = module
    return found


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a calibration must agree on with its model: fields of the configuration, never weights."""
    layers = swan_layers(model)
    if layers:
        return {"kind": "swan", "layers": [[a.dim, a.heads, a.kv_heads, a.head_dim, a.rope] for a in layers]}
    config = _config(model)
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {"kind": "transformers", **{name: _field(config, name) for name in (*names, "vocab_size")}}


@contextlib.contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """While it lasts, `observer` gets (layer, attention module, q, k, v, real) of each forward."""
    layers = swan_layers(model)
    watch = _observe_swan(layers, observer) if layers else _observe_transformers(model, observer)
    with watch:
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module returns to the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _observe_swan(layers: list[SwanAttention], observer: Observer) -> Iterator[None]:
    def observe(index: int, layer: SwanAttention) -> Callable[[Tensor, Tensor, Tensor], None]:
        return lambda q, k, v: observer(index, layer, q, k, v, None)

    for index, layer in enumerate(layers):
        layer.observer = observe(index, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


@contextlib.contextmanager
def _observe_transformers(model: nn.Module, observer: Observer) -> Iterator[None]:
    global _observer
    config = _config(model)
    import transformers
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    transformers.AttentionInterface.register(OBSERVE, _observed_attention)
    AttentionMaskInterface.register(OBSERVE, sdpa_mask)
    assert isinstance(model, transformers.PreTrainedModel)
    before = config._attn_implementation
    if _observer is not None:
        raise RuntimeError("another calibration is running in this process; wait for it")
    _observer = observer
    model.set_attn_implementation(OBSERVE)
    try:
        yield
    finally:
        _observer = None
        model.set_attn_implementation(before)


def _observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert _observer is not None
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        asked.append(f"a mask of {attention_mask.dtype}")
    if asked:
        raise ValueError(f"{type(module).__name__} computes its attention with {', '.join(asked)}: not supported")
    # A token is real where it sees itself; others may be out of a sliding window's sight.
    real = None if attention_mask is None else attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
    index = module.layer_idx
    assert isinstance(index, int)
    _observer(index, module, query, key, value, real)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise TypeError(
            f"{type(model).__name__} has no SwanAttention modules and is not a transformers model; build its attention "
            "from swan.SwanAttention, or load it with transformers"
        )
    if config.is_encoder_decoder:
        raise TypeError(f"{type(model).__name__} has an encoder and a decoder; swan is for decoders alone")
    return config.get_text_config(decoder=True)


def _field(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers raises it for a field that differs from layer to layer
        return None
