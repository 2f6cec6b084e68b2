"""The trial of a model before it is attached: on a `SwanCache` it must compute what it computes on its own cache."""

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from swan.calibration.capture import attention_layers, device_of, evaluating
from swan.integrations.transformers.attention import Strayed
from swan.integrations.transformers.cache import SwanCache
from swan.integrations.transformers.keyword import cache_keyword

__all__ = ["Trial", "dense_trial", "reason_of", "try_cache"]

ENDS = (0, 5, 6)  # of the chunks of tokens
# Relative differences: more than rounding makes, and less than mistakes do. In 16 bits the roundings of all layers may
# add up to anything, so there it is looked at the first layer with a history alone.
OF_HIDDEN_STATES, OF_ATTENTION = 0.01, 0.2


@dataclass
class Trial:
    """The results of a model for a few tokens, in float32.

    Attributes:
        hidden_states: ``[1, tokens, width]``.
        attention: outputs of the attention modules by layer, likewise.
    """

    hidden_states: Tensor
    attention: dict[int, Tensor]


def dense_trial(model: PreTrainedModel) -> Trial | None:
    """Run a model on five tokens and one more with its own cache; None where it cannot run on token ids alone."""
    try:
        return _run(model, DynamicCache(config=model.config))
    except Exception:
        return None


def try_cache(model: PreTrainedModel, expected: Trial | None) -> None:
    """Run the same tokens on a `SwanCache`: an architecture may use it elsewhere than in its attention, or not at all.

    Raises:
        ValueError: something else comes out.
    """
    cache = SwanCache(model, retention=1.0, buffer=2, sinks=1)
    with warnings.catch_warnings():  # a cache of float32 that keeps everything is slow on a GPU; this one is short
        warnings.filterwarnings("ignore", "impl='cuda' attends to")
        found = _run(model, cache)
    unused = [index for index, kv in cache.winnowed.items() if kv.length != ENDS[-1]]
    if unused:
        raise ValueError(f"it does not use the cache in layers {unused}")
    if expected is None or found.hidden_states.is_meta:  # without numbers there is nothing to compare
        return
    first = min(cache.winnowed)
    wrong = _differences(found.attention[first], expected.attention[first]) > OF_ATTENTION
    if model.dtype == torch.float32 and not wrong.any():
        states = _differences(found.hidden_states, expected.hidden_states)
        # A mixture of experts may send one token of the first chunk elsewhere.
        wrong = torch.stack([states[:, : ENDS[1]].nanmedian(), states[0, -1]]) > OF_HIDDEN_STATES
    if wrong.any():
        raise ValueError("on a SwanCache that keeps everything it computes something else than on its own cache")


def _differences(found: Tensor, expected: Tensor) -> Tensor:
    """Return the relative difference of each token."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def _run(model: PreTrainedModel, cache: Cache) -> Trial:
    """Run a model without its head on a few tokens, the last of them alone."""
    body = cast(nn.Module, model.base_model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = (torch.arange(1, ENDS[-1] + 1, device=device_of(model)) % vocabulary)[None]
    attention: dict[int, list[Tensor]] = {}

    def watch(index: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            attention.setdefault(index, []).append(out.float())

        return keep

    hooks = [layer.register_forward_hook(watch(index)) for index, layer in attention_layers(model).items()]
    try:
        with torch.no_grad(), evaluating(model):
            parts = [
                body(tokens[:, start:stop], **{cache_keyword(body): cache}, use_cache=True)[0].float()
                for start, stop in itertools.pairwise(ENDS)
            ]
    finally:
        for hook in hooks:
            hook.remove()
    return Trial(torch.cat(parts, dim=1), {index: torch.cat(outputs, dim=1) for index, outputs in attention.items()})


def reason_of(error: Exception) -> str:
    """Say in words of this library why a model cannot use a `SwanCache`."""
    if isinstance(error, Strayed):
        return "it computes with keys and values between its cache and its attention"
    if isinstance(error, ValueError):
        return str(error)
    return f"it does not run on a SwanCache ({type(error).__name__}: {error})"
