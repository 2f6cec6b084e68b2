"""The trial of a model before it is attached: on a `SwanCache` it must compute what it computes on its own cache."""

import itertools
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from swan.calibration.capture import device_of, evaluating
from swan.integrations.transformers.attention import Strayed
from swan.integrations.transformers.cache import SwanCache
from swan.integrations.transformers.keyword import cache_keyword

__all__ = ["hidden_states_of_trial", "reason_of", "try_cache"]

ENDS = (0, 5, 6)  # of the chunks of tokens
DIFFERENCE = 0.01, 0.2  # relative, of float32 and of other dtypes: less than any mistake makes, more than rounding does


def hidden_states_of_trial(model: PreTrainedModel) -> Tensor | None:
    """Run a model on five tokens and one more with its own cache; None where it cannot."""
    try:
        return _hidden_states(model, DynamicCache(config=model.config))
    except Exception:
        return None  # what comes next says why, or it is a model that only swan's cache serves


def try_cache(model: PreTrainedModel, expected: Tensor | None) -> None:
    """Run the tokens of `_trial` on a cache: an architecture may use it elsewhere than in its attention, or not at all.

    Raises:
        ValueError: something else comes out.
    """
    cache = SwanCache(model, retention=1.0, buffer=2, sinks=1)
    found = _hidden_states(model, cache)
    unused = [index for index, kv in cache.winnowed.items() if kv.length != ENDS[-1]]
    if unused:
        raise ValueError(f"it does not use the cache in layers {unused}")
    if expected is None or found.is_meta:  # without numbers there is nothing to compare
        return
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    error = errors.nanmedian().item()  # of a mixture of experts one token may go to another
    if error > DIFFERENCE[model.dtype != torch.float32]:
        raise ValueError(f"on a SwanCache that keeps everything its hidden states differ by {error:.0%}")


def _hidden_states(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Run a model without its head on a few tokens, the last of them alone."""
    body = cast(nn.Module, model.base_model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = (torch.arange(1, ENDS[-1] + 1, device=device_of(model)) % vocabulary)[None]
    with torch.no_grad(), evaluating(model):
        parts = [
            body(tokens[:, start:stop], **{cache_keyword(body): cache}, use_cache=True)[0]
            for start, stop in itertools.pairwise(ENDS)
        ]
    return torch.cat(parts, dim=1).float()


def reason_of(error: Exception) -> str:
    """Say in words of this library why a model cannot use a `SwanCache`."""
    if isinstance(error, Strayed):
        return "it computes with keys and values between its cache and its attention"
    if isinstance(error, ValueError):
        return str(error)
    return f"it does not run on a SwanCache ({type(error).__name__}: {error})"
