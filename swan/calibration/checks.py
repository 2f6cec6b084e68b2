"""Checks of a calibration, when it is written and when it is read."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from swan.calibration.bases import Basis, LayerBases
from swan.calibration.effects import KEYS, VALUES, Effects
from swan.calibration.moments import Moments
from swan.functional.rotation import check_basis

if TYPE_CHECKING:
    from swan.calibration.artifact import Calibration

__all__ = ["check_calibration"]


def check_calibration(calibration: "Calibration") -> None:
    """Raise ValueError where a calibration is not what `calibrate` makes."""
    layers, moments = calibration.layers, calibration.moments
    if not layers or len(layers) != len(moments):
        raise ValueError(f"it has bases of {len(layers)} layers and moments of {len(moments)}")
    if calibration.basis not in get_args(Basis):
        raise ValueError(f"its basis is {calibration.basis!r}, not one of {', '.join(get_args(Basis))}")
    if type(calibration.seed) is not int or type(calibration.tokens) is not int:
        raise ValueError("its seed and its tokens must be whole numbers")
    if not isinstance(calibration.fingerprint, dict) or "kind" not in calibration.fingerprint:
        raise ValueError("its fingerprint names no model")
    for index, (layer, sums) in enumerate(zip(layers, moments, strict=True)):
        _check_layer(f"layer {index}", layer, sums)
    if calibration.effects is not None:
        _check_effects(calibration.effects, [layer.key_basis.shape[0] for layer in layers])


def _check_layer(name: str, layer: LayerBases, moments: Moments) -> None:
    if layer.key_basis.ndim != 3 or layer.value_basis.ndim != 3:
        raise ValueError(f"{name}: a basis has the shape [kv_heads, d, d]")
    heads, d, dv = layer.key_basis.shape[0], layer.key_basis.shape[-1], layer.value_basis.shape[-1]
    _check(f"{name}: the key basis", layer.key_basis, torch.float32, (heads, d, d))
    _check(f"{name}: the value basis", layer.value_basis, torch.float32, (heads, dv, dv))
    _check(f"{name}: the key spectrum", layer.key_spectrum, torch.float32, (heads, d))
    _check(f"{name}: the value spectrum", layer.value_spectrum, torch.float32, (heads, dv))
    for field in dataclasses.fields(moments):
        if field.name != "tokens":
            size = d if field.name in "qk" else dv
            _check(
                f"{name}: the moment of {field.name}", getattr(moments, field.name), torch.float64, (heads, size, size)
            )
    for side, basis in (("key", layer.key_basis), ("value", layer.value_basis)):
        try:
            check_basis(basis)
        except ValueError as error:
            raise ValueError(f"{name}, {side}s: {error}") from error
    if not all(torch.isfinite(spectrum).all() for spectrum in (layer.key_spectrum, layer.value_spectrum)):
        raise ValueError(f"{name}: a spectrum holds NaN or infinity")
    moments.check(name)


def _check_effects(effects: Effects, heads: Sequence[int]) -> None:
    for side, table, candidates in (("keys", effects.keys, KEYS), ("values", effects.values, VALUES)):
        _check(f"the effects of {side}", table, torch.float32, (len(heads), max(heads), len(candidates)))
    for count, *rows in zip(heads, effects.keys, effects.values, strict=True):
        both = torch.cat(rows, dim=1)
        finite = torch.isfinite(both[:count]).all() or both[:count].isnan().all()  # NaN in layers with a sliding window
        if not (finite and both[count:].isnan().all()):
            raise ValueError("the effects of a layer hold NaN or infinity; calibrate in float32")


def _check(name: str, t: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if t.dtype != dtype or tuple(t.shape) != tuple(shape) or t.numel() == 0:
        raise ValueError(f"{name} is {t.dtype} {list(t.shape)}, not {dtype} {list(shape)}")
