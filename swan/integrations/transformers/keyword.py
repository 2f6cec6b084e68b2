"""The name under which models take a cache: ``past_key_values``, and ``cache`` from transformers 5.24 on."""

import inspect
from types import MethodType
from typing import Any, cast

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from swan.calibration.capture import unwrapped

__all__ = ["accept_cache", "cache_keyword"]


def cache_keyword(model: nn.Module) -> str:
    """Return the name under which this version of transformers takes a cache: ``past_key_values``, or ``cache``."""
    return "cache" if "cache" in inspect.signature(unwrapped(model).forward).parameters else "past_key_values"


def accept_cache(model: PreTrainedModel) -> list[RemovableHandle]:
    """Let a model of transformers before 5.24 take a cache under its later name too, ``cache``; return the hooks."""
    if cache_keyword(model) == "cache":
        return []
    vars(model)["generate"] = MethodType(_generate, model)
    modules = dict.fromkeys((model, cast(nn.Module, model.base_model)))
    return [module.register_forward_pre_hook(_with_old_name, with_kwargs=True) for module in modules]


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    _, kwargs = _with_old_name(model, args, kwargs)
    return cast(Any, type(model)).generate(model, *args, **kwargs)


_generate.__name__ = "generate"  # pickle looks a method up by its name


def _with_old_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if "cache" not in kwargs:
        return args, kwargs
    if kwargs.get("past_key_values") is not None:
        raise ValueError("give the cache as cache or as past_key_values, not as both")
    kwargs = dict(kwargs)
    kwargs["past_key_values"] = kwargs.pop("cache")
    return args, kwargs
