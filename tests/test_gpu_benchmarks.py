"""benchmarks/gpu.sh and what it is made of, on a CPU: the same code in small shapes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import kernels, model, oracle, processes, speed
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.results import Results, add_speedups, card, shown
from benchmarks.gpu.rows import guarded
from swan.functional import reference
from tests.compilers import needs_cxx
from tests.strategies import normal

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

from results import data as docs_data  # noqa: E402
from results import speed as docs_speed  # noqa: E402

CPU = torch.device("cpu")


def gpu_sh(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)


def results_in(folder: Path, name: str) -> dict:
    return json.loads((folder / f"gpu-{name}-cpu.json").read_text())


# The whole ----------------------------------------------------------------------------------------


def test_gpu_sh_checks_results(tmp_path):
    run = gpu_sh(tmp_path, "--device", "cpu", "--quick", "--only", "correctness")
    assert run.returncode == 0, run.stdout + run.stderr
    result = results_in(tmp_path, "correctness")
    assert set(result) == {"command", "date", "versions", "machine", "settings", "rows"}
    assert result["command"] == "benchmarks/gpu.sh --device cpu --quick"
    assert {row["result"] for row in result["rows"]} == {"passed"}
    names = [row["case"] for row in result["rows"]]
    wanted = (
        "pack keys",
        "swan_attention 5003 tokens, 1 queries, masks",
        "static KVCache, padding",
        "rotate",
        "compiled once",
    )
    assert all(name in names for name in wanted)
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_sh_without_a_gpu_says_so(tmp_path):
    run = gpu_sh(tmp_path)
    assert run.returncode == 0 and "skipped, torch sees no CUDA device" in run.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpu_sh_as_a_whole(tmp_path):
    run = gpu_sh(tmp_path, "--device", "cpu", "--quick")
    assert run.returncode == 0, run.stdout + run.stderr
    result = results_in(tmp_path, "speed")
    rows = result["rows"]
    assert result["versions"]["torch"] == torch.__version__ and result["settings"]["bandwidth"] > 0
    assert {"decode", "pack", "step", "layer", "capacity", "model", "prefill"} <= {row["what"] for row in rows}


def test_all_parts_end_within_five_minutes():
    assert [part.until for part in PARTS] == sorted(part.until for part in PARTS)
    assert PARTS[-1].until + processes.GRACE < 300


# Timings ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_jobs_of_a_layer_give_rows():
    rows = [row for _, run in speed.jobs(CPU, quick=True) for row in run()]
    assert {row["what"] for row in rows} > {"decode", "pack", "rotate", "pack 2048", "step", "layer", "capacity"}
    for row in rows:
        assert row["median_ms"] is not None, row["error"]
        assert row["head_dim"] == 64 and (row["error"] is None or row["error"] < 0.1)
        assert shown(row | {"job": "some job"})
    packs = [row for row in rows if row["what"] == "pack"]
    assert [row["batch"] for row in packs] == [2, 1] and all(row["share"] > 0 for row in packs)
    json.dumps(rows, allow_nan=False)


@torch.no_grad()
def test_jobs_of_a_model_are_prepared_and_then_timed():
    ready = [(name, run()) for name, run in model.jobs(CPU, quick=True)]
    assert [next(rows) for _, rows in ready] == [{}, {}]
    dense, prefill, packed = [row for _, rows in ready for row in rows]
    assert (dense["what"], dense["form"], dense["impl"], dense["batch"]) == ("model", "dense", "eager", 1)
    assert prefill["what"] == "prefill" and prefill["tokens_per_second"] > 0
    assert (packed["form"], packed["impl"]) == ("graded", "compiled")
    assert packed["bytes"] / packed["batch"] < dense["bytes"]


def test_a_process_holds_one_kind_of_model():
    parts = {part.name: part for part in PARTS}
    width = parts["model"].processes
    for column in range(width):
        kinds = [kind for kind in model.KINDS[column::width] if kind]
        assert len({kind.retention == 1 for kind in kinds}) == 1
    kinds = [kind for kind in model.KINDS if kind]
    assert len(set(kinds)) == len(kinds)


# Oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 5])])
def test_the_oracle_is_the_reference(padding):
    q, k, v = normal(0, 2, 4, 40, 16), normal(1, 2, 2, 40, 16), normal(2, 2, 2, 40, 16)
    pruned = k * 0.9, v * 1.1
    dense, packed = oracle.windowed(40, torch.arange(40), 8, 3, padding)
    parts = oracle.Part(k.double(), v.double(), dense), oracle.Part(*(t.double() for t in pruned), packed)
    found = oracle.attention(q, *parts)
    inputs = (t.double() for t in (q, k, v, *pruned))
    expected = reference.windowed_attention(*inputs, buffer=8, sinks=3, padding=padding)
    assert torch.allclose(found.out, expected, atol=1e-6)


@needs_cxx
@pytest.mark.parametrize("token", [0, 200, 332])
def test_one_wrong_token_is_noticed(token, monkeypatch):
    true_pack = kernels.pack

    def wrong_pack(x, layout, **options):
        return true_pack(
            x.clone().index_fill_(2, torch.tensor(token), 0) if x.shape[2] == 333 else x, layout, **options
        )

    setting = kernels.Setting(kernels.layer_of("0.266", 64), 64, torch.bfloat16, CPU)
    good = list(kernels.attending(setting, 333, 1))
    true_history = kernels.history
    held = []

    def remembered(*packed):
        held.append(packed)
        return true_history(*packed)

    monkeypatch.setattr(kernels, "history", remembered)
    list(kernels.attending(setting, 333, 1))
    monkeypatch.setattr(kernels, "history", lambda *_: true_history(*held[0]))  # what should be stored
    monkeypatch.setattr(kernels, "pack", wrong_pack)
    bad = list(kernels.attending(setting, 333, 1))
    assert {row["result"] for row in good} == {"passed"}
    assert all(row["result"] == "failed" for row in bad if row["case"] == "packed_attention 333 tokens, 1 queries")


# Processes and results ----------------------------------------------------------------------------

WORKER = """
import json, sys, time
begin = int(sys.argv[sys.argv.index("--begin") + 1])
def emit(kind, content):
    print("@" + json.dumps({kind: content}), flush=True)
def row(name):
    emit("row", {"job": name, "case": name, "error": 0.0, "bound": 1.0, "result": "passed"})
for index, name in enumerate(["good", "crashes", "hangs", "last"]):
    if index < begin:
        continue
    emit("job", [index, name])
    if name == "crashes":
        sys.exit(3)
    if name == "hangs":
        time.sleep(60)
    row(name)
print("and a line of a library")
"""


def test_a_crash_and_a_hang_cost_one_job_each(tmp_path, monkeypatch, capsys):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(processes, "WORKER", [sys.executable, str(script)])
    results = Results(tmp_path, "a command", {})
    part = processes.Part("some", "correctness", 1, 60, 0.7)
    processes.run_part(part, ["--device", "cpu"], results, time.time())
    rows = results_in(tmp_path, "correctness")["rows"]
    assert [(row["job"], row["result"]) for row in rows] == [
        ("good", "passed"), ("crashes", "failed"), ("hangs", "failed"), ("last", "passed")
    ]  # fmt: skip
    assert rows[1]["reason"] == "the process ended with status 3"
    assert rows[2]["reason"] == "it said nothing for 1 s"
    assert "and a line of a library" in capsys.readouterr().out
    assert results.conclude(1.0) == 1


def test_prepared_jobs_of_a_process_that_ends_are_reported(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    lines = [{"prepare": [0, "first"]}, {"prepare": [1, "second"]}, {"job": [0, "first"]}]
    script.write_text(
        "import sys\n" + "".join(f"print({'@' + json.dumps(line)!r})\n" for line in lines) + "sys.exit(1)"
    )
    monkeypatch.setattr(processes, "WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(processes, "LEAST", 1e9)
    results = Results(tmp_path, "a command", {})
    processes.run_part(processes.Part("some", "speed", 8, 60, 60), ["cpu"], results, time.time())
    assert [(row["job"], row["result"]) for row in results.rows["speed"]] == [
        ("first", "failed"),
        ("second", "skipped"),
    ]
    assert results.conclude(1.0) == 0  # a time that is missing is no wrong result


def test_a_process_that_is_late_is_ended(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace('"crashes", ', ""))
    monkeypatch.setattr(processes, "WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(processes, "GRACE", 0.0)
    results = Results(tmp_path, "a command", {})
    processes.run_part(processes.Part("some", "correctness", 1, 0.8, 60), ["cpu"], results, time.time())
    assert [row["result"] for row in results.rows["correctness"]] == ["passed", "skipped"]
    assert results.conclude(1.0) == 0


def test_an_error_of_a_job_is_a_row():
    def rows():
        yield {"case": "one"}
        raise RuntimeError("\n  CUDA error: misaligned address\nmore\nand more")

    assert list(guarded("job", rows())) == [
        {"case": "one"},
        {"case": "job", "error": None, "bound": None, "result": "failed",
         "reason": "RuntimeError: CUDA error: misaligned address more"},
    ]  # fmt: skip


def test_speedups_are_over_dense_rows_of_the_same_shape():
    def row(form, head_dim, median_ms, what="decode"):
        same = {"what": what, "length": 8, "batch": 1, "speedup": None}
        return same | {"form": form, "head_dim": head_dim, "median_ms": median_ms}

    rows = [row("dense", 64, 4.0), row("dense", 64, 2.0), row("graded", 64, 1.0), row("graded", 128, 1.0)]
    rows += [
        row("graded", 64, None),
        row("dense", 64, 9.0, "capacity"),
        {"case": "one that failed", "result": "failed"},
    ]
    add_speedups(rows)
    assert [r.get("speedup") for r in rows] == [0.5, 1.0, 2.0, None, None, None, None]


def test_files_are_named_by_the_card():
    assert card("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3" and card(None) == "cpu"


# Pages --------------------------------------------------------------------------------------------


def test_the_page_shows_a_card_once_it_has_results(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_data, "FOLDER", tmp_path)
    results = Results(tmp_path, "benchmarks/gpu.sh", {})
    results.about = {"gpu": None, "machine": {"gpu": None, "cpu": "a CPU"}, "versions": {}, "bandwidth": 1e10}
    results.add("speed", speed_row("dense", 1.0, 1.0))
    assert "Nothing of this version has run on a GPU" in docs_speed.on_gpus()  # a CPU is none

    machine = {"gpu": "Some Card 80GB", "cpu": "a CPU", "cores": 2}
    about = {"gpu": machine["gpu"], "machine": machine, "versions": {"torch": "2.11"}, "bandwidth": 3e12}
    results = Results(tmp_path, "benchmarks/gpu.sh", {})
    results.about = about
    results.add("correctness", {"job": "one", "case": "one", "error": 0.0, "bound": 0.0, "result": "passed"})
    for form, retention, ms in (
        ("dense", 1.0, 0.352),
        ("dense", 1.0, 0.4),
        ("graded", 0.266, 0.132),
        ("graded", 0.18, None),
    ):
        results.add("speed", speed_row(form, retention, ms))
    results.add("speed", speed_row("dense", 1.0, 3.0, what="model") | {"tokens_per_second": 2666.0})
    results.add(
        "speed", {"job": "model", "case": "model", "error": None, "result": "skipped", "reason": "the time is over"}
    )
    results.add(
        "speed", speed_row("graded", 0.266, 0.05, what="step") | {"launches": 7.0, "host_us": 91.2, "share": 1.5}
    )
    page = docs_speed.on_gpus()
    assert "| step | some | 32768 x 8 | 0.0500 | 150&nbsp;% | 7 | 91 |" in page
    assert "### Some Card 80GB" in page and "1 of 1 checks" in page and "3000 GB/s" in page
    assert "| 32768 x 8 | 128 | 0.352 | 0.132&nbsp;(2.67) |" in page
    assert "| 32768 x 8 | dense | some | 3.00 | 1.00 | 2666 | 1 |" in page
    assert "Nothing of this version" not in page and "Made by `benchmarks/gpu.sh`" in page


def speed_row(form: str, retention: float, median_ms: float | None, what: str = "decode") -> dict:
    shape = {"length": 32768, "batch": 8, "head_dim": 128, "impl": "some", "bytes": 2**20}
    return shape | {
        "what": what, "form": form, "retention": retention, "median_ms": median_ms, "speedup": None, "error": None,
        "bandwidth_fraction": None,
    }  # fmt: skip
