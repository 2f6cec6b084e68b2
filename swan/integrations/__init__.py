"""Attachment of calibrations to models: your own, built from `SwanAttention`, and those of transformers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from swan.calibration import Calibration
from swan.calibration.capture import swan_layers, unwrapped
from swan.compiling import outside_inference_mode
from swan.integrations.architectures import supported

__all__ = ["attach", "attached", "detach", "supported"]


@outside_inference_mode
def attach(model: nn.Module, calibration: Calibration | str | Path, fold: bool = False) -> None:
    """Give a model the bases of its calibration, so that it can run on winnowed caches.

    A transformers model keeps its weights and gets swan's attention function, which rotates at run time and
    is the model's own attention wherever no `SwanCache` is given. In a model of your own the bases of its
    `SwanAttention` modules are set; one whose bases came with a state dict counts as attached.

    Args:
        model: the model that was calibrated.
        calibration: from `swan.calibrate`, or the file that it was saved to.
        fold: put the value rotation into the value and output projections, which must be plain Linear
            (transformers only): no cost per step, the paper's way.

    Raises:
        TypeError: `calibration` is neither.
        FileNotFoundError: there is no such file.
        ValueError: the calibration is of another model, the model is attached already, a projection
            cannot be folded, or the architecture does not work with a `SwanCache` (a few tokens are run
            on it and on the model's own cache to see that); the model is unchanged then.

    Example:
        >>> import torch, swan
        >>> model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
        >>> swan.attach(model, swan.calibrate(model, [torch.randn(2, 50, 64)]))

    Source: arXiv:2511.18936.
    """
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(calibration)
    if not isinstance(calibration, Calibration):
        raise TypeError(f"attach takes a Calibration, or the file of one, got {type(calibration).__name__}")
    model = unwrapped(model)
    layers = swan_layers(model)
    if not layers:
        _transformers().attach(model, calibration, fold)
        return
    if any(layer.has_bases for layer in layers):
        raise ValueError("this model is already attached; call swan.detach(model) first")
    calibration.check_model(model)
    if fold:
        raise ValueError("fold=True is for transformers models; SwanAttention rotates at run time")
    for layer, bases in zip(layers, calibration.layers, strict=True):
        layer.set_bases(bases.key_basis, bases.value_basis)


def detach(model: nn.Module) -> None:
    """Undo `attach`: weights, attention and logits are bit for bit what they were.

    Args:
        model: an attached model.

    Raises:
        ValueError: the model is not attached.

    Example:
        >>> import torch, swan
        >>> model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
        >>> swan.attach(model, swan.calibrate(model, [torch.randn(2, 50, 64)]))
        >>> swan.detach(model)
    """
    model = unwrapped(model)
    layers = swan_layers(model)
    if not layers:
        _transformers().detach(model)
        return
    if not any(layer.has_bases for layer in layers):
        raise ValueError("this model is not attached; there is nothing to detach")
    for layer in layers:
        layer.reset_bases()


@contextlib.contextmanager
def attached(model: nn.Module, calibration: Calibration | None) -> Iterator[None]:
    """Attach a model within a with block; without a calibration nothing happens."""
    if calibration is None:
        yield
        return
    attach(model, calibration)
    try:
        yield
    finally:
        detach(model)


def _transformers() -> Any:
    from swan.integrations import transformers

    return transformers
