"""`calibrate` and `Calibration`: what goes wrong, and what is kept in a file."""

import dataclasses
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from swan import Calibration, SwanAttention, calibrate
from swan.calibration import files
from swan.calibration.artifact import FORMATS
from tests.tiny import calibration_of, tiny, tokens


def own_model(**settings):
    return nn.Sequential(*(SwanAttention(**{"dim": 32, "heads": 4, "kv_heads": 2} | settings) for _ in range(2)))


@pytest.fixture
def calibration():
    return calibration_of(tiny())


@pytest.fixture
def saved(calibration, tmp_path):
    calibration.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def tensors_of(calibration):
    return {
        f"{i}.{field.name}": getattr(layer, field.name)
        for i, layer in enumerate([*calibration.layers, *calibration.moments])
        for field in dataclasses.fields(layer)
        if isinstance(getattr(layer, field.name), torch.Tensor)
    }


def assert_same(a, b):
    assert (a.basis, a.seed, a.tokens, a.fingerprint) == (b.basis, b.seed, b.tokens, b.fingerprint)
    a, b = tensors_of(a), tensors_of(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# calibrate ----------------------------------------------------------------------------------------


def test_refuses_no_batches():
    for model in (tiny(), own_model()):
        with pytest.raises(ValueError, match="give calibrate at least one"):
            calibrate(model, [])


def test_measures_in_the_dtypes_of_the_model_under_autocast():
    model, windows = tiny(), [tokens(1, 120, seed=i) for i in range(2)]
    expected = calibrate(model, windows, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = calibrate(model, windows, progress=False)
    assert_same(found, expected)
    assert torch.equal(found.effects.keys, expected.effects.keys)


@pytest.mark.parametrize("architecture", ["mamba", "bloom", "bart"])
def test_refuses_a_model_whose_attention_it_does_not_see(architecture):
    with pytest.raises(TypeError, match=r"ForC.*swan"):
        calibrate(tiny(architecture), [tokens(1, 5)])


def test_refuses_a_module_without_attention():
    with pytest.raises(TypeError, match=r"Linear has no SwanAttention modules .* build its attention from swan"):
        calibrate(nn.Linear(4, 4), [torch.randn(1, 5, 4)])


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("gemma2", "softcap"), ("gpt-oss", "s_aux"), ("doge", "a mask of torch.float32 that .*")],
)
def test_refuses_attention_that_it_would_not_compute_right(architecture, reason):
    with pytest.raises(ValueError, match=rf"computes its attention with {reason}: not supported"):
        calibrate(tiny(architecture), [tokens(1, 5)])


@pytest.mark.parametrize(("projection", "field"), [("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_activations_that_are_not_finite(projection, field, value):
    model = own_model()
    getattr(model[1], projection).weight.data[3, 3] = value
    with pytest.raises(ValueError, match=f"layer 1: the {field} activations hold NaN or infinity"):
        calibrate(model, [torch.randn(1, 5, 32)])


def test_nan_in_a_transformers_model():
    model = tiny()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1: the v activations"):
        calibrate(model, [tokens(1, 5)])


def broken_batches(good):
    yield good
    raise OSError("the text ended")


def test_leaves_a_transformers_model_as_it_was_when_a_batch_raises():
    model = tiny()
    model.set_attn_implementation("eager")
    model.train()
    model.model.layers[0].eval()  # a user may train some layers only
    modes = [module.training for module in model.modules()]
    with pytest.raises(OSError, match="the text ended"):
        calibrate(model, broken_batches(tokens(1, 5)))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        calibrate(model, [{"input_ids": tokens(1, 5), "inputs_embeds": torch.zeros(1, 5, 64)}])
    assert model.config._attn_implementation == "eager"
    assert [module.training for module in model.modules()] == modes
    assert calibrate(model, [tokens(1, 5)]).tokens == 5  # nothing of the broken runs is left
    assert [module.training for module in model.modules()] == modes


def test_leaves_a_model_of_ones_own_as_it_was_when_a_batch_raises():
    model = own_model()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(OSError, match="the text ended"):
        calibrate(model, broken_batches(torch.randn(1, 5, 32)))
    with pytest.raises(ValueError, match="expected x"):
        calibrate(model, [torch.randn(1, 5, 31)])
    assert [layer.observer for layer in model] == [None, None]
    assert [module.training for module in model.modules()] == modes


def test_needs_no_gradients_and_leaves_none():
    model = tiny()
    calibration = calibrate(model, [tokens(1, 5)])
    assert not any(t.requires_grad for t in tensors_of(calibration).values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_says_nothing_where_no_one_watches(capsys):
    calibrate(own_model(), [torch.randn(1, 5, 32)])
    assert capsys.readouterr() == ("", "")


# Calibration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["joint", "pca", "random", "identity"])
@pytest.mark.parametrize("seed", [0, 3])
def test_with_basis_is_calibrating_with_that_basis(calibration, basis, seed):
    assert_same(calibration.with_basis(basis, seed=seed), calibrate(tiny(), [tokens(2, 40, seed=1)], basis, seed=seed))


def test_layers_draw_their_own_random_bases(calibration):
    first, second = calibration.with_basis("random").layers
    drawn = [basis.abs().sort().values for layer in (first, second) for basis in (layer.key_basis, layer.value_basis)]
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_bases_are_orthogonal_in_float32(calibration):
    for basis in ("joint", "pca", "random", "identity"):
        for layer in calibration.with_basis(basis).layers:
            for columns in (layer.key_basis, layer.value_basis):
                gram = columns.double().mT @ columns.double()
                # Each entry of the basis is rounded by eps / 2 at most.
                bound = 2 * columns.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
                assert (gram - torch.eye(16, dtype=torch.float64)).abs().max() < bound


def test_report_is_the_captured_share(calibration):
    for row, layer in zip(calibration.report(), calibration.layers, strict=True):
        assert row["keys_quarter"] == pytest.approx(layer.key_spectrum[:, :4].sum(-1).mean().item(), abs=1e-6)
        assert row["values_half"] == pytest.approx(layer.value_spectrum[:, :8].sum(-1).mean().item(), abs=1e-6)
        assert 0.25 < row["keys_quarter"] < row["keys_half"] < 1
    assert [row["layer"] for row in calibration.report()] == [0, 1]
    assert calibration.dims == [(16, 16)] * 2
    assert repr(calibration) == "Calibration(basis='joint', layers=2, tokens=80, effects=False)"


@pytest.mark.parametrize("basis", ["joint", "random"])
def test_comes_back_from_a_file_bit_for_bit(calibration, basis, tmp_path):
    kept = calibration.with_basis(basis, seed=4)
    kept.save(tmp_path / "deep" / "model.safetensors")
    loaded = Calibration.load(tmp_path / "deep" / "model.safetensors")
    assert_same(loaded, kept)
    assert_same(loaded.with_basis("pca"), kept.with_basis("pca"))


def test_comes_back_from_a_file_of_a_model_of_ones_own(tmp_path):
    kept = calibrate(own_model(), [torch.randn(1, 5, 32)])
    kept.save(tmp_path / "model.safetensors")
    loaded = Calibration.load(str(tmp_path / "model.safetensors"))
    assert_same(loaded, kept)
    loaded.check_model(own_model())


def test_a_save_that_fails_leaves_the_old_file(calibration, saved, monkeypatch):
    def fail(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    before = saved.read_bytes()
    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        calibration.with_basis("random").save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_save_replaces_the_old_file(calibration, saved):
    calibration.with_basis("random").save(saved)
    assert Calibration.load(saved).basis == "random"
    assert os.listdir(saved.parent) == [saved.name]


def test_refuses_another_model(calibration):
    calibration.check_model(tiny(seed=5))  # weights do not matter
    with pytest.raises(ValueError, match=r"another model \(num_attention_heads: 4 calibrated, 8 here") as error:
        calibration.check_model(tiny(num_attention_heads=8))
    assert "hidden_size" not in str(error.value)
    with pytest.raises(ValueError, match="model_type: llama calibrated, qwen2 here"):
        calibration.check_model(tiny("qwen2"))
    with pytest.raises(ValueError, match="kind: transformers calibrated, swan here"):
        calibration.check_model(own_model())


def test_refuses_another_model_of_ones_own():
    calibration = calibrate(own_model(), [torch.randn(1, 5, 32)])
    with pytest.raises(ValueError, match="another model"):
        calibration.check_model(own_model(kv_heads=4))
    with pytest.raises(ValueError, match="another model"):
        calibration.check_model(own_model(rope=500.0))


@pytest.mark.parametrize(
    "write",
    [
        lambda path, content: path.write_bytes(b""),
        lambda path, content: path.write_bytes(b"not a safetensors file at all" * 100),
        lambda path, content: path.write_bytes(content[: len(content) // 2]),
        lambda path, content: save_file({"weight": torch.ones(2)}, path),
        lambda path, content: save_file({"weight": torch.ones(2)}, path, metadata={"swan": '{"format": "swan-0"}'}),
    ],
    ids=["empty", "other bytes", "half of one", "other tensors", "another format"],
)
def test_refuses_another_file(saved, write):
    write(saved, saved.read_bytes())
    with pytest.raises(ValueError, match=r"run swan\.calibrate again"):
        Calibration.load(saved)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.key_basis", 1.001, "not orthogonal"),
        ("layers.0.value_basis", float("nan"), "NaN or infinity"),
        ("layers.1.moments.k", float("inf"), "layer 1: the k activations"),
    ],
)
def test_refuses_a_file_that_was_tampered_with(saved, name, value, message):
    metadata, tensors = files.read_tensors(saved, FORMATS, "calibration", "")
    files.write_tensors(saved, {n: t * (value if n == name else 1) for n, t in tensors.items()}, metadata)
    with pytest.raises(ValueError, match=message):
        Calibration.load(saved)
