"""A `SwanCache` in a safetensors file: written layer by layer, and read into a new cache."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swan.calibration import Plan
from swan.calibration.capture import attention_layers, device_of
from swan.calibration.files import read_tensors, reason_of, write_tensors
from swan.compiling import keep_in_place
from swan.integrations.transformers.attachment import attachment_of
from swan.modules.checks import check_saved

if TYPE_CHECKING:
    from swan.integrations.transformers.cache import SwanCache

__all__ = ["load", "save"]

FORMATS = ("swan-cache-2", "swan-cache-3")  # that are read; changes with the bytes of a layout too
AGAIN = "fill a cache and save it again"
MOST_TOKENS = 2**31  # of a static cache that is read
Saved = tuple[dict[str, Any], dict[str, Tensor]]  # the JSON values and the tensors of one layer


def save(cache: "SwanCache", path: str | Path) -> None:
    """Write a cache: see `SwanCache.save`."""
    winnowed = cache.winnowed
    layers: list[Saved] = [
        ({}, winnowed[i].state_dict()) if i in winnowed else _other_to_dicts(layer)
        for i, layer in enumerate(cache.layers)
    ]
    try:
        _check_layers(cache, layers)
    except ValueError as error:
        raise ValueError(f"this cache is not written to {path}: {error}; reset it and fill it again") from error
    budget = cache.byte_budget
    metadata = {
        "format": FORMATS[-1],
        "fingerprint": cache.dial.calibration.fingerprint,
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
    attachment = attachment_of(model)
    metadata, tensors = read_tensors(path, FORMATS, "cache", AGAIN)
    expected, got = attachment.calibration.fingerprint, metadata.get("fingerprint", {})
    if not isinstance(got, dict):
        raise ValueError(f"{path} holds no whole cache of this model (its fingerprint is no object); {AGAIN}")
    if any(expected[name] != got[name] for name in expected.keys() & got):  # older files have other fields
        raise ValueError(f"{path} was filled by another model; load that one, or {AGAIN}")
    if attachment.bases != metadata.get("bases"):
        raise ValueError(
            f"{path} was filled in other bases; attach the model with the calibration that it was filled with"
        )
    try:
        cache = _empty(cls, model, **{name: metadata[name] for name in ("settings", "plans", "budget", "retentions")})
        layers = _by_layer(metadata["layers"], tensors, len(cache.layers))
        _check_layers(cache, layers)
        _fill(cache, layers, model)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # torch raises the last where memory is short
        raise ValueError(f"{path} holds no whole cache of this model ({reason_of(error)}); {AGAIN}") from error
    return cache


def _empty(
    cls: type["SwanCache"],
    model: PreTrainedModel,
    settings: dict[str, Any],
    plans: list[Any],
    budget: list[Any] | None,
    retentions: list[Any],
) -> "SwanCache":
    """Make an empty cache with the settings of a file."""
    exclude, max_length = settings["exclude"], settings["max_length"]
    if not all(type(index) is int for index in exclude) or type(settings["static"]) is not bool:
        raise ValueError("exclude must be indices of layers, and static true or false")
    if max_length is not None and (type(max_length) is not int or max_length >= MOST_TOKENS):
        raise ValueError(f"max_length must be a number of tokens below {MOST_TOKENS}")
    if not all(type(retention) is float for retention in retentions):
        raise ValueError("retentions must be numbers")
    now, *levels = (Plan.from_json(json.dumps(plan)) for plan in plans)
    cache = cls(model, now, **settings)
    dims = [(d, dv) for _, d, dv in cache.shapes.values()]
    for plan in (now, *levels):
        plan.check_dims(dims)
    if len(levels) != (len(retentions) if cache.static else len(levels)) or not levels:
        raise ValueError("a plan is missing")
    cache.dial.levels, cache.dial.retentions = levels, retentions
    if budget is not None:
        nbytes, on_full, warned = budget
        if type(nbytes) is not int or on_full not in ("raise", "evict") or type(warned) is not bool:
            raise ValueError("the budget must be bytes, what is done when it is full, and whether that was said")
        cache.set_budget(nbytes, on_full, warned)
    return cache


def _fill(cache: "SwanCache", layers: list[Saved], model: PreTrainedModel) -> None:
    """Put what `_check_layers` let pass into the layers of an empty cache."""
    attention, winnowed = attention_layers(model), cache.winnowed
    for index, (layer, (values, tensors)) in enumerate(zip(cache.layers, layers, strict=True)):
        device = device_of(attention.get(index, model))
        tensors = {name: t.to(device) for name, t in tensors.items()}
        if index in winnowed:
            winnowed[index].load_state_dict(tensors)
            vars(layer)["is_initialized"] = True
        else:
            _fill_other(layer, values, {name: t.clone() for name, t in tensors.items()})


def _by_layer(values: Sequence[Any], tensors: Mapping[str, Tensor], count: int) -> list[Saved]:
    """Sort the tensors of a file, named ``layer.name``, by layer."""
    if len(values) != count or not all(isinstance(named, dict) for named in values):
        raise ValueError(f"it has {len(values)} layers, the model {count}")
    layers: list[Saved] = [(named, {}) for named in values]
    for name, t in tensors.items():
        index, _, rest = name.partition(".")
        if index not in map(str, range(count)):
            raise ValueError(f"the model has no layer of the tensor {name[:40]!r}")
        layers[int(index)][1][rest] = t
    return layers


def _check_layers(cache: "SwanCache", layers: list[Saved]) -> None:
    """Raise a ValueError if these are not values and tensors of the layers of a cache."""
    winnowed, rows = cache.winnowed, set()
    for index, (layer, (values, tensors)) in enumerate(zip(cache.layers, layers, strict=True)):
        try:
            if index in winnowed:
                kv = winnowed[index]
                check_saved(tensors, kv.plan_layer, kv.buffer.size, kv.buffer.sinks, kv.max_length, kv.keep)
                if values:
                    raise ValueError("it has values beside its tensors")
            else:
                _check_other(layer, values, tensors)
            if index in cache.shapes and "keys" in tensors:
                heads, d, dv = cache.shapes[index]
                shapes = [tensors[name].shape for name in ("keys", "values")]
                if any(
                    len(shape) != 4 or (shape[1], shape[3]) != (heads, n)
                    for shape, n in zip(shapes, (d, dv), strict=True)
                ):
                    raise ValueError(f"the model has {heads} KV heads of {d} and {dv} coordinates")
                rows.add(shapes[0][0])
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
    lengths = {int(layers[index][1]["length"]) if layers[index][1] else 0 for index in winnowed}
    if len(lengths) > 1 or len(rows) > 1:
        raise ValueError("its layers hold unequal numbers of tokens or rows")


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


def _check_other(layer: Any, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise a ValueError if a layer of transformers cannot have such attributes; a static one has some later only."""
    for entry, value in (values | tensors).items():
        name, _, key = entry.partition(":")
        now, of_class = vars(layer).get(name), getattr(type(layer), name, None)
        is_method = callable(of_class) or isinstance(of_class, property)
        if is_method or not name.isidentifier() or name.startswith("__") or bool(key) != isinstance(now, dict):
            raise ValueError(f"{type(layer).__name__} of transformers has no {entry[:40]!r}")
        is_like = now is None or value is None or type(now) is type(value) or isinstance(now, Tensor | dict)
        is_plain = isinstance(value, bool | int | float | str | None)
        if not (isinstance(value, Tensor) or (is_like and is_plain)) or (key and not key.isdecimal()):
            raise ValueError(f"{entry[:40]} of {type(layer).__name__} cannot be a {type(value).__name__}")


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
