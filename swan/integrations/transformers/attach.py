"""`attach` gives a transformers model the bases of its calibration and swan's attention; `detach` takes them back."""

import hashlib
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from swan.calibration import Calibration
from swan.calibration.capture import (
    attention_layers,
    decoder,
    device_of,
    register_attention,
    tensor_parallel,
)
from swan.calibration.moments import output_projection
from swan.functional.rotation import fold_value_rotation
from swan.integrations.transformers.attachment import Attachment, is_attached
from swan.integrations.transformers.attention import NAME, swan_attention_forward
from swan.integrations.transformers.generation import KeepsCache
from swan.integrations.transformers.keyword import accept_cache
from swan.integrations.transformers.trial import dense_trial, reason_of, try_cache

__all__ = ["attach", "detach"]


def attach(model: PreTrainedModel, calibration: Calibration, fold: bool = False) -> None:
    """Attach a transformers model: see `swan.attach`."""
    if is_attached(model):
        raise ValueError("this model is already attached; call swan.detach(model) first")
    if _config(model)._attn_implementation == NAME:
        raise ValueError(
            "this model shares its config object with an attached model, and its attention with it, or has a copy that "
            "was made of such a one; build it from a copy of the config, and call model.set_attn_implementation('sdpa')"
        )
    calibration.check_model(model)
    layers = attention_layers(model)
    if len(layers) != len(calibration.layers):
        raise ValueError(f"calibrated {len(calibration.layers)} attention layers, the model has {len(layers)}")
    if fold:
        for index, layer in layers.items():
            _check_foldable(index, layer)
    expected = dense_trial(model)
    register_attention(NAME, swan_attention_forward)
    attachment = Attachment(calibration, _digest(calibration), _config(model)._attn_implementation, [])
    model._swan_attachment = attachment  # type: ignore[assignment]
    rank, ranks = tensor_parallel(model)
    for index, bases in zip(sorted(layers), calibration.layers, strict=True):
        layer = layers[index]
        key_basis, value_basis = (b.chunk(ranks)[rank] for b in (bases.key_basis, bases.value_basis))
        weight = next((p for p in layer.parameters() if p.is_floating_point()), None)
        dtype = model.dtype if weight is None else weight.dtype
        options: dict[str, Any] = {"dtype": dtype, "device": device_of(layer)}
        cast(Any, layer).swan_bases = attachment.bases
        layer.register_buffer("swan_key_basis", key_basis.to(**options), persistent=False)
        if fold:
            attachment.folded += _fold(layer, value_basis)
        layer.register_buffer("swan_value_basis", None if fold else value_basis.to(**options), persistent=False)
    decoder(model).set_attn_implementation(NAME)
    attachment.hooks += accept_cache(model)
    if hasattr(model, "prepare_inputs_for_generation"):
        vars(model)["prepare_inputs_for_generation"] = KeepsCache(model)
    try:
        try_cache(model, expected)
    except Exception as error:
        detach(model)
        raise ValueError(f"swan does not support {type(model).__name__}: {reason_of(error)}") from error


def detach(model: PreTrainedModel) -> None:
    """Detach a transformers model: see `swan.detach`."""
    attachment = getattr(model, "_swan_attachment", None)
    if not isinstance(attachment, Attachment):
        raise ValueError("this model is not attached; there is nothing to detach")
    for parameter, original in attachment.folded:
        parameter.data.copy_(original)
    for layer in attention_layers(model).values():
        del layer.swan_key_basis, layer.swan_value_basis, layer.swan_bases
    decoder(model).set_attn_implementation(attachment.implementation)
    for hook in attachment.hooks:
        hook.remove()
    for name in ("generate", "prepare_inputs_for_generation"):
        vars(model).pop(name, None)
    del model._swan_attachment


def _config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _digest(calibration: Calibration) -> str:
    """Hash the bases in which keys and values are stored."""
    digest = hashlib.sha256()
    for layer in calibration.layers:
        for basis in (layer.key_basis, layer.value_basis):
            digest.update(basis.contiguous().numpy().tobytes())
    return digest.hexdigest()


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
        if child.weight.is_meta:
            raise ValueError(f"layer {index}: the weight of {name} is offloaded; attach with fold=False")


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
