"""Every command as a user types it: on a tiny model with real words, some on the real default model too."""

import functools
import importlib.util
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from swan import Calibration, calibrate
from swan.cli.app import app
from swan.evaluation import calibrations
from swan.evaluation.texts import calibration_text, token_windows
from swan.kernels import cpu
from tests.tiny import save_with_words

REAL = "smollm2-135m"
ENVELOPE = {"command", "date", "versions", "machine", "settings", "rows"}


def run(*arguments, status=0):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status, result.output
    return result


def run_json(*arguments, more=()):
    result = json.loads(run(*arguments, "--json").stdout)
    assert set(result) == ENVELOPE.union(more)
    return result


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a tiny model, and the options that give it its calibration."""
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = save_with_words(folder, head_dim=32)  # KIVI needs a multiple of 32
    windows = token_windows(calibration_text(), tokenizer, windows=1, length=200)
    file = folder / "calibration.safetensors"
    calibrate(model, [windows], progress=False).save(file)
    return str(folder), ("--calibration", str(file))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return ("--text", str(file))


def test_the_real_model_is_calibrated_and_generates(tmp_path):
    out = str(tmp_path / "calibration.safetensors")
    result = run_json("calibrate", REAL, "--tokens", "128", "--out", out, "--dtype", "float32", more=["plans"])
    assert len(result["rows"]) == 30
    assert [row["retention"] for row in result["plans"]] == [0.5, 0.33, 0.26, 0.2, 0.15, 0.1]
    predicted = [row["predicted_kl"] for row in result["plans"]]
    assert predicted == sorted(predicted) and predicted[0] > 0
    assert Calibration.load(out).tokens == 128
    arguments = ("generate", REAL, "Name three colours.", "--tokens", "8", "--dtype", "float32")
    dense = run_json(*arguments, "--dense")["rows"][0]
    (row,) = run_json(*arguments, "--retention", "1", "--calibration", out)["rows"]
    assert row["token_ids"] == dense["token_ids"]
    assert row["new_tokens"] == 8


def test_generate(tiny):
    folder, calibration = tiny
    shown = run("generate", folder, "Hello", "--tokens", "3", *calibration)
    assert "of dense" in shown.stderr
    assert "dtype: float32, the model's own" in shown.stderr.replace("\n", " ")
    result = run_json("generate", folder, "Hello", "--tokens", "3", "--dense")
    assert result["rows"][0]["text"] in run("generate", folder, "Hello", "--tokens", "3", "--dense").stdout
    assert result["settings"]["dtype"] == "float32"
    assert run_json("generate", folder, "Hello", "--tokens", "3", "--dense", "--dtype", "bfloat16")["settings"][
        "dtype"
    ] == "bfloat16"  # fmt: skip


def test_calibrates_what_has_no_calibration(tiny, monkeypatch):
    monkeypatch.setattr(calibrations, "calibrated", functools.partial(calibrations.calibrated, tokens=100))
    (row,) = run_json("generate", tiny[0], "Hello", "--tokens", "3", "--retention", "0.5")["rows"]
    assert row["retention"] <= 0.5


def test_takes_the_calibration_in_the_folder_of_a_model(tiny, monkeypatch, tmp_path):
    shutil.copytree(tiny[0], tmp_path / "model")
    shutil.copy(tiny[1][1], tmp_path / "model" / "swan_calibration.safetensors")
    monkeypatch.setattr(calibrations, "calibrated", None)  # nothing may be calibrated
    given = run_json("generate", tiny[0], "Hello", "--tokens", "3", *tiny[1])
    found = run_json("generate", str(tmp_path / "model"), "Hello", "--tokens", "3")
    assert found["rows"][0]["token_ids"] == given["rows"][0]["token_ids"]
    assert found["settings"]["basis"] == given["settings"]["basis"] == "joint"


def test_a_plan_is_scored_in_the_basis_of_its_calibration(tiny, text, tmp_path):
    pca = tmp_path / "pca.safetensors"
    Calibration.load(tiny[1][1]).with_basis("pca").save(pca)
    arguments = ("evaluate", tiny[0], *text, "--windows", "1", "--length", "100", "--calibration", str(pca))
    for more, basis in (((), "pca"), (("--basis", "identity"), "identity")):
        _, row = run_json(*arguments, "--retention", "0.5", *more)["rows"]
        assert row["settings"]["basis"] == basis
    assert "--basis needs one --retention" in run(*arguments, "--basis", "pca", status=2).stderr.replace("\n", " ")
    arguments = ("generate", tiny[0], "Hello", "--tokens", "3", "--calibration", str(pca))
    assert run_json(*arguments)["settings"]["basis"] == "pca"
    assert run_json(*arguments, "--basis", "random")["settings"]["basis"] == "random"


def test_calibrate_says_which_plans_will_not_hold(tiny, text, tmp_path, monkeypatch):
    arguments = ("calibrate", tiny[0], *text, "--tokens", "200", "--out", str(tmp_path / "c.safetensors"))
    shown = run(*arguments)
    assert "What plans are predicted to cost" in shown.stdout and "of layer" in shown.stdout
    for much, said in ((0.0, True), (100.0, False)):
        monkeypatch.setattr("swan.cli.calibrate.MUCH", much)
        assert ("plans will not hold at a retention of 0.5 and below" in run(*arguments).stderr) == said


def test_calibrate_spreads_texts_over_positions(tiny, text, tmp_path):
    arguments = ("calibrate", tiny[0], *text, "--tokens", "200", "--out", str(tmp_path / "c.safetensors"))
    for more, positions in (((), None), (("--positions", "300"), 300)):
        settings = run_json(*arguments, *more, more=("plans",))["settings"]
        assert (settings["positions"], settings["tokens"]) == (positions, 200)
    failed = CliRunner().invoke(app, (*arguments, "--positions", "513"))
    assert failed.exit_code != 0 and "positions must be from 1 to the 512 of this model, got 513" in failed.output


def test_evaluate(tiny, text):
    arguments = ("evaluate", tiny[0], *tiny[1], *text, "--windows", "2", "--length", "100", "--retention", "0.5")
    rows = run_json(*arguments)["rows"]
    assert [row["form"] for row in rows] == ["dense", "graded"]
    for field in ("model", "text", "settings", "retention", "compression", "perplexity", "kl", "agreement"):
        assert field in rows[1]
    assert rows[1]["retention"] <= 0.5
    assert "perplexity" in run(*arguments).stdout


def test_fewer_tokens(tiny, text):
    arguments = ("evaluate", tiny[0], *tiny[1], *text, "--windows", "1", "--length", "200", "--keep", "0.5")
    _, row = run_json(*arguments, "--retention", "0.5")["rows"]
    assert row["settings"]["keep"] == 0.5 and row["retention"] <= 0.5 * (0.5 + 1 / 64)
    assert "50%" in run(*arguments, "--retention", "0.5").stdout  # in a narrow column
    assert "--keep needs one --retention or more" in run(*arguments, status=2).stderr.replace("\n", " ")
    arguments = ("generate", tiny[0], "Hello", "--tokens", "3", *tiny[1], "--keep", "0.5")
    assert run_json(*arguments)["settings"]["keep"] == 0.5


def test_generate_within_a_budget(tiny):
    arguments = ("generate", tiny[0], "Name three colours.", *tiny[1])
    (row,) = run_json(*arguments, "--tokens", "8", "--budget", "20MiB")["rows"]
    assert row["nbytes"] <= 20 * 2**20
    assert row["retention"] == 1
    (row,) = run_json(*arguments, "--tokens", "8", "--budget", "20MiB", "--on-full", "evict", "--keep", "1")["rows"]
    assert row["retention"] == 1
    assert "--on-full goes with a --budget" in run(*arguments, "--on-full", "evict", status=2).stderr
    result = run(*arguments, "--budget", "10kB", status=1)
    assert "the budget of 10000 bytes is full" in result.stderr.replace("\n", " ")


def test_frontier(tiny, text, tmp_path):
    out = tmp_path / "new" / "frontier.json"
    arguments = ("frontier", tiny[0], *tiny[1], *text, "--windows", "1", "--length", "130", "--seeds", "1")
    shown = run(
        *arguments, "--needles", "0", "--retention", "0.5", "--plot", str(tmp_path / "f.png"), "--out", str(out)
    )
    assert "frontier" in shown.stdout
    result = json.loads(out.read_text())
    assert set(result) == ENVELOPE | {"needles"}
    assert [row["form"] for row in result["rows"]][:2] == ["dense", "swan"]
    rivals = {"fp8", "kivi", "random-rotation", "window", "low rank", "nvfp4", "kvarn", "block-gtq", "trellis"}
    rivals |= {"snapkv", "expected attention, 4 bit", "linear score"}
    assert rivals <= {row["form"] for row in result["rows"]}
    assert (tmp_path / "f.png").is_file()


def test_demo(tiny, tmp_path, monkeypatch):
    calibration = Calibration.load(tiny[1][1])
    monkeypatch.setattr("swan.cli.demo.calibration_of", lambda *_: calibration)
    arguments = ("demo", "--model", tiny[0], "--tokens", "3", "--windows", "1", "--out", str(tmp_path))
    shown = run(*arguments).stdout
    for step in (
        "loading",
        "calibrating",
        "generating 3 tokens on the dense cache",
        "retention 0.25",
        "scoring 1 window",
    ):
        _, title, after = shown.partition(step)
        assert title and " s\n" in after  # each says how long it took
    assert "of the bytes of a dense float32 cache" in shown.replace("\n", " ")
    assert (tmp_path / "swan-demo.png").is_file()
    (tmp_path / "swan-demo.png").unlink()
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "none without matplotlib: pip install 'swan-attention[plot]'" in run(*arguments).stdout.replace("\n", " ")
    assert not (tmp_path / "swan-demo.png").exists()


def test_info(monkeypatch, tmp_path):
    monkeypatch.setenv("SWAN_CPU", "generic")
    monkeypatch.setenv("SWAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    result = run_json("info")
    assert result["settings"]["cpu_variant"] == "generic"
    assert result["settings"]["cache_folder"] == str(tmp_path / "cache")
    assert result["settings"]["default_model"]["fetched"] is False
    assert result["settings"]["native_dtypes"][0] == "float32"
    assert [row["kernel"] for row in result["rows"]] == [*(f"cpp {name}" for name in cpu.variants()), "cuda"]
    assert not any(row["built"] for row in result["rows"])
    shown = run("info").stdout
    for said in ("torch", torch.__version__, "native dtypes", "in use", "cpp generic", str(tmp_path / "cache")):
        assert said in shown
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "not built: there is no C++ compiler 'no-such-compiler'; they need a C++ compiler" in run("info").stdout


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


def test_bench_model(tiny):
    arguments = ("bench", "model", *tiny[:1], *tiny[1], "--prompt", "200", "--tokens", "2", "--impl", "eager")
    rows = run_json(*arguments, "--no-quantized", "--retention", "0.5")["rows"]
    assert [(row["form"], row["retention"]) for row in rows] == [("dense", 1.0), ("graded", 1.0), ("graded", 0.5)]


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("generate", "./nowhere.gguf", "x"), "does not exist", 1),
        (("generate", "TINY", "x", "--retention", "1.5"), "above 0 and at most 1", 2),
        (("generate", "TINY", "x", "--keep", "1.5"), "above 0 and at most 1, got 1.5", 2),
        (("evaluate", "TINY", "--text", "nowhere.txt"), "nowhere.txt", 1),
        (("generate", "TINY", "x", "--calibration", "nowhere.safetensors"), "nowhere.safetensors", 1),
        (("bench", "decode", "--shape", "8x8"), "such as 32/8/128, got '8x8'", 2),
        (("bench", "capacity", "--memory", "much"), "'64MiB'", 2),
    ],
)
def test_errors_are_sentences(tiny, arguments, message, status):
    result = run(*[tiny[0] if argument == "TINY" else argument for argument in arguments], status=status)
    assert message in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output
