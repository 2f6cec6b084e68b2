"""Tensor parallelism of transformers: each process has some of the heads, their bases and their part of the cache.

Run as a script, this file is one of the processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import swan
from tests.tiny import OLD, attached, logits_of, tiny, tokens

TEXT = {"input_ids": tokens(1, 60)}
STORED = {"retention": 0.4, "buffer": 8, "sinks": 2}


def worker(folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    results = {}
    try:
        swan.calibrate(model, [TEXT["input_ids"]], progress=False)
    except ValueError as error:
        results["calibrate"] = str(error)
    swan.attach(model, swan.Calibration.load(folder / "calibration.safetensors"))
    cache = swan.SwanCache(model, **STORED)
    results |= {"logits": logits_of(model, cache, **TEXT).tolist(), "nbytes": cache.nbytes}
    try:
        swan.detach(model)
        swan.attach(model, swan.Calibration.load(folder / "calibration.safetensors"), fold=True)
    except ValueError as error:
        results["fold"] = str(error)
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(OLD, reason="this version of transformers has no tp_size in DistributedConfig")
def test_two_processes_compute_what_one_does_on_half_of_the_cache_each(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = attached()
    model._swan_attachment.calibration.save(tmp_path / "calibration.safetensors")
    cache = swan.SwanCache(model, **STORED)
    expected = logits_of(model, cache, **TEXT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, __file__, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    nbytes = 0
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-4, rtol=1e-4)
        nbytes += found["nbytes"]
        assert "calibrate it in one process" in found["calibrate"]
        assert "fold=True needs a plain torch.nn.Linear" in found["fold"]
    assert nbytes == cache.nbytes


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
