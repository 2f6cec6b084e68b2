"""An engine of vLLM in a process of its own: it reads what to do from stdin as JSON, and prints what came as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from swan.integrations.vllm.plugin import CPU

ROOT = Path(__file__).parents[2]
SOURCES = Path(os.environ["SWAN_VLLM_SOURCES"]) if "SWAN_VLLM_SOURCES" in os.environ else None
MARK = "RESULT "  # vLLM prints, too
OPTIONS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 2**26,
    "block_size": 64,
    "disable_log_stats": False,
}


def environment(*, swan: bool, sources: Path | None = None) -> dict[str, str]:
    """Variables of a process that runs vLLM on a CPU without any network.

    Args:
        swan: with swan's attention, not its own.
        sources: a folder of `tests.vllm.newest`, with the Python code of another vLLM than the installed one.
    """
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    one_core = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    clean = {name: value for name, value in os.environ.items() if name != CPU}
    path = {"PYTHONPATH": os.pathsep.join(str(folder) for folder in (sources, ROOT) if folder)}
    return clean | quiet | one_core | one_process | path | ({CPU: "1"} if swan else {})


def run(
    model: Path, jobs: list[dict], swan: dict | None = None, *, sources: Path | None = SOURCES, **options: Any
) -> dict:
    """Start an engine, do jobs one after the other, and return what came.

    Args:
        model: folder of a model.
        jobs: each ``{"prompts": [token ids, ...], "tokens": how many to generate}``; prompts of a job run together.
        swan: settings of swan; None for vLLM's own attention.
        sources: as in `environment`; by default what the variable SWAN_VLLM_SOURCES says.
        options: of `vllm.LLM`.

    Raises:
        RuntimeError: the engine failed; the message is what it wrote.
    """
    settings = {"additional_config": {"swan": swan}} if swan is not None else {}
    asked = {"model": str(model), "jobs": jobs, "options": OPTIONS | settings | options}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(asked),
        env=environment(swan=swan is not None, sources=sources),
        capture_output=True,
        text=True,
        timeout=120,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not results:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(results[-1].removeprefix(MARK))


def main() -> None:
    import vllm
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    engine = LLM(asked["model"], **asked["options"])
    scheduler, step, running = engine.llm_engine.engine_core.engine_core.scheduler, engine.llm_engine.step, [0]

    def watched_step():
        outputs = step()
        running.append(len(scheduler.running))
        return outputs

    engine.llm_engine.step = watched_step
    jobs = []
    for job in asked["jobs"]:
        sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
        jobs.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
            }
        )
    cache = engine.llm_engine.vllm_config.cache_config
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    result = {
        "version": vllm.__version__,
        "jobs": jobs,
        "blocks": cache.num_gpu_blocks,
        "concurrency": cache.kv_cache_max_concurrency,
        "preemptions": counters["vllm:num_preemptions"],
        "most_running": max(running),
        "guessed": counters.get("vllm:spec_decode_num_draft_tokens"),
        "taken": counters.get("vllm:spec_decode_num_accepted_tokens"),
    }
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
