"""Blocks that an engine has for its memory, with swan and without, and what `swan capacity` says of them."""

import json

import pytest
import torch
from typer.testing import CliRunner

import swan
from swan.cli.app import app
from swan.integrations.vllm.capacity import packed_capacity
from swan.integrations.vllm.layer import slots_of
from tests.vllm.engine import run
from tests.vllm.served import Served, prompts

MEMORY, LENGTH, STEP = 2**28, 16384, 512
OPTIONS = {"max_model_len": LENGTH, "max_num_batched_tokens": STEP, "kv_cache_memory_bytes": MEMORY}
OPTIONS |= {"dtype": "bfloat16", "block_size": 128}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model with heads of 64 dimensions."""
    return Served(tmp_path_factory.mktemp("wide"), head_dim=64, num_hidden_layers=4)


def planned(model: Served, *options: str) -> list[dict]:
    """Rows of `swan capacity`."""
    asked = ["capacity", str(model.folder), "--memory", f"{MEMORY}B", "--length", str(LENGTH), "--json"]
    asked += ["--batched-tokens", str(STEP), "--calibration", str(model.calibration), *options]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


@pytest.mark.parametrize("retention", [0.3, 0.2])
def test_blocks(wide, retention):
    stock = run(wide.folder, [], **OPTIONS)
    packed = run(wide.folder, [], wide.settings(retention, buffer=128, sinks=1), **OPTIONS)
    dense, graded = planned(wide, "--retention", str(retention))
    for row, found in ((dense, stock), (graded, packed)):
        assert row["blocks"] == pytest.approx(found["blocks"], rel=0.02)
        assert row["reserved_requests"] == pytest.approx(found["concurrency"], rel=0.02)
    print(f"retention {retention}: {packed['blocks'] / stock['blocks']:.2f} times the blocks,", end=" ")
    print(f"{packed['concurrency'] / stock['concurrency']:.2f} times the requests of {LENGTH} tokens")
    assert packed["blocks"] >= 2.8 * stock["blocks"]
    assert packed["concurrency"] >= 2.75 * stock["concurrency"]  # one of four layers has a byte of padding
    assert graded["gain"] > packed["concurrency"] / stock["concurrency"]


def test_as_many_requests_run_at_once_as_are_planned(wide):
    """With blocks for just these none waits and none is thrown out: the window is charged as what it holds."""
    retention, length, requests = 0.3, 512, 12
    options = OPTIONS | {"max_model_len": length, "enable_prefix_caching": False}
    calibration = swan.Calibration.load(wide.calibration)
    plan = swan.Plan.for_retention(retention, calibration, sinks=1, by_head=False)  # as pages hold it
    numbers = {"kv_heads": 2, "batched_tokens": STEP}
    blocks = next(
        n for n in range(1, 999) if packed_capacity(plan, n * block_bytes(plan), length, **numbers).requests >= 12
    )
    job = {"prompts": prompts(*[length - 40] * requests), "tokens": 39}
    enough = run(
        wide.folder, [job], wide.settings(retention, buffer=128, sinks=1), num_gpu_blocks_override=blocks, **options
    )
    assert enough["preemptions"] == 0 and enough["most_running"] == requests
    # A fifth less is too little: so the plan is no mere guess on the safe side.
    scarce = run(
        wide.folder,
        [job],
        wide.settings(retention, buffer=128, sinks=1),
        num_gpu_blocks_override=int(0.8 * blocks),
        **options,
    )
    assert scarce["preemptions"] > 0 or scarce["most_running"] < requests


def block_bytes(plan: swan.Plan) -> int:
    return 128 * 2 * sum(slots_of(plan, 128, torch.bfloat16))


def test_layers_whose_plans_differ_waste_nothing(tmp_path):
    """Pages of layers with other bytes lie side by side."""
    model = Served(tmp_path, num_hidden_layers=3, head_dim=64)
    calibration = swan.Calibration.load(model.calibration)
    calibration.effects.keys[1] *= 30  # so that the layer in the middle gets more bytes
    calibration.effects.values[2] *= 10
    calibration.save(model.calibration)
    plan = swan.Plan.for_retention(0.3, calibration, by_head=False)
    assert len({sum(layer.nbytes(1)) for layer in plan.layers}) == 3
    found = run(model.folder, [], model.settings(0.3, buffer=128, sinks=1), **OPTIONS)
    _, graded = planned(model, "--retention", "0.3")
    assert graded["retention"] == pytest.approx(plan.retention)
    assert graded["blocks"] == pytest.approx(found["blocks"], rel=0.02)
    texts = [{"prompts": prompts(150, 300), "tokens": 10}] * 2
    options = {"enable_prefix_caching": False}
    whole = run(model.folder, texts, model.settings(0.3), **options)
    parts = run(model.folder, texts, model.settings(0.3), max_num_batched_tokens=64, **options)
    assert whole["jobs"][0]["tokens"] == parts["jobs"][1]["tokens"]
