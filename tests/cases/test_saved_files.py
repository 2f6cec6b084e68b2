"""Writers check what their readers check, and a fingerprint holds what matters."""

import dataclasses

import pytest
import torch

from swan import Calibration, LayerPlan, Plan, TopK, attach, from_pretrained, save_pretrained
from tests.tiny import attached, calibration_of, everything, logits_of, tiny, tokens


def test_a_calibration_that_could_not_be_read_is_not_written(tmp_path):
    calibration = calibration_of(tiny())
    first, *others = calibration.layers
    moments = dataclasses.replace(calibration.moments[0], k=calibration.moments[0].k * torch.nan)
    skewed = dataclasses.replace(first, key_basis=first.key_basis * 1.1)
    for wrong, message in (
        (dataclasses.replace(calibration, layers=(skewed, *others)), "layer 0, keys: the basis is not orthogonal"),
        (
            dataclasses.replace(calibration, moments=(moments, *calibration.moments[1:])),
            "layer 0: the k",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.save(tmp_path / "calibration")
    assert not list(tmp_path.iterdir())
    calibration.save(tmp_path / "calibration")
    Calibration.load(tmp_path / "calibration")


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (Plan.for_retention(0.5, dims=[(16, 16)] * 3), ValueError, "the plan has 3 layers, the model 2"),
        (Plan.for_retention(0.5, dims=[(32, 16)] * 2), ValueError, "coordinates in layer 0, the model has 16 and 16"),
        (0.5, TypeError, r"save_pretrained takes a Plan, got float; make one by Plan\.for_retention"),
    ],
)
def test_a_folder_gets_no_plan_of_another_model(plan, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_pretrained(attached(), tmp_path / "model", plan=plan)
    assert not list(tmp_path.iterdir())


def test_a_plan_is_whole():
    layer = LayerPlan(TopK(16, 4), TopK(16, 4))
    with pytest.raises(TypeError, match="a plan has a LayerPlan for each layer, or None, got TopK"):
        Plan([TopK(16, 4)])
    for wrong in ({"buffer": 8.5}, {"sinks": "4"}, {"buffer": True}):
        with pytest.raises(TypeError, match="buffer and sinks are numbers of tokens"):
            Plan([layer], **wrong)
    for text in ('{"layers": [{"keys": 5, "values": 5}], "buffer": 8, "sinks": 4}', "[]", "5", '{"layers": null}'):
        with pytest.raises(ValueError, match="this is not the JSON of a plan"):
            Plan.from_json(text)


def test_words_may_be_added_after_the_calibration(tmp_path):
    model = tiny()
    calibration = calibration_of(model)
    model.resize_token_embeddings(120)
    attach(model, calibration)
    logits_of(model, everything(model), input_ids=tokens(1, 20))
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).config.vocab_size == 120


def test_older_files_have_a_field_more():
    model = tiny()
    calibration = calibration_of(model)
    attach(model, dataclasses.replace(calibration, fingerprint=calibration.fingerprint | {"vocab_size": 97}))
