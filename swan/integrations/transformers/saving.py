"""A `SwanCache` in a safetensors file: written layer by layer, and read into a new cache."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swan.calibration import Plan
from swan.calibration.capture import attention_layers, device_of
from swan.calibration.files import read_tensors, write_tensors
from swan.compiling import keep_in_place
from swan.integrations.transformers.attachment import attachment_of

if TYPE_CHECKING:
    from swan.integrations.transformers.cache import SwanCache

__all__ = ["load", "save"]

FORMAT = "swan-cache-2"  # changes with the bytes of a layout too
Saved = tuple[dict[str, Any], dict[str, Tensor]]  # the JSON values and the tensors of one layer


def save(cache: "SwanCache", path: str | Path) -> None:
    """Write a cache: see `SwanCache.save`."""
    winnowed = cache.winnowed
    layers: list[Saved] = [
        ({}, winnowed[i].state_dict()) if i in winnowed else _other_to_dicts(layer)
        for i, layer in enumerate(cache.layers)
    ]
    budget = cache.byte_budget
    metadata = {
        "format": FORMAT,
        "bases": cache.bases,
        "settings": {
            "prefill": cache.prefill, "static": cache.static, "max_length": cache.max_length, "exclude": cache.exclude
        },
        "plans": [json.loads(plan.to_json()) for plan in (cache.plan, *cache.dial.levels)],
        "budget": None if budget is None else [budget.nbytes, budget.on_full, budget.warned],
        "retentions": cache.dial.retentions,
        "layers": [values for values, _ in layers],
    }  # fmt: skip
    tensors = {f"{i}.{name}": t.contiguous().cpu() for i, (_, named) in enumerate(layers) for name, t in named.items()}
    write_tensors(path, tensors, metadata)


def load(cls: type["SwanCache"], path: str | Path, model: PreTrainedModel) -> "SwanCache":
    """Read a cache: see `SwanCache.load`."""
    metadata, layers = _read(path)
    if attachment_of(model).bases != metadata["bases"]:
        raise ValueError(
            f"{path} was filled in other bases; attach the model with the calibration that it was filled with"
        )
    now, *levels = (Plan.from_json(json.dumps(plan)) for plan in metadata["plans"])
    cache = cls(model, now, **metadata["settings"])
    cache.dial.levels, cache.dial.retentions = levels, metadata["retentions"]
    if metadata["budget"] is not None:
        cache.set_budget(*metadata["budget"])
    attention, winnowed = attention_layers(model), cache.winnowed
    for index, (layer, (values, tensors)) in enumerate(zip(cache.layers, layers, strict=True)):
        device = device_of(attention.get(index, model))
        tensors = {name: t.to(device) for name, t in tensors.items()}
        if index in winnowed:
            winnowed[index].load_state_dict(tensors)
            vars(layer)["is_initialized"] = True
        else:
            _fill_other(layer, values, tensors)
    return cache


def _read(path: str | Path) -> tuple[dict[str, Any], list[Saved]]:
    metadata, tensors = read_tensors(path, FORMAT, "cache", "fill a cache and save it again")
    layers: list[Saved] = [(values, {}) for values in metadata.pop("layers")]
    for name, t in tensors.items():
        index, rest = name.split(".", 1)
        layers[int(index)][1][rest] = t
    return metadata, layers


def _other_to_dicts(layer: Any) -> Saved:
    """Sort the attributes of a layer of transformers, and the entries of dicts among them, into values and tensors.

    Raises:
        TypeError: an attribute is neither a tensor nor a JSON value.
    """
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, attribute in vars(layer).items():
        is_dict = isinstance(attribute, dict)
        entries = {f"{name}:{key}": entry for key, entry in attribute.items()} if is_dict else {name: attribute}
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                tensors[entry] = value
            elif isinstance(value, bool | int | float | str | None):
                values[entry] = value
            elif not isinstance(value, torch.dtype | torch.device):
                raise TypeError(
                    f"{type(layer).__name__}.{name} is a {type(value).__name__}: it cannot be written to a file"
                )
    return values, tensors


def _fill_other(layer: Any, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Set the attributes that `_other_to_dicts` read from a layer of the same kind."""
    for entry, value in (values | tensors).items():
        name, _, key = entry.partition(":")
        if key:
            getattr(layer, name)[int(key)] = value
        else:
            setattr(layer, name, value)
    state = next((t for t in tensors.values() if t.is_floating_point()), None)
    if state is not None:
        layer.dtype, layer.device = state.dtype, state.device
    if getattr(layer, "is_compileable", False):
        keep_in_place(*tensors.values())
