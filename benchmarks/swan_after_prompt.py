"""swan under the protocol of kvpress_rival.py: a prompt is compressed, what follows is scored against the dense model.

    python benchmarks/swan_after_prompt.py smollm2-135m windows.pt --out result.json

The prompt, the first half of a window, goes in at once; the second half follows in chunks, in windowed form (the same
as token by token). Unlike a press, swan goes on to pack the tokens after the prompt as they leave its buffer.
`share_at_prompt` and `share_at_end` are the bytes held after the prompt and at the end over those of a dense cache, by
count: buffer and sinks dense, the rest at the share of the plan. Presses were given the same shares of the prompt.
Where these are small, plans with a buffer of 16 tokens, and plans of more bytes for fewer tokens are scored, too.
"""

import argparse
import contextlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swan import Calibration, Plan
from swan.cli.common import envelope
from swan.evaluation.calibrations import calibration_of
from swan.evaluation.frontier import KEPT, fewer_tokens
from swan.evaluation.models import load_model
from swan.integrations import attached
from swan.integrations.transformers import SwanCache, cache_keyword

SINKS, CHUNK = 4, 64
BUFFER, SMALL_BUFFER = 64, 16
SHARES = (0.5, 0.26, 0.15, 0.1)  # of the prompt's bytes


def plans_at(share: float, half: int, calibration: Calibration) -> list[Plan]:
    """The plans that hold a share of a prompt's bytes: the default one, if there is one, and others if it is small."""
    plans = []
    for buffer in (BUFFER, SMALL_BUFFER) if share < KEPT else (BUFFER,):
        recent: Any = {"buffer": buffer, "sinks": SINKS}
        dense = buffer + SINKS
        left = (share * half - dense) / (half - dense)
        with contextlib.suppress(ValueError):
            plans.append(Plan.for_retention(left, calibration, **recent))
        if share < KEPT:
            plans.append(fewer_tokens(left, calibration, **recent))
    return plans


def scored(model: Any, window: Tensor, plan: Plan) -> Tensor:
    """Log-probabilities of what follows the second half's tokens but the last."""
    half, cache = window.shape[1] // 2, SwanCache(model, plan, prefill="chunk")
    keyword = cache_keyword(model)
    model(window[:, :half], logits_to_keep=1, **{keyword: cache})
    for kv in cache.winnowed.values():
        kv.prefill = "windowed"
    parts = window[:, half:-1].split(CHUNK, dim=1)
    return torch.cat([model(part, **{keyword: cache}).logits[0] for part in parts]).log_softmax(-1)


def row_of(plan: Plan, half: int, differences: Sequence[float], kl: Sequence[float], agreement: Sequence[float]) -> Any:
    ratio, count = math.exp(statistics.fmean(differences)), len(kl)
    dense = plan.buffer + plan.sinks
    return {
        "form": "swan",
        "retention": plan.share,
        "buffer": plan.buffer,
        "keep": plan.keep,
        "kl": statistics.fmean(kl),
        "kl_error": statistics.stdev(kl) / math.sqrt(count),
        "perplexity_increase": ratio - 1,
        "standard_error": ratio * statistics.stdev(differences) / math.sqrt(count),
        "agreement": statistics.fmean(agreement),
        "share_at_prompt": (dense + (half - dense) * plan.share) / half,
        "share_at_end": (dense + (2 * half - 1 - dense) * plan.share) / (2 * half - 1),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("windows", type=Path, help="token ids [windows, tokens], saved by torch.save")
    parser.add_argument("--share", type=float, nargs="*", default=SHARES)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    windows = torch.load(arguments.windows, weights_only=True)
    half = windows.shape[1] // 2
    model, tokenizer = load_model(arguments.model)
    calibration = calibration_of(arguments.model, model, tokenizer)
    plans = [plan for share in arguments.share for plan in plans_at(share, half, calibration)]
    scores: list[list[tuple[float, float, float]]] = [[] for _ in plans]
    for window in windows.split(1):
        targets = window[0, half + 1 :, None]
        dense = model(window[:, :-1], use_cache=False, logits_to_keep=half - 1).logits[0].log_softmax(-1)
        with attached(model, calibration):
            for plan, rows in zip(plans, scores, strict=True):
                log_p = scored(model, window, plan)
                difference = (dense - log_p).gather(-1, targets).double().mean().item()
                kl = torch.linalg.vecdot(dense.exp(), dense - log_p).double().mean().item()
                rows.append((difference, kl, (log_p.argmax(-1) == dense.argmax(-1)).double().mean().item()))
        print(f"{len(scores[0])} of {len(windows)} windows", flush=True)
    settings = {"model": arguments.model, "windows": len(windows), "prompt": half, "sinks": SINKS, "dtype": "float32"}
    rows = [row_of(plan, half, *zip(*found, strict=True)) for plan, found in zip(plans, scores, strict=True)]
    arguments.out.write_text(json.dumps(envelope(settings, rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
