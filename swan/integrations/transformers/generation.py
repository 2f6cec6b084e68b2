"""`generate` keeps to the `SwanCache` that it was given, also where a model's own preparation of inputs leaves it."""

import inspect
from types import MethodType
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from swan.integrations.transformers.cache import SwanCache
from swan.integrations.transformers.keyword import cache_keyword

__all__ = ["KeepsCache"]


class KeepsCache:
    """Stands for a model's `prepare_inputs_for_generation`, and sees that a `SwanCache` is not dropped there.

    Where LongRoPE changes its frequencies (Phi-3), transformers forgets the cache, reads the whole text again and goes
    on in a dense one. Here the same cache is emptied and takes the text in again.

    Args:
        model: an attached model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Prepare the inputs of a step as the model does."""
        inputs = self._prepare(input_ids, *args, **kwargs)
        name = cache_keyword(self.model)
        cache, ids = kwargs.get(name), inputs.get("input_ids")
        if isinstance(cache, SwanCache) and inputs.get(name) is not cache:
            if ids is None or ids.shape != input_ids.shape:
                raise ValueError(
                    f"{type(self.model).__name__} leaves the cache here without reading the whole text again, so a "
                    "SwanCache cannot go on; generate without it"
                )
            cache.reset()
            inputs[name] = cache
        return inputs

    @property
    def _prepare(self) -> Any:
        return MethodType(cast(Any, type(self.model)).prepare_inputs_for_generation, self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._prepare)
