"""Every command on the real default model, as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from swan import Calibration
from swan.cli.app import app

MODEL = "smollm2-135m"
ENVELOPE = {"command", "date", "versions", "machine", "settings", "rows"}


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


def test_generate_within_a_budget():
    (row,) = run_json("generate", MODEL, "Name three colours.", "--tokens", "8", "--budget", "20MiB")["rows"]
    assert row["nbytes"] <= 20 * 2**20
    assert row["retention"] == 1
    result = run("generate", MODEL, "Name three colours.", "--budget", "1MiB", status=1)
    assert "the budget of 1048576 bytes is full" in result.stderr.replace("\n", " ")


def test_frontier(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "new" / "frontier.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    arguments = ("frontier", MODEL, "--text", str(text), "--windows", "1", "--length", "130", "--seeds", "1")
    shown = run(
        *arguments, "--needles", "0", "--retention", "0.5", "--plot", str(tmp_path / "f.png"), "--out", str(out)
    )
    assert "frontier" in shown.stdout
    result = json.loads(out.read_text())
    assert set(result) == ENVELOPE | {"needles"}
    assert [row["form"] for row in result["rows"]][:2] == ["dense", "swan"]
    assert {"fp8", "kivi", "random-rotation", "window", "low rank"} <= {row["form"] for row in result["rows"]}
    assert (tmp_path / "f.png").is_file()


LAYER = ("--shape", "4/2/32", "--buffer", "32", "--form", "topk")


def test_bench_decode():
    arguments = ("bench", "decode", "--lengths", "96", *LAYER, "--impl", "sdpa", "--impl", "tiles")
    result = run_json(*arguments, "--retention", "0.5", "--dtype", "bfloat16")
    assert [(row["what"], row["form"], row["retention"]) for row in result["rows"]] == [
        ("decode", "dense", 1.0),
        ("decode", "topk", 0.5),
    ]
    assert result["settings"]["kv_heads"] == 2 and result["settings"]["bandwidth"] > 0
    shown = run(*arguments, "--impl", "abacus").stdout
    assert "GB/s (threads" in shown and "no abacus of topk 0.50 at 96" in shown


@pytest.mark.parametrize(
    ("command", "options", "shown"),
    [
        ("step", ("--impl", "eager"), "break-even, topk 0.50 eager"),
        ("prefill", (), "peak MiB"),
        ("capacity", ("--memory", "64KiB", "--impl", "tiles"), "tokens/s"),
    ],
)
def test_bench_a_layer(command, options, shown):
    arguments = ("bench", command, "--lengths", "96", *LAYER, *options)
    assert {row["form"] for row in run_json(*arguments)["rows"]} == {"dense", "topk"}
    assert shown in run(*arguments).stdout


def test_bench_model():
    arguments = ("bench", "model", MODEL, "--prompt", "200", "--tokens", "2", "--impl", "eager", "--no-quantized")
    rows = run_json(*arguments, "--retention", "0.5")["rows"]
    assert [(row["form"], row["retention"]) for row in rows] == [("dense", 1.0), ("graded", 1.0), ("graded", 0.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "./nowhere.gguf", "x"), "does not exist"),
        (("generate", MODEL, "x", "--retention", "1.5"), "above 0 and at most 1"),
        (("evaluate", MODEL, "--text", "nowhere.txt"), "nowhere.txt"),
        (("generate", MODEL, "x", "--calibration", "nowhere.safetensors"), "nowhere.safetensors"),
        (("bench", "decode", "--shape", "8x8"), "such as 32/8/128, got '8x8'"),
        (("bench", "capacity", "--memory", "much"), "'64MiB'"),
    ],
)
def test_errors_are_sentences(arguments, message):
    result = run(*arguments, status=1)
    assert message in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output
