"""`swan serve` and `swan capacity`, as a user types them."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from swan import Plan
from swan.cli.app import app
from tests.tiny import calibration_of, save_with_words, tiny, with_effects


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a model, and the file of its calibration."""
    folder = tmp_path_factory.mktemp("model")
    network, _ = save_with_words(folder / "my model")
    with_effects(calibration_of(network)).save(folder / "calibration.safetensors")
    return folder / "my model", folder / "calibration.safetensors"


def test_serve_prints_the_command(model):
    folder, calibration = model
    arguments = (
        "serve",
        folder,
        "--calibration",
        calibration,
        "--retention",
        "0.4",
        "--arguments",
        "--port 80 -x 'a b'",
    )
    words = shlex.split(run(*arguments).stdout)
    assert words[:3] == ["vllm", "serve", str(folder)] and words[-4:] == ["--port", "80", "-x", "a b"]
    settings = json.loads(words[words.index("--additional-config") + 1])
    assert settings == {"swan": {"calibration": str(calibration), "retention": 0.4, "buffer": 128, "sinks": 1}}
    assert words[words.index("--attention-backend") + 1] == "CUSTOM"
    (row,) = run_json(*arguments)["rows"]
    assert row["command"] == words and row["retention"] <= 0.4


def test_serve_runs_the_command(model, monkeypatch, tmp_path):
    folder, calibration = model
    ran = []
    monkeypatch.setattr("swan.cli.serve.os.execvp", lambda file, words: ran.append((file, words)))
    arguments = ("serve", folder, "--calibration", calibration, "--retention", "0.4", "--run")
    monkeypatch.setattr("swan.cli.serve.shutil.which", lambda name: None)
    assert "there is no vllm to run: pip install" in run(*arguments, status=1).stderr
    monkeypatch.setattr("swan.cli.serve.shutil.which", lambda name: name)
    run(*arguments)
    assert ran[0][0] == "vllm" and ran[0][1][:3] == ["vllm", "serve", str(folder)]
    assert "leave one of both out" in run(*arguments, "--json", status=2).stderr


def test_serve_refuses(model, tmp_path):
    folder, calibration = model

    def said(*arguments, status=1):
        return " ".join(run("serve", *arguments, status=status).stderr.split())

    assert "make it: swan calibrate" in said(folder, "--calibration", tmp_path / "none")
    assert "no plan fits in retention 0.05" in said(folder, "--calibration", calibration, "--retention", "0.05")
    assert "cannot be split into words" in said(folder, "--arguments", "'", status=2)
    other = tmp_path / "other.safetensors"
    calibration_of(tiny(num_hidden_layers=3)).save(other)
    assert "this calibration is of another model" in said(folder, "--calibration", other)
    inside = folder / "calibration.safetensors"
    inside.write_bytes(calibration.read_bytes())
    assert "vLLM would read it as weights" in said(folder, "--calibration", inside)
    inside.rename(folder / "swan_calibration.safetensors")  # as `save_pretrained` leaves one
    assert "swan_calibration.safetensors lies in the folder" in said(folder, "--calibration", calibration)
    (folder / "swan_calibration.safetensors").unlink()
    tiny("deepseek").save_pretrained(tmp_path / "mla")
    assert "latent attention (MLA)" in said(tmp_path / "mla", "--calibration", calibration)


def test_capacity(model):
    folder, calibration = model
    arguments = ("capacity", folder, "--memory", "64MiB", "--length", "4k", "--retention", "0.4", "--sinks", "0")
    result = run_json(*arguments)
    dense, graded = result["rows"]
    assert result["settings"]["length"] == 4096 and result["settings"]["memory"] == 2**26
    assert [row["form"] for row in (dense, graded)] == ["dense", "graded"] and dense["gain"] == 1
    assert dense["token_bytes"] == 2 * 2 * 2 * 2 * 16  # layers, heads, keys and values, bytes
    assert graded["retention"] == Plan.for_retention(0.4, dims=[(16, 16)] * 2).retention
    assert graded["blocks"] == pytest.approx(dense["blocks"] / graded["retention"], rel=1e-3)
    assert 1 < graded["gain"] < 1 / graded["retention"]
    for text in ("graded", "dense", "64MiB", "4096"):
        assert text in run(*arguments).stdout
    halves = run_json(*arguments, "--tensor-parallel", "2")["rows"]
    assert halves[0]["token_bytes"] == dense["token_bytes"] / 2 and halves[1]["blocks"] >= 2 * graded["blocks"] - 1
    assert "cannot be shared by 3" in run(*arguments, "--tensor-parallel", "3", status=1).stderr
    (_, own) = run_json(*arguments, "--calibration", calibration)["rows"]
    assert own["retention"] <= 0.4
    assert "multiple of 64 tokens, got 100" in run(*arguments, "--block-tokens", "100", status=2).stderr
    assert "such as 16384 or 16k" in run(*arguments, "--length", "1M", status=2).stderr
