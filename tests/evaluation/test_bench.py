import contextlib
import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch

from swan.evaluation.bench import FORMS, SHAPES, Setup, add_speedups, bench_decode, common, decode, gpu, plot_decode
from swan.evaluation.figures import save
from swan.evaluation.machine import TooLong, at_most, last_level_cache, machine, peak_bytes, time_calls, versions
from swan.kernels import cpu
from tests.compilers import needs_cxx

COLUMNS = [
    "what", "impl", "form", "retention", "length", "batch", "dtype", "variant", "instruction_set", "median_ms",
    "spread", "bytes", "bandwidth_fraction", "error", "speedup", "peak_bytes",
]  # fmt: skip
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Setup(heads=4, kv_heads=2, head_dim=32, buffer=16, dtype=torch.float32, device=CPU, repeats=3)
BANDWIDTH = 1e10


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    setup, impls = dataclasses.replace(TINY, batch=2), ["sdpa", "sdpa-gqa", "tiles"]
    dtypes = [torch.float32, torch.bfloat16]
    return bench_decode([40, 100], setup, dtypes=dtypes, impls=impls, bandwidth=BANDWIDTH)


def test_rows_follow_the_schema(rows):
    assert len(rows) == 2 * 2 * (2 + len(FORMS))  # lengths, dtypes, dense impls and forms
    for row in rows:
        assert list(row) == COLUMNS
        assert row["what"] == "decode"
        assert row["variant"] == cpu.variant() and row["instruction_set"] == torch.backends.cpu.get_cpu_capability()
        assert (row["form"] == "dense") == (row["impl"] in decode.DENSE)
        assert row["median_ms"] > 0 and row["spread"] >= 0 and row["bandwidth_fraction"] > 0 and row["peak_bytes"] > 0
    json.dumps(rows, allow_nan=False)


def test_plots(rows, tmp_path):
    assert save(plot_decode(rows, "tiny"), tmp_path / "new" / "decode.png").stat().st_size > 10_000


def test_results_are_right_and_their_error_is_that_of_the_dtype(rows):
    for row in rows:
        assert 0 < row["error"] < 16 * torch.finfo(getattr(torch, row["dtype"])).eps


def test_bytes_are_what_a_step_reads(rows):
    size = {row["form"]: row["bytes"] for row in rows if row["length"] == 100 and row["dtype"] == "bfloat16"}
    vectors = 2 * 2 * 2  # rows, KV heads, keys and values
    assert size["dense"] == vectors * 100 * 32 * 2
    assert size["leading"] == vectors * (84 * 16 + 16 * 32) * 2


def test_speedup_is_over_the_fastest_dense_row_of_its_length(rows):
    for length in (40, 100):
        same = [row for row in rows if row["length"] == length]
        fastest = min(row["median_ms"] for row in same if row["form"] == "dense")
        assert all(row["speedup"] == fastest / row["median_ms"] for row in same)


def test_speedups_across_calls_keep_batches_apart():
    def row(form, batch, median_ms):
        return {"what": "decode", "form": form, "length": 8, "batch": batch, "median_ms": median_ms, "speedup": None}

    rows = [row("dense", 1, 4.0), row("dense", 1, 2.0), row("topk", 1, 1.0), row("topk", 1, None), row("topk", 8, 1.0)]
    add_speedups(rows)
    assert [r["speedup"] for r in rows] == [0.5, 1.0, 2.0, None, None]


def timed(**options) -> list[dict]:
    return bench_decode([40], TINY, bandwidth=BANDWIDTH, **options)


def test_what_cannot_run_gives_a_row_with_the_reason():
    impossible, other = timed(impls=["tiles", "abacus"], forms=[("graded", 0.01)])
    assert impossible["error"].startswith("ValueError: no plan fits") and impossible["median_ms"] is None
    assert other["error"] == impossible["error"]
    (unknown,) = timed(impls=["abacus"], forms=[("topk", 0.5)])
    assert "abacus" in unknown["error"] and unknown["median_ms"] is None and unknown["speedup"] is None
    assert list(unknown) == COLUMNS


def test_wrong_results_and_lack_of_memory_are_reasons_too(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("out of memory\nand more lines")

    def no_compiler(*_):
        raise RuntimeError("the compiler raised:\nthe reason\nand more lines")

    monkeypatch.setitem(decode.DENSE, "sdpa", no_memory)
    monkeypatch.setitem(decode.DENSE, "sdpa-gqa", lambda q, k, v: 2 * q)
    monkeypatch.setitem(decode.DENSE, "flex", no_compiler)
    first, second, third = timed(impls=["sdpa", "sdpa-gqa", "flex"], forms=[])
    assert first["error"] == "OutOfMemoryError: out of memory"
    assert second["error"].startswith("ArithmeticError: wrong result") and second["median_ms"] is None
    assert third["error"] == "RuntimeError: the compiler raised: the reason"


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"above the buffer \(16\), got \[100, 16\]"):
        bench_decode([100, 16], TINY)
    with pytest.raises(ValueError, match="forms are"):
        timed(forms=[("ternary", 0.5)])


def test_what_is_timed_if_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(decode, "measure", lambda *_: {})  # a timer of a millisecond could strike anywhere
    rows = [(row["form"], row["impl"]) for row in bench_decode([40, 8193], TINY, forms=[("fp8", 0.5)])]
    dense = [("dense", impl) for impl in ("sdpa", "sdpa-gqa", "flex")]
    assert rows == [*dense, ("fp8", "tiles"), ("fp8", "compiled"), *dense, ("fp8", "tiles")]
    assert decode.kernel_on(CPU) == "cpp" and decode.kernel_on(CUDA) == "cuda"
    assert decode.dense_on(CUDA) == ["cudnn", "flash", "flex"] and set(decode.dense_on(CUDA)) <= set(decode.DENSE)
    assert common.forms_on(CPU) == FORMS and common.forms_on(CUDA)[-1][0] == "fp8"
    assert all(set(shape) == {"heads", "kv_heads", "head_dim"} for shape in SHAPES.values())


def test_which_rows_make_sense_on_a_gpu():
    def fitting(form):
        return [impl for impl in decode.IMPLS if decode._fits(impl, form, CUDA)]

    assert fitting("dense") == ["sdpa", "sdpa-gqa", "flash", "cudnn", "flex"]
    assert fitting("fp8") == ["flex"] and "cuda" in fitting("graded") and "cuda" not in fitting("topk")


def test_a_backend_that_refuses_is_a_row_with_the_reason():
    refused, chosen = timed(impls=["cudnn", "sdpa-gqa"], forms=[])  # cuDNN runs on no CPU
    assert refused["error"].startswith("RuntimeError: No viable backend") and refused["median_ms"] is None
    assert chosen["speedup"] == 1.0


@needs_cxx
def test_the_kernel_and_fp8():
    rows = timed(impls=["cpp", "tiles"], forms=[("graded", 0.27), ("fp8", 0.5)])
    assert [(row["form"], row["impl"]) for row in rows] == [("graded", "cpp"), ("graded", "tiles"), ("fp8", "tiles")]
    # The kernel for AVX2 rounds queries and weights to two bytes.
    assert all(row["error"] < (3e-4 if row["impl"] == "cpp" else 1e-5) for row in rows)


def test_copies_together_do_not_fit_the_cache(monkeypatch):
    monkeypatch.setattr(common, "last_level_cache", lambda device: 2**20)
    step = decode.random_step(TINY, 1000, None)
    each = 2 * 2 * 1000 * 32 * 4
    assert 2 * 2**20 < len(step.copies) * each <= 2 * 2**20 + each
    assert len({k.data_ptr() for k, _ in step.copies}) == len(step.copies)


def test_a_graph_has_each_copy_equally_often_and_enough_calls():
    assert gpu.turns_of([*range(20)]) == [*range(20)]
    assert gpu.turns_of([0, 1, 2]) == [0, 1, 2] * 3
    assert gpu.turns_of([0]) == [0] * 8


class FakeEvent:
    """An event of a GPU that takes 1 ms for each replay, 5 ms for the first one measured."""

    clock = 0.0

    def __init__(self, **_):
        self.time = 0.0

    def record(self):
        self.time = FakeEvent.clock

    def elapsed_time(self, stop):
        return stop.time - self.time


class FakeGraph:
    replays = 0

    def replay(self):
        FakeEvent.clock += 5.0 if FakeGraph.replays == 0 else 1.0
        FakeGraph.replays += 1


@pytest.fixture
def fake_gpu(monkeypatch):
    names = {"Event": FakeEvent, "CUDAGraph": FakeGraph, "graph": lambda _: contextlib.nullcontext()}
    names |= {"synchronize": lambda *_: None, "current_stream": lambda: "mine", "set_stream": lambda stream: None}
    for name, fake in names.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(FakeGraph, "replays", 0)


def test_replays_give_the_time_of_a_call(fake_gpu):
    seen: list[int] = []
    times = gpu.replayed(seen.append, [0, 1, 2], repeats=4, seconds=1.0)
    assert seen == [0, 1, 2, *([0, 1, 2] * 3)]  # to warm up, and in the graph of 9 calls
    assert times == pytest.approx([1e-3 / 9] * 4)
    assert FakeGraph.replays == 5  # the first says how many there is time for
    assert len(gpu.replayed(seen.append, [0], repeats=99, seconds=0.0)) == 3
    assert common.summary(times)["median_ms"] == pytest.approx(1 / 9)


def test_a_capture_that_fails_gives_the_stream_back(fake_gpu, monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)

    def waits(i):
        if i == 1 or waits.calls:
            raise RuntimeError("operation not permitted when stream is capturing")
        waits.calls += 1

    waits.calls = 0
    with pytest.raises(RuntimeError, match="not permitted"):
        gpu.replayed(waits, [0], repeats=3, seconds=1.0)
    assert streams == ["mine"]


def test_launches_are_what_runs_on_the_gpu():
    def event(device, annotation=False):
        return SimpleNamespace(device_type=lambda: device, is_user_annotation=lambda: annotation)

    types = torch.autograd.DeviceType
    events = [event(types.CUDA)] * 6 + [event(types.CPU)] * 9 + [event(types.CUDA, annotation=True)]
    assert gpu.counted(events, 4) == 1.5
    assert gpu.counted(events[6:], 4) is None
    assert gpu.launches(torch.neg, [torch.ones(2)], CPU) is None
    assert gpu.host_us(torch.neg, [torch.ones(2)], CPU) > 0


def test_rows_of_a_gpu_name_the_card_and_the_bound(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    setup = dataclasses.replace(TINY, device=CUDA)
    row = setup.row("decode", "flash", ("dense", 1.0), 40) | setup.bound(3_000_000, 0.002, 3e12)
    assert list(row) == [*COLUMNS, *common.CUDA_COLUMNS]
    assert (row["card"], row["instruction_set"]) == ("a card", "sm_90")
    assert row["bound_ms"] == 0.001 and row["bandwidth_fraction"] == 0.5 and row["bytes"] == 3_000_000


def test_machine_and_versions():
    about = machine()
    assert about["cpu"] and about["cores"] >= 1 and about["os"]
    assert (about["gpu"] is None) == (not torch.cuda.is_available())
    assert versions()["torch"] == torch.__version__
    assert last_level_cache("cpu") >= 2**18
    json.dumps([about, versions()], allow_nan=False)


def test_peak_bytes_counts_what_lives_at_once():
    x = torch.zeros(2**16)

    def run():
        y = x
        for _ in range(3):
            y = x + 1  # the last one lives while this is made
        return y.sum()

    assert 2 * x.nbytes <= peak_bytes(run, CPU) < 2 * x.nbytes + 4096


def test_calls_take_their_inputs_in_turn():
    seen: list[int] = []
    times = time_calls(seen.append, [0, 1], CPU, repeats=4, seconds=1.0)
    assert len(times) == 4 and seen == [0, 1, 0, 1, 0, 1, 0]


def test_at_most_interrupts_and_cleans_up():
    with pytest.raises(TooLong, match="the nap took more than 0 s"), at_most(0.05, "the nap"):
        time.sleep(5)
    with at_most(0.05, "nothing"):
        pass
    time.sleep(0.1)


def test_at_most_in_another():
    with pytest.raises(TooLong, match="the night"), at_most(0.15, "the night"):
        with pytest.raises(TooLong, match="the nap"), at_most(0.05, "the nap"):
            time.sleep(5)
        time.sleep(5)
    with at_most(0.2, "the night"), at_most(0.1, "the nap"):
        pass
    time.sleep(0.25)


@pytest.mark.slow
def test_compiled_rows():
    rows = timed(impls=["flex", "compiled"])
    assert [row["impl"] for row in rows] == ["flex"] + ["compiled"] * len(FORMS)
    assert all(row["median_ms"] is not None and row["error"] < 1e-5 for row in rows)
