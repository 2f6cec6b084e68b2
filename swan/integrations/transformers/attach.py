"""`attach` gives a transformers model the bases of its calibration and swan's attention; `detach` takes them back."""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from swan.calibration import Calibration, Plan
from swan.calibration.capture import attention_layers, evaluating, register_attention, tensor_parallel, unwrapped
from swan.calibration.moments import output_projection
from swan.functional.rotation import fold_value_rotation
from swan.integrations.transformers.attention import NAME, Strayed, swan_attention_forward
from swan.integrations.transformers.keyword import accept_cache, cache_keyword

__all__ = ["Attachment", "attach", "attachment_of", "detach", "head_shape", "is_attached"]


@dataclass
class Attachment:
    """The data of an attached model: its calibration and plan for caches, and its former state for `detach`."""

    calibration: Calibration
    implementation: str  # the model's own attention implementation
    folded: list[tuple[nn.Parameter, Tensor]]  # parameters that were folded, and their original values
    plan: Plan | None = None  # for caches that are made without a plan
    hooks: list[RemovableHandle] = dataclasses.field(default_factory=list)


def attach(model: PreTrainedModel, calibration: Calibration, fold: bool = False) -> None:
    """Attach a transformers model: see `swan.attach`."""
    if is_attached(model):
        raise ValueError("this model is already attached; call swan.detach(model) first")
    if _config(model)._attn_implementation == NAME:
        raise ValueError(
            "this model shares its config object with an attached model, and its attention with it; build it from a "
            "copy of the config"
        )
    calibration.check_model(model)
    layers = attention_layers(model)
    if len(layers) != len(calibration.layers):
        raise ValueError(f"calibrated {len(calibration.layers)} attention layers, the model has {len(layers)}")
    if fold:
        for index, layer in layers.items():
            _check_foldable(index, layer)
    register_attention(NAME, swan_attention_forward)
    attachment = Attachment(calibration, _config(model)._attn_implementation, [])
    model._swan_attachment = attachment  # type: ignore[assignment]
    rank, ranks = tensor_parallel(model)
    for index, bases in zip(sorted(layers), calibration.layers, strict=True):
        layer = layers[index]
        key_basis, value_basis = (b.chunk(ranks)[rank] for b in (bases.key_basis, bases.value_basis))
        weight = next((p for p in layer.parameters() if p.is_floating_point()), None)
        options: dict[str, Any] = (
            {"dtype": model.dtype} if weight is None else {"dtype": weight.dtype, "device": weight.device}
        )
        layer.register_buffer("swan_key_basis", key_basis.to(**options), persistent=False)
        if fold:
            attachment.folded += _fold(layer, value_basis)
        layer.register_buffer("swan_value_basis", None if fold else value_basis.to(**options), persistent=False)
    model.set_attn_implementation(NAME)
    attachment.hooks += accept_cache(model)
    try:
        _try_cache(model)
    except Exception as error:
        detach(model)
        computes = "it computes with keys and values between its cache and its attention"
        reason = computes if isinstance(error, Strayed) else error
        raise ValueError(f"swan does not support {type(model).__name__}: {reason}") from error


def detach(model: PreTrainedModel) -> None:
    """Detach a transformers model: see `swan.detach`."""
    attachment = getattr(model, "_swan_attachment", None)
    if not isinstance(attachment, Attachment):
        raise ValueError("this model is not attached; there is nothing to detach")
    for parameter, original in attachment.folded:
        parameter.data.copy_(original)
    for layer in attention_layers(model).values():
        del layer.swan_key_basis, layer.swan_value_basis
    model.set_attn_implementation(attachment.implementation)
    for hook in attachment.hooks:
        hook.remove()
    vars(model).pop("generate", None)
    del model._swan_attachment


def is_attached(model: nn.Module) -> bool:
    """Tell whether `attach` was called on this model."""
    return isinstance(getattr(unwrapped(model), "_swan_attachment", None), Attachment)


def attachment_of(model: nn.Module) -> Attachment:
    """Return the data that `attach` left in a model.

    Raises:
        ValueError: it is not attached.
    """
    attachment = getattr(unwrapped(model), "_swan_attachment", None)
    if not isinstance(attachment, Attachment):
        raise ValueError("this model is not attached; call swan.attach(model, calibration) first")
    return attachment


def head_shape(attention: nn.Module) -> tuple[int, int, int]:
    """Return the KV heads, and the dimensions of keys and of values, of an attached layer."""
    key_basis, value_basis = attention.swan_key_basis, attention.swan_value_basis
    head_dim = getattr(attention, "head_dim", None)
    assert isinstance(key_basis, Tensor)
    dv = value_basis.shape[-1] if isinstance(value_basis, Tensor) else head_dim or key_basis.shape[-1]
    return key_basis.shape[0], key_basis.shape[-1], dv


def _config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _try_cache(model: PreTrainedModel) -> None:
    """Run two tokens on a cache: some architectures use it elsewhere than in their attention, or not at all."""
    from swan.integrations.transformers.cache import SwanCache  # here, as cache.py imports this file

    body = cast(nn.Module, model.base_model)
    cache = SwanCache(model, retention=1.0)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad(), evaluating(model):
        body(tokens, **{cache_keyword(body): cache})
    unused = [index for index, kv in cache.winnowed.items() if kv.length != 2]
    if unused:
        raise ValueError(f"it does not use the cache in layers {unused}")


def _check_foldable(index: int, layer: nn.Module) -> None:
    for name, child in (("v_proj", getattr(layer, "v_proj", None)), ("o_proj", output_projection(layer))):
        # A quantized Linear may keep its type; its weight is no plain parameter then.
        if type(child) is not nn.Linear or type(child.weight) is not nn.Parameter:
            kind = type(getattr(child, "weight", None)) if type(child) is nn.Linear else type(child)
            got = "no such module" if child is None else f"{kind.__module__}.{kind.__qualname__}"
            raise ValueError(
                f"layer {index}: fold=True needs a plain torch.nn.Linear as {name}, got {got}; attach with fold=False, "
                "which rotates at run time and changes no weight"
            )


def _fold(layer: nn.Module, basis: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Fold the value basis into the projections; return the changed parameters with their original values."""
    v, o = layer.v_proj, output_projection(layer)
    assert isinstance(v, nn.Linear) and isinstance(o, nn.Linear)
    folded = fold_value_rotation(v.weight, o.weight, basis.to(v.weight.device), v.bias)
    changed = []
    for parameter, new in zip((v.weight, o.weight, v.bias), folded, strict=True):
        if parameter is not None and new is not None:
            changed.append((parameter, parameter.detach().clone()))
            parameter.data.copy_(new)
    return changed
