"""Calibrations of models that are evaluated: from a file, from an earlier run, or made now."""

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from swan.calibration import Basis, Calibration, calibrate
from swan.evaluation.downloads import cache_folder
from swan.evaluation.models import MODELS
from swan.evaluation.texts import CALIBRATION_TEXT, calibration_text, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TOKENS", "calibration_of"]

WINDOW = 1024  # tokens of a calibration window
TOKENS = 12 * WINDOW


def calibration_of(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    path: Path | None = None,
    basis: Basis = "joint",
    tokens: int = TOKENS,
    text: str = CALIBRATION_TEXT,
    positions: int | None = None,
) -> Calibration:
    """Return a calibration from a file, from the cache folder (embedded models), or made now."""
    if path is not None:
        return Calibration.load(path)
    spread = "spread" if positions is None else f"over-{positions}"
    file = cache_folder() / "calibrations" / f"{name}-{text}-{tokens}-{spread}-{model.dtype}.safetensors"
    if name in MODELS and text == CALIBRATION_TEXT and file.is_file():
        # One of an older version warns, and is made anew.
        with contextlib.suppress(ValueError, UserWarning), warnings.catch_warnings(action="error"):
            return Calibration.load(file).with_basis(basis)
    windows = token_windows(calibration_text(text), tokenizer, max(tokens // WINDOW, 1), min(tokens, WINDOW))
    calibration = calibrate(model, list(windows.split(1)), basis, positions=positions)
    if name in MODELS and text == CALIBRATION_TEXT:
        calibration.save(file)
    return calibration
