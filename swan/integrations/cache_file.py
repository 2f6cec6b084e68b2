"""Caches in safetensors files: what of each layer is written, and how it comes back."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swan.calibration import Calibration
from swan.calibration.files import read_tensors, write_tensors
from swan.compiling import keep_in_place
from swan.modules import KVCache
from swan.storage import Layout, Packed

__all__ = ["State", "digest", "kv_state", "other_state", "read", "restore_kv", "restore_other", "write"]

FORMAT = "swan-cache-1"
State = tuple[dict[str, Any], dict[str, Tensor]]  # JSON values, and tensors


def digest(calibration: Calibration) -> str:
    """Of the bases in which keys and values are stored."""
    found = hashlib.sha256()
    for layer in calibration.layers:
        for basis in (layer.key_basis, layer.value_basis):
            found.update(basis.contiguous().numpy().tobytes())
    return found.hexdigest()


def write(path: str | Path, about: dict[str, Any], layers: list[State]) -> None:
    """Write a file; one that is there is replaced whole or not at all."""
    tensors = {f"{i}.{name}": t.contiguous().cpu() for i, (_, found) in enumerate(layers) for name, t in found.items()}
    about = {"format": FORMAT, **about, "layers": [plain for plain, _ in layers]}
    write_tensors(path, tensors, about)


def read(path: str | Path) -> tuple[dict[str, Any], list[State]]:
    """What `write` was given.

    Raises:
        ValueError: the file is no cache of this version.
    """
    about, tensors = read_tensors(path, FORMAT, "cache", "fill a cache and save it again")
    layers: list[State] = [(plain, {}) for plain in about.pop("layers")]
    for name, t in tensors.items():
        index, rest = name.split(".", 1)
        layers[int(index)][1][rest] = t
    return about, layers


def kv_state(kv: KVCache) -> State:
    """What a winnowed layer holds, without the room that it keeps ahead."""
    buffer, stored = kv.buffer, kv.history_length
    plain = {"length": kv.length, "first": int(buffer.first), "sinks_end": buffer.sinks_end, "dropped": kv.dropped}
    tensors = {"keys": buffer.keys, "values": buffer.values, "padding": buffer.padding}
    for side, history in (("k", kv.k_history), ("v", kv.v_history)):
        if history is not None:
            found = history.tokens(0, stored)
            tensors |= {f"{side}.plane{i}": plane for i, plane in enumerate(found.planes)}
            tensors |= {f"{side}.scales": found.scales, f"{side}.positions": found.positions}
    return plain, {name: t for name, t in tensors.items() if t is not None}


def restore_kv(kv: KVCache, state: State, device: torch.device) -> None:
    """Fill an empty cache of the same plan layer with what `kv_state` found."""
    plain, tensors = state
    tensors = {name: t.to(device) for name, t in tensors.items()}
    if "keys" not in tensors:
        return
    buffer, layer, dtype = kv.buffer, kv.plan_layer, tensors["keys"].dtype
    histories = None
    if layer is not None and "k.plane0" in tensors:
        histories = [_packed(tensors, side, lay, dtype) for side, lay in (("k", layer.keys), ("v", layer.values))]
    if not buffer.static:
        buffer.keys, buffer.values, buffer.padding = tensors["keys"], tensors["values"], tensors.get("padding")
        buffer.length, buffer.first, buffer.sinks_end = plain["length"], plain["first"], plain["sinks_end"]
        kv.k_history, kv.v_history = histories or (None, None)
        kv.dropped = plain["dropped"]
        return
    kv.allocate(tensors["keys"], tensors["values"])
    pairs = [(getattr(buffer, name), tensors[name]) for name in ("keys", "values", "padding")]
    if histories is not None and kv.k_history is not None and kv.v_history is not None:
        for history, found in zip((kv.k_history, kv.v_history), histories, strict=True):
            room = history.tokens(0, found.shape[2])
            pairs += zip(room.tensors, found.tensors, strict=True)
    for target, source in pairs:
        target.copy_(source)
    for counter, number in ((buffer.length, plain["length"]), (buffer.first, plain["first"])):
        assert isinstance(counter, Tensor)
        counter.fill_(number)


def _packed(tensors: dict[str, Tensor], side: str, layout: Layout, dtype: torch.dtype) -> Packed:
    planes = [tensors[f"{side}.plane{i}"] for i in range(2) if f"{side}.plane{i}" in tensors]
    return Packed(tuple(planes), tensors.get(f"{side}.scales"), tensors.get(f"{side}.positions"), layout, dtype)


def other_state(layer: Any) -> State:
    """What a layer of transformers holds: its attributes, and the entries of those that are dicts.

    Raises:
        TypeError: it holds something that is neither a tensor nor a JSON value.
    """
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        entries = {f"{name}:{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
        for entry, held in entries.items():
            if isinstance(held, Tensor):
                tensors[entry] = held
            elif isinstance(held, bool | int | float | str | None):
                plain[entry] = held
            elif not isinstance(held, torch.dtype | torch.device):
                raise TypeError(f"{type(layer).__name__}.{name} is a {type(held).__name__}: it has no form in a file")
    return plain, tensors


def restore_other(layer: Any, state: State, device: torch.device) -> None:
    """Give a layer of transformers what `other_state` found in one of the same kind."""
    plain, tensors = state
    tensors = {name: t.to(device) for name, t in tensors.items()}
    for entry, value in (plain | tensors).items():
        name, _, key = entry.partition(":")
        if key:
            getattr(layer, name)[int(key)] = value
        else:
            setattr(layer, name, value)
    held = next((t for t in tensors.values() if t.is_floating_point()), None)
    if held is not None:
        layer.dtype, layer.device = held.dtype, held.device
    if getattr(layer, "is_compileable", False):
        keep_in_place(*tensors.values())
