"""What a server is told, what it may not ask for, and what fits into its memory; without vLLM."""

import dataclasses
import subprocess
import sys
import types

import pytest
import torch

from swan import Calibration, Graded, LayerPlan, Plan
from swan.integrations.vllm.capacity import dense_capacity, packed_capacity
from swan.integrations.vllm.layer import ServedLayer, layouts_of, refusal
from swan.integrations.vllm.model import Heads, heads_of_config
from swan.integrations.vllm.settings import Settings, check_version, load
from tests.tiny import calibration_of, tiny, with_effects

GOOD = {"calibration": "c.safetensors", "retention": 0.26}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """A calibration, and its file."""
    made = with_effects(calibration_of(tiny()))
    file = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    made.save(file)
    return made, str(file)


def test_settings():
    assert Settings.of({"swan": GOOD}) == Settings("c.safetensors", 0.26, buffer=128, sinks=1)
    assert Settings.of({"swan": GOOD | {"buffer": 64}, "other": 1}).buffer == 64


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (None, ValueError, "settings are missing"),
        ({}, ValueError, "settings are missing"),
        ({"swan": 0.26}, ValueError, "settings are missing"),
        ({"swan": {}}, ValueError, "lack calibration and retention"),
        ({"swan": GOOD | {"budget": "1GiB"}}, ValueError, "unknown settings of swan: budget; there are calibration"),
        ({"swan": GOOD | {"retention": "0.26"}}, TypeError, "retention must be a number"),
        ({"swan": GOOD | {"retention": True}}, TypeError, "retention must be a number"),
        ({"swan": GOOD | {"retention": 1.5}}, ValueError, "above 0 and at most 1"),
        ({"swan": GOOD | {"retention": float("nan")}}, ValueError, "above 0 and at most 1"),
        ({"swan": GOOD | {"buffer": 0}}, ValueError, "buffer must be at least 1"),
        ({"swan": GOOD | {"buffer": 12.5}}, TypeError, "numbers of tokens"),
        ({"swan": GOOD | {"sinks": 65}}, ValueError, "up to 64 sinks"),
        ({"swan": GOOD | {"sinks": -1}}, ValueError, "up to 64 sinks"),
        ({"swan": GOOD | {"calibration": 3}}, TypeError, "path of a file"),
    ],
)
def test_settings_that_are_none(given, error, says):
    with pytest.raises(error, match=says):
        Settings.of(given)


@pytest.mark.parametrize("version", ["0.29.0", "0.32.0+cpu", "0.33.1.post2", "0.33.0rc1"])
def test_versions_that_serve(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.28.9", "0.34.0", "1.0.0", "dev", "0.3.0"])
def test_versions_that_do_not(version):
    with pytest.raises(ImportError, match=r"for vllm>=0.29,<0.34, this is"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.28.0", "0.34.0"])
def test_another_version_is_left_as_it_is(version, monkeypatch, caplog):
    """vLLM calls the plugin wherever swan is installed, and must start without it."""
    from swan.integrations.vllm.plugin import register

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__=version))  # which has nothing to import
    register()
    assert f"for vllm>=0.29,<0.34, this is {version}" in caplog.text and "no backend CUSTOM" in caplog.text


def test_the_extra_names_the_same_versions():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == ["vllm>=0.29,<0.34"]
    assert project["entry-points"]["vllm.general_plugins"] == {"swan": "swan.integrations.vllm.plugin:register"}


def test_nothing_imports_vllm():
    """Nor what vLLM imports at its start: the plugin itself."""
    code = (
        "import sys, swan, swan.integrations, swan.integrations.vllm.plugin, swan.integrations.vllm.layer, swan.cli.app"
    )
    code += "\nassert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plan_is_read_once(calibration):
    made, file = calibration
    settings = Settings(file, 0.4, buffer=32)
    found, plan = load(settings)
    assert load(settings)[1] is plan
    assert plan == Plan.for_retention(0.4, made, buffer=32, sinks=1, by_head=False)
    assert isinstance(found, Calibration)


def test_layers_with_a_sliding_window_are_refused(calibration, tmp_path):
    made, _ = calibration
    assert made.effects is not None
    hybrid = with_effects(made)
    hybrid.effects.keys[0] = hybrid.effects.values[0] = torch.nan
    hybrid.save(tmp_path / "hybrid.safetensors")
    with pytest.raises(ValueError, match="layer 0 has a sliding window"):
        load(Settings(str(tmp_path / "hybrid.safetensors"), 0.4))


def test_each_process_takes_the_bases_of_its_heads(calibration):
    made, file = calibration
    _, plan = load(Settings(file, 0.4))
    options = {"dtype": torch.float32, "device": "cpu"}
    shares = [ServedLayer.of(made, plan, 1, rank=rank, ranks=2, **options) for rank in range(2)]
    assert torch.equal(torch.cat([share.key_basis for share in shares]), made.layers[1].key_basis)
    assert torch.equal(torch.cat([share.value_basis for share in shares]), made.layers[1].value_basis)
    assert [share.kv_heads for share in shares] == [1, 1]
    with pytest.raises(ValueError, match="has 2 layers of attention, and the model has a layer 2"):
        ServedLayer.of(made, plan, 2, rank=0, ranks=1, **options)


@pytest.mark.parametrize(
    ("bits", "slots"),
    [
        ((4, 4, 4), [66, 66, 66]),
        ((3, 4, 4), [50, 66, 66]),
        ((3, 4, 4, 3), [51, 66, 66, 50]),
        ((3, 4), [66, 66]),
        ((3, 8, 4), [66, 130, 66]),
    ],
)
def test_pages_of_layers_never_look_like_a_pattern(bits, slots):
    """As many layers of each size are one to vLLM, which then gives parts of the windows blocks of their own."""
    plan = Plan(tuple(LayerPlan(*[Graded(((64, each),))] * 2) for each in bits), sinks=0)
    layouts = layouts_of(plan, 128, torch.bfloat16)
    assert [layout.slot_bytes for layout in layouts] == slots
    assert [layout.plan_layer for layout in layouts] == list(plan.layers)


def config_of_vllm(**changes):
    """As much of vLLM's configuration as is looked at."""
    config = {
        "speculative_config": None,
        "kv_transfer_config": None,
        "parallel_config": types.SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        "scheduler_config": types.SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "model_config": types.SimpleNamespace(use_mla=False),
    }
    return types.SimpleNamespace(**config | changes)


def test_what_a_server_may_not_ask_for():
    assert refusal({"ALiBi": False}, config_of_vllm()) is None
    assert refusal({}, config_of_vllm(speculative_config=types.SimpleNamespace(method="ngram"))) is None
    eagle = config_of_vllm(speculative_config=types.SimpleNamespace(method="eagle3"))
    assert "speculative decoding by another method than ngram" in refusal({}, eagle)
    said = refusal({"ALiBi": True}, config_of_vllm(model_config=types.SimpleNamespace(use_mla=True)))
    assert said.startswith("swan does not serve latent attention (MLA), ALiBi;")
    assert "kv_transfer_config" in refusal({}, config_of_vllm(kv_transfer_config=object()))


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("deepseek", "latent attention"),
        ("mistral-sliding", "layers of sliding_attention"),
        ("gemma3", "layers of sliding_attention"),
        ("gemma2", "softcap"),
        ("qwen3-next", "layers of linear_attention"),
        ("lfm2", "layers of conv"),
    ],
)
def test_models_that_are_not_served(architecture, says):
    with pytest.raises(ValueError, match=f"swan does not serve .*{says}"):
        heads_of_config(tiny(architecture).config)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mixtral", "olmo2"])
def test_models_that_are_served(architecture):
    model = tiny(architecture)
    found, calibration = heads_of_config(model.config), calibration_of(model)
    assert found == Heads(calibration.layers[0].key_basis.shape[0], calibration.dims)


def test_processes_that_cannot_share_the_heads():
    heads = Heads(6, [(64, 64)])
    assert [heads.of_rank(ranks) for ranks in (1, 2, 3, 6, 12)] == [6, 3, 2, 1, 1]
    with pytest.raises(ValueError, match="6 KV heads cannot be shared by 4 processes"):
        heads.of_rank(4)


def test_capacity_by_hand():
    """Two layers, one head of 64: 256 bytes a token and layer dense, 66 at four bits."""
    from swan import Graded, LayerPlan

    plan = Plan((LayerPlan(*[Graded(((64, 4),))] * 2),) * 2, buffer=128, sinks=0)
    block = 2 * 128 * 66
    found = packed_capacity(plan, 1000 * block + 1, 1280, kv_heads=1, batched_tokens=1024)
    assert (found.token_bytes, found.block_tokens, found.blocks, found.tokens) == (132, 128, 1000, 999 * 128)
    assert found.window_bytes == 5 * block  # 128 tokens in pages of 32, which may begin within one
    assert found.requests == (999 - 1024 / 32) / (10 + 5)
    assert found.reserved_requests == pytest.approx(1000 / (10 + 36 + 1))
    dense = dense_capacity([(64, 64)] * 2, 1000 * block, 1280, kv_heads=1)
    assert (dense.token_bytes, dense.blocks, dense.window_bytes) == (512, 1000 * block // (128 * 512), 0)
    assert packed_capacity(plan, 10, 1280, kv_heads=1).requests == 0
    sinks = dataclasses.replace(plan, sinks=4)
    assert packed_capacity(sinks, 1000 * block, 1280, kv_heads=1).token_bytes == 2 * (66 + 4 * 256 // 128)
