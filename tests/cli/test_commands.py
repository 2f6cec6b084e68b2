"""Every command on the real default model, as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from swan import Calibration
from swan.cli.app import app

MODEL = "smollm2-135m"
ENVELOPE = {"command", "versions", "machine", "settings", "rows"}


def run(*arguments, status=0):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status, result.output
    return result


def run_json(*arguments):
    result = json.loads(run(*arguments, "--json").stdout)
    assert set(result) == ENVELOPE
    return result


def test_calibrate(tmp_path):
    out = tmp_path / "calibration.safetensors"
    result = run_json("calibrate", MODEL, "--tokens", "128", "--out", str(out))
    assert len(result["rows"]) == 30
    assert Calibration.load(out).tokens == 128
    shown = run("generate", MODEL, "Hello", "--tokens", "3", "--calibration", str(out))
    assert "of dense" in shown.stderr


def test_generate():
    dense = run_json("generate", MODEL, "Name three colours.", "--tokens", "8", "--dense")
    (row,) = run_json("generate", MODEL, "Name three colours.", "--tokens", "8", "--retention", "1")["rows"]
    assert row["token_ids"] == dense["rows"][0]["token_ids"]
    assert row["new_tokens"] == 8
    assert row["text"] in run("generate", MODEL, "Name three colours.", "--tokens", "8", "--dense").stdout


def test_evaluate(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    arguments = ("evaluate", MODEL, "--text", str(text), "--windows", "2", "--length", "100", "--retention", "0.5")
    rows = run_json(*arguments)["rows"]
    assert [row["form"] for row in rows] == ["dense", "graded"]
    for field in ("model", "text", "settings", "retention", "compression", "perplexity", "kl", "agreement"):
        assert field in rows[1]
    assert rows[1]["retention"] <= 0.5
    assert "perplexity" in run(*arguments).stdout


def test_bench_decode():
    arguments = ("bench", "decode", "--lengths", "96", "--heads", "4", "--kv-heads", "2", "--head-dim", "32")
    rows = run_json(*arguments, "--buffer", "32", "--impl", "sdpa", "--impl", "eager")["rows"]
    assert {row["what"] for row in rows} == {"decode"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "./nowhere.gguf", "x"), "does not exist"),
        (("generate", MODEL, "x", "--retention", "1.5"), "above 0 and at most 1"),
        (("evaluate", MODEL, "--text", "nowhere.txt"), "nowhere.txt"),
        (("generate", MODEL, "x", "--calibration", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_errors_are_sentences(arguments, message):
    result = run(*arguments, status=1)
    assert message in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output
