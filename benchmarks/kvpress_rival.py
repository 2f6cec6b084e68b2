"""NVIDIA kvpress on the windows of swan's evaluation: KL, perplexity and agreement of evicted caches.

It imports no swan, because kvpress 0.5 needs transformers < 5.3 and swan a newer one. The windows come from swan:

    windows = torch.cat([token_windows(evaluation_text(name), tokenizer, 4, 2048) for name in ("qasper", "squad")])
    torch.save(windows, "windows.pt")  # swan.evaluation.texts; the folder of the model: swan.evaluation.models

and the numbers from an environment of their own:

    pip install kvpress==0.5.5
    python benchmarks/kvpress_rival.py MODEL_FOLDER windows.pt --out result.json

The first half of a window is the prompt. It is prefilled under a press, which evicts its keys and values once it has
been read in full; the second half follows by teacher forcing, in one forward on what is left, at the positions that
it has in the window, and is never evicted. Its next-token predictions are compared with those of the dense model:
`kl` is KL(dense || evicted) per token in nats, `perplexity_increase` relative to the dense model on the same tokens,
`agreement` the share of tokens with the same most likely next token. Errors are those of the mean, over windows.

Two checks come first. A press that evicts nothing must give the logits of the dense model. StreamingLLM must give
those of one dense forward whose mask hides the tokens that it evicts: so positions and masks are right once the cache
is shorter than the text.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

PRESSES: tuple[type[ScorerPress], ...] = (
    SnapKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    StreamingLLMPress,
)
KEPT = (0.5, 0.26, 0.15, 0.1)  # share of the prompt's tokens
TOLERANCE = 1e-3  # of a logit, in float32


@dataclass
class Scores:
    """Means over the tokens of each window."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    tokens: int = 0  # of the prompt that are kept

    def add(self, log_p: Tensor, dense: Tensor, targets: Tensor) -> None:
        """Add a window: log-probabilities [tokens, vocabulary], and those of the dense model."""
        self.nll.append(-log_p.gather(-1, targets[:, None]).double().mean().item())
        self.kl.append(torch.linalg.vecdot(dense.exp(), dense - log_p).double().mean().item())
        self.agreement.append((log_p.argmax(-1) == dense.argmax(-1)).double().mean().item())

    def row(self, press: str, kept: float, dense: "Scores") -> dict[str, Any]:
        """Return the row of the result."""
        differences = [a - b for a, b in zip(self.nll, dense.nll, strict=True)]
        ratio = math.exp(statistics.fmean(differences))
        return {
            "press": press,
            "kept": kept,
            "kept_tokens": self.tokens,
            "kl": statistics.fmean(self.kl),
            "kl_error": standard_error(self.kl),
            "perplexity": math.exp(statistics.fmean(self.nll)),
            "perplexity_increase": ratio - 1,
            "standard_error": ratio * standard_error(differences),
            "agreement": statistics.fmean(self.agreement),
        }


def standard_error(values: Sequence[float]) -> float:
    """Compute the standard error of the mean; needs two values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def dense_logits(model: PreTrainedModel, window: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [half - 1, vocabulary] for all but the first token of the second half, in one forward without a cache."""
    half = window.shape[1] // 2
    return model(window[:, :-1], attention_mask=mask, use_cache=False, logits_to_keep=half - 1).logits[0]


def pressed_logits(model: PreTrainedModel, window: Tensor, press: ScorerPress) -> tuple[Tensor, int]:
    """The same on the cache that a press leaves of the first half, and the tokens in it."""
    half = window.shape[1] // 2
    cache = DynamicCache(config=model.config)
    with press(model):
        model(window[:, :half], past_key_values=cache, logits_to_keep=1)
    kept = cache.get_seq_length()
    # transformers makes its mask from cache_position, which must go on at the length of the cache, as it does by
    # itself: any later and the tokens would see those that follow them. Rotations go by position_ids.
    positions = torch.arange(half, window.shape[1] - 1)[None]
    return model(window[:, half:-1], past_key_values=cache, position_ids=positions).logits[0], kept


def check(model: PreTrainedModel, window: Tensor) -> dict[str, float]:
    """Largest errors of a logit where it is known what a press must give.

    Raises:
        RuntimeError: one is larger than the tolerance.
    """
    tokens, half = window.shape[1] - 1, window.shape[1] // 2
    press = StreamingLLMPress(compression_ratio=1 - min(KEPT))
    evicted, kept = pressed_logits(model, window, press)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    mask[..., half:, press.n_sink : press.n_sink + half - kept] = False
    nothing, _ = pressed_logits(model, window, KnormPress(compression_ratio=0.0))
    errors = {
        "nothing evicted": (nothing - dense_logits(model, window)).abs().max().item(),
        "StreamingLLM as a mask": (evicted - dense_logits(model, window, mask)).abs().max().item(),
    }
    if max(errors.values()) > TOLERANCE:
        raise RuntimeError(f"expected errors of a logit below {TOLERANCE}, got {errors}")
    return errors


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder written by save_pretrained")
    parser.add_argument("windows", type=Path, help="token ids [windows, tokens], written by torch.save")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    windows = torch.load(args.windows, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()

    checks = check(model, windows[:1])
    print(f"largest errors of a logit: {checks}", flush=True)
    dense = Scores()
    scores = {(press, kept): Scores() for press in PRESSES for kept in KEPT}
    for number, window in enumerate(windows.split(1), 1):
        targets = window[0, window.shape[1] // 2 + 1 :]
        reference = dense_logits(model, window).log_softmax(-1)
        dense.add(reference, reference, targets)
        for (press, kept), score in scores.items():
            logits, score.tokens = pressed_logits(model, window, press(compression_ratio=1 - kept))
            score.add(logits.log_softmax(-1), reference, targets)
        print(f"window {number} of {len(windows)}", file=sys.stderr, flush=True)

    rows = [score.row(press.__name__, kept, dense) for (press, kept), score in scores.items()]
    packages = ("torch", "transformers", "kvpress")
    result = {
        "command": f"benchmarks/kvpress_rival.py {args.model.name} {args.windows.name} --threads {args.threads}",
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "machine": {"machine": platform.machine(), "cores": os.cpu_count()},
        "settings": {
            "model": args.model.name,
            "windows": len(windows),
            "length": windows.shape[1],
            "prompt": windows.shape[1] // 2,
            "dtype": "float32",
            "dense_perplexity": math.exp(statistics.fmean(dense.nll)),
            "checks": checks,
        },
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(
            "{press:22} {kept:4} {kept_tokens:4}  KL {kl:.4f} ± {kl_error:.4f}  perplexity {perplexity_increase:+8.2%} "
            "± {standard_error:.2%}  agreement {agreement:.1%}".format(**row)
        )


if __name__ == "__main__":
    main()
