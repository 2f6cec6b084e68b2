"""swan in EleutherAI's lm-evaluation-harness: a model that scores and generates on a winnowed cache.

    python -m swan.evaluation.lm_eval --model swan --model_args pretrained=FOLDER,retention=0.33 --tasks ...

is the harness' own command with the model ``swan`` registered. Importing this module registers it for Python code.
"""

# Pyright need not find the harness, which is an extra.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swan.calibration import Calibration, calibrate
from swan.evaluation.sources import MODELS, calibration_text, load_model, model_folder, token_windows
from swan.integrations import attach
from swan.integrations.pretrained import from_pretrained, has_calibration
from swan.integrations.transformers import SwanCache, cache_keyword

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("this needs lm-evaluation-harness: pip install 'swan-attention[lm-eval]'") from error

__all__ = ["SwanLM"]

WINDOWS, WINDOW = 8, 1024  # of the calibration text, where there is no calibration


@register_model("swan")
class SwanLM(HFLM):
    """`HFLM` with a `SwanCache` in every forward.

    Log-likelihoods are scored in the windowed form, in which each token sees those older than its buffer as the cache
    holds them: what decoding token by token would give. (A plain forward never reads its cache.) Text is generated
    from a prompt taken in that form too.

    Args:
        pretrained: a model folder, one of `swan.save_pretrained` with its calibration, or an embedded model.
        retention: what history tokens are stored in, over their bf16 bytes; None for the dense cache of transformers.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.
        calibration: a file of `swan calibrate`; without one the folder's is taken, or the model is calibrated.
        dtype: of the weights.
        **kwargs: of `HFLM`.

    Source: Gao et al., lm-evaluation-harness.
    """

    def __init__(
        self,
        pretrained: str = "smollm2-135m",
        retention: float | None = 0.26,
        buffer: int = 128,
        sinks: int = 4,
        calibration: str | None = None,
        dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        weights: torch.dtype = getattr(torch, dtype)
        model, tokenizer = load_model(pretrained, dtype=weights)
        if retention not in (None, "none"):
            if calibration is not None:
                attach(model, Calibration.load(calibration))
            elif has_calibration(pretrained):
                model = from_pretrained(pretrained, dtype=weights)
            else:
                windows = token_windows(calibration_text(), tokenizer, WINDOWS, WINDOW)
                attach(model, calibrate(model, list(windows.split(1))))
        self._settings = {"buffer": int(buffer), "sinks": int(sinks), "prefill": "windowed"}
        self._retention = None if retention in (None, "none") else float(retention)
        super().__init__(pretrained=model, tokenizer=tokenizer, **kwargs)

    def _given(self) -> dict[str, Any]:
        """The cache of one batch, as an argument of the model."""
        if self._retention is None:
            return {}
        return {cache_keyword(self.model): SwanCache(self.model, retention=self._retention, **self._settings)}

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self.model(inps, **self._given()).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        return super()._model_generate(context, max_length, stop, **self._given(), **kwargs)


def main() -> None:
    """Run the harness' own command with ``swan`` among its models."""
    from lm_eval.__main__ import cli_evaluate

    named = [f"pretrained={name}" for name in MODELS]
    for index, argument in enumerate(sys.argv):  # tasks that size their prompts ask for a folder with the tokenizer
        for name in named:
            if name in argument.replace(" ", ",").split(","):
                folder = Path(model_folder(name.removeprefix("pretrained=")))
                sys.argv[index] = argument.replace(name, f"pretrained={folder}")
    cli_evaluate()


if __name__ == "__main__":
    main()
