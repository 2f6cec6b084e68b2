"""Calibrations of evaluated models: where they are taken from, and in which basis."""

import pytest

from swan.evaluation import calibrations
from swan.evaluation.calibrations import calibrated, calibration_of
from tests.tiny import save_with_words


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A small model under the name of an embedded one, whose calibrations are kept; and how many were made."""
    made, calibrate = [], calibrations.calibrate

    def counted(*arguments, **settings):
        made.append(arguments[2])
        return calibrate(*arguments, **settings, progress=False)

    monkeypatch.setattr(calibrations, "calibrate", counted)
    monkeypatch.setattr(calibrations, "cache_folder", lambda: tmp_path)
    return ("smollm2-135m", *save_with_words(tmp_path / "model")), made


def test_each_basis_is_kept_by_itself(known):
    arguments, made = known
    for basis in ("pca", "joint", "pca", "joint"):
        calibration = calibrated(*arguments, basis, tokens=200)
        assert calibration.basis == basis and calibration.effects is not None
    assert made == ["pca", "joint"]


def test_another_basis_is_of_the_same_measurement(known, tmp_path):
    (name, model, tokenizer), _ = known
    own, file = calibrated(name, model, tokenizer, "pca", tokens=200), tmp_path / "pca.safetensors"
    own.save(file)
    for basis, expected, effects in ((None, "pca", True), ("pca", "pca", True), ("identity", "identity", False)):
        found = calibration_of(name, model, tokenizer, path=file, basis=basis)
        assert found.basis == expected and (found.effects is not None) == effects
    drawn = calibration_of(name, model, tokenizer, path=file, basis="random", seed=5)
    assert (drawn.basis, drawn.seed) == ("random", 5)
