"""The calibration of a model that is being evaluated: a file, what was kept of an earlier run, or made now."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from swan.calibration import Basis, Calibration, calibrate
from swan.evaluation.sources import MODELS, cache_folder, calibration_text, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["calibration_of"]

WINDOW = 1024  # tokens of a calibration window


def calibration_of(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    path: Path | None = None,
    basis: Basis = "joint",
    tokens: int = 8192,
    text: str = "python-topics",
) -> Calibration:
    """A calibration from a file, from the cache folder (embedded models), or made now."""
    if path is not None:
        return Calibration.load(path)
    kept = cache_folder() / "calibrations" / f"{name}-{text}-{tokens}-{model.dtype}.safetensors"
    if name in MODELS and text == "python-topics" and kept.is_file():
        with contextlib.suppress(ValueError):
            return Calibration.load(kept).with_basis(basis)
    windows = token_windows(calibration_text(text), tokenizer, max(tokens // WINDOW, 1), min(tokens, WINDOW))
    calibration = calibrate(model, list(windows.split(1)), basis)
    if name in MODELS and text == "python-topics":
        calibration.save(kept)
    return calibration
