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

__all__ = ["TOKENS", "calibrated", "calibration_of"]

WINDOW = 1024  # tokens of a calibration window
TOKENS = 12 * WINDOW


def calibration_of(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    path: Path | None = None,
    basis: Basis | None = None,
    seed: int = 0,
) -> Calibration:
    """Return a calibration from a file or the folder of the model, or `calibrated`; in another basis, if one is named.

    What layers add to the KL divergence is known in its own basis alone (`Calibration.with_basis`).
    """
    from swan.integrations.transformers.pretrained import saved_calibration

    path = path or (None if name in MODELS else saved_calibration(name))
    calibration = calibrated(name, model, tokenizer) if path is None else Calibration.load(path)
    return calibration if basis in (None, calibration.basis) else calibration.with_basis(basis, seed=seed)


def calibrated(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    basis: Basis = "joint",
    *,
    tokens: int = TOKENS,
    text: str = CALIBRATION_TEXT,
    positions: int | None = None,
) -> Calibration:
    """Calibrate a model on text that swan brings, or take what an earlier run left in the cache folder (embedded)."""
    # Another word whenever the default placing of texts changes: files of an older one are not taken.
    placing = "placed" if positions is None else f"over-{positions}"
    file = cache_folder() / "calibrations" / f"{name}-{basis}-{text}-{tokens}-{placing}-{model.dtype}.safetensors"
    kept = name in MODELS and text == CALIBRATION_TEXT
    if kept and file.is_file():
        # One of an older version warns, and is made anew.
        with contextlib.suppress(ValueError, UserWarning), warnings.catch_warnings(action="error"):
            return Calibration.load(file)
    windows = token_windows(calibration_text(text), tokenizer, max(tokens // WINDOW, 1), min(tokens, WINDOW))
    calibration = calibrate(model, list(windows.split(1)), basis, positions=positions)
    if kept:
        calibration.save(file)
    return calibration
