"""A `SwanCache` in a safetensors file: what of each layer is written, and how it comes back."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swan.calibration import Calibration, Plan
from swan.calibration.capture import attention_layers
from swan.calibration.files import read_tensors, write_tensors
from swan.compiling import keep_in_place
from swan.integrations.transformers.attach import attachment_of
from swan.modules import KVCache

if TYPE_CHECKING:
    from swan.integrations.transformers.cache import SwanCache

__all__ = ["load", "save"]

FORMAT = "swan-cache-1"
Saved = tuple[dict[str, Any], dict[str, Tensor]]  # of a layer: JSON values, and tensors


def save(cache: "SwanCache", path: str | Path) -> None:
    """See `SwanCache.save`."""
    winnowed = cache.winnowed
    layers: list[Saved] = [
        ({}, winnowed[i].state_dict()) if i in winnowed else _other_to_dicts(layer)
        for i, layer in enumerate(cache.layers)
    ]
    budget = cache.byte_budget
    metadata = {
        "format": FORMAT,
        "bases": _digest(cache.dial.calibration),
        "settings": {
            "prefill": cache.prefill, "static": cache.static, "max_length": cache.max_length, "exclude": cache.exclude
        },
        "plans": [json.loads(plan.to_json()) for plan in (cache.plan, *cache.dial.plans)],
        "budget": None if budget is None else [budget.nbytes, budget.on_full, budget.warned],
        "retentions": cache.dial.retentions,
        "layers": [values for values, _ in layers],
    }  # fmt: skip
    tensors = {f"{i}.{name}": t.contiguous().cpu() for i, (_, named) in enumerate(layers) for name, t in named.items()}
    write_tensors(path, tensors, metadata)


def load(cls: type["SwanCache"], path: str | Path, model: PreTrainedModel) -> "SwanCache":
    """See `SwanCache.load`."""
    metadata, layers = _read(path)
    if _digest(attachment_of(model).calibration) != metadata["bases"]:
        raise ValueError(
            f"{path} was filled in other bases; attach the model with the calibration that it was filled with"
        )
    now, *levels = (Plan.from_json(json.dumps(plan)) for plan in metadata["plans"])
    settings = metadata["settings"]
    if settings["prefill"] == "dense":  # what "chunk" was called in files of 0.1.0
        settings["prefill"] = "chunk"
    cache = cls(model, now, **settings)
    cache.dial.plans, cache.dial.retentions = levels, metadata["retentions"]
    if metadata["budget"] and metadata["budget"][0] is not None:
        cache.set_budget(*metadata["budget"])
    attention, winnowed = attention_layers(model), cache.winnowed
    for index, (layer, (values, tensors)) in enumerate(zip(cache.layers, layers, strict=True)):
        basis = getattr(attention.get(index), "swan_key_basis", None)
        device = model.device if basis is None else basis.device
        tensors = {name: t.to(device) for name, t in tensors.items()}
        if index in winnowed:
            winnowed[index].load_state_dict(_counters(winnowed[index], values) | tensors)
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


def _digest(calibration: Calibration) -> str:
    """Of the bases in which keys and values are stored."""
    digest = hashlib.sha256()
    for layer in calibration.layers:
        for basis in (layer.key_basis, layer.value_basis):
            digest.update(basis.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _counters(kv: KVCache, values: dict[str, Any]) -> dict[str, Tensor]:
    """The counters of a file of 0.1.0, which has them as JSON values; a later one has them as tensors."""
    if not values.get("length"):
        return {}
    counters = {name: values[name] for name in ("length", "first", "dropped")}
    counters["padded"] = values["sinks_end"] - kv.buffer.sinks
    return {name: torch.tensor(number) for name, number in counters.items()}


def _other_to_dicts(layer: Any) -> Saved:
    """What a layer of transformers holds: its attributes, and the entries of those that are dicts.

    Raises:
        TypeError: it holds something that is neither a tensor nor a JSON value.
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
                raise TypeError(f"{type(layer).__name__}.{name} is a {type(value).__name__}: it has no form in a file")
    return values, tensors


def _fill_other(layer: Any, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Give a layer of transformers what `_other_to_dicts` found in one of the same kind."""
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
