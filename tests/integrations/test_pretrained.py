"""Model folders with a calibration and a plan."""

import pytest
import torch

import swan
from swan import Calibration, Plan, SwanCache, detach, from_pretrained, save_pretrained
from swan.integrations.transformers.attach import is_attached
from swan.integrations.transformers.pretrained import attach_saved
from tests.tiny import attached, logits_of, tiny, tokens

TEXT = {"input_ids": tokens(1, 60)}
PLAN = Plan.for_retention(0.4, dims=[(16, 16)] * 2, buffer=8, sinks=2)


def test_a_folder_brings_all_of_it_back(tmp_path):
    model = attached()
    save_pretrained(model, tmp_path / "model", PLAN)
    found = from_pretrained(tmp_path / "model")
    assert not found.training
    assert SwanCache(found).plan == PLAN
    expected = logits_of(model, SwanCache(model, PLAN), **TEXT)
    assert torch.equal(logits_of(found, SwanCache(found), **TEXT), expected)
    assert SwanCache(found, retention=0.5).retention <= 0.5
    detach(found)
    assert torch.equal(logits_of(found, **TEXT), logits_of(tiny(), **TEXT))


def test_without_a_plan_a_cache_is_told_what_to_store(tmp_path):
    model = attached()
    save_pretrained(model, tmp_path, PLAN)
    save_pretrained(model, tmp_path)  # no longer a plan
    with pytest.raises(ValueError, match="exactly one of plan, retention, budget and levels"):
        SwanCache(from_pretrained(tmp_path))


def test_options_of_transformers_and_folding(tmp_path):
    save_pretrained(attached(), tmp_path)
    found = from_pretrained(tmp_path, fold=True, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.model.layers[0].self_attn.swan_value_basis is None


def test_a_folder_that_is_there_keeps_its_model(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    save_pretrained(attached(fold=True), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert isinstance(Calibration.load(tmp_path / "swan_calibration.safetensors"), Calibration)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="not attached"):
        save_pretrained(tiny(), tmp_path)
    with pytest.raises(ValueError, match="hold folded values; detach it"):
        save_pretrained(attached(fold=True), tmp_path)
    assert not any(tmp_path.iterdir())
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no swan_calibration\.safetensors; load the model with transformers"):
        from_pretrained(tmp_path)


def test_the_folder_of_another_model_is_refused(tmp_path):
    tiny("qwen3").save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"of another model .*model_type: llama calibrated, qwen3 here"):
        save_pretrained(attached(), tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_of_other_layers_is_refused_before_anything_is_written(tmp_path):
    for dims, reason in (([(16, 16)] * 3, "the plan has 3 layers, the model 2"), ([(32, 16)] * 2, "of 32 and 16")):
        with pytest.raises(ValueError, match=reason):
            save_pretrained(attached(), tmp_path / "model", Plan.for_retention(0.5, dims=dims))
    assert not (tmp_path / "model").exists()


def test_a_damaged_folder_is_refused_before_its_weights_are_read(tmp_path):
    save_pretrained(attached(), tmp_path, PLAN)
    (tmp_path / "model.safetensors").write_bytes(b"damaged too")
    for text, reason in (("[" * 10**5, "nested too deeply"), (PLAN.to_json()[:50], "not the JSON of a plan")):
        (tmp_path / "swan_plan.json").write_text(text)
        with pytest.raises(ValueError, match=rf"swan_plan\.json: .*{reason}.*; remove it or save the folder again"):
            from_pretrained(tmp_path)
    (tmp_path / "swan_calibration.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"swan_calibration\.safetensors is not a whole safetensors file"):
        from_pretrained(tmp_path)


def test_a_damaged_plan_leaves_the_model_as_it_was(tmp_path):
    save_pretrained(attached(), tmp_path, PLAN)
    (tmp_path / "swan_plan.json").write_text("{}")
    model = tiny()
    with pytest.raises(ValueError, match="remove it or save the folder again"):
        attach_saved(model, tmp_path)
    assert not is_attached(model)


def test_a_model_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    """Else the next call would take its config.json for a whole model."""
    model = attached()

    def fail(folder):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "tokenizer.json").write_text("of the user")
    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"could not be written to .* \(.*No space left.*\); make room there"):
        save_pretrained(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    monkeypatch.undo()
    save_pretrained(model, tmp_path)
    assert torch.equal(logits_of(from_pretrained(tmp_path), **TEXT), logits_of(model, **TEXT))


def test_they_are_public():
    assert {"save_pretrained", "from_pretrained", "supported"} <= set(dir(swan))
