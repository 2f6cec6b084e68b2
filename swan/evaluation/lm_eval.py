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

from swan.evaluation.calibrations import calibration_of
from swan.evaluation.machine import default_device
from swan.evaluation.models import MODELS, automatic_dtype, load_model, model_folder
from swan.integrations import attach
from swan.integrations.transformers import SwanCache, attachment_of, cache_keyword
from swan.integrations.transformers.pretrained import attach_saved, saved_calibration

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("this needs lm-evaluation-harness: pip install 'swan-attention[lm-eval]'") from error

__all__ = ["SwanLM"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
OF_LOADING = (
    "peft", "delta", "autogptq", "gptqmodel", "gguf_file", "parallelize", "revision", "subfolder", "trust_remote_code",
    "quantization_config",
)  # fmt: skip


@register_model("swan")
class SwanLM(HFLM):
    """`HFLM` with a `SwanCache` in every forward.

    Log-likelihoods are scored in the windowed form, in which each token sees those older than its buffer as the cache
    holds them: what decoding token by token would give. (A plain forward never reads its cache.) Text is generated
    from a prompt taken in that form too.

    Args:
        pretrained: a model folder, one of `swan.save_pretrained` with its calibration, or an embedded model.
        retention: what history tokens are stored in, over their bf16 bytes; by default the plan of the folder, or 0.26
            where it has none; ``"dense"`` for the dense cache of transformers.
        buffer: recent tokens kept dense (a plan of the folder has its own).
        sinks: first tokens kept dense (likewise).
        calibration: a file of `swan calibrate`; without one the folder's is taken, or the model is calibrated.
        dtype: of the weights: float32, bfloat16, float16, or auto: the model's own where the device multiplies it
            natively, else float32; a line on stderr says which and why.
        device: where to run; a GPU where there is one.
        **kwargs: of `HFLM`, but for those about loading the model.

    Raises:
        ValueError: an option that `SwanLM` does not honour, or a value that is none of the above.

    Source: Gao et al., lm-evaluation-harness.
    """

    def __init__(
        self,
        pretrained: str = "smollm2-135m",
        retention: float | str | None = None,
        buffer: int = 128,
        sinks: int = 4,
        calibration: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if refused := sorted(name for name in OF_LOADING if kwargs.get(name)):
            named = ", ".join(refused)
            raise ValueError(f"the model 'swan' does not take {named}; write such a model to a folder first")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self._dense = retention == "dense"
        wanted = None if retention is None or self._dense else float(retention)
        device = device or default_device().type
        if dtype == "auto":
            chosen, reason = automatic_dtype(pretrained, device)
            print(f"swan: dtype {reason}", file=sys.stderr)
        else:
            chosen = getattr(torch, dtype)
        model, tokenizer = load_model(pretrained, dtype=chosen, device=device)
        folder_knows = pretrained not in MODELS and saved_calibration(pretrained) is not None
        if not self._dense:
            if calibration is None and folder_knows:
                attach_saved(model, pretrained)
            else:
                path = Path(calibration) if calibration else None
                attach(model, calibration_of(pretrained, model, tokenizer, path=path))
        self._settings: dict[str, Any] = {"buffer": int(buffer), "sinks": int(sinks), "prefill": "windowed"}
        if wanted is not None or self._dense or attachment_of(model).plan is None:
            self._settings["retention"] = 0.26 if wanted is None else wanted
        super().__init__(pretrained=model, tokenizer=tokenizer, **kwargs)

    def _given(self) -> dict[str, Any]:
        """Make the cache of one batch, as an argument of the model."""
        return {} if self._dense else {cache_keyword(self.model): SwanCache(self.model, **self._settings)}

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            return self.model(inps, **self._given()).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        return super()._model_generate(context, max_length, stop, **self._given(), **kwargs)


def main() -> None:
    """Run the harness' own command with ``swan`` among its models."""
    from lm_eval.__main__ import cli_evaluate

    embedded = [f"pretrained={name}" for name in MODELS]
    for index, argument in enumerate(sys.argv):  # tasks that size their prompts ask for a folder with the tokenizer
        for name in embedded:
            if name in argument.replace(" ", ",").split(","):
                folder = Path(model_folder(name.removeprefix("pretrained=")))
                sys.argv[index] = argument.replace(name, f"pretrained={folder}")
    cli_evaluate()


if __name__ == "__main__":
    main()
