"""Marks of functions and tensors for the modes in which torch runs them: compiled, in inference mode, under autocast.

None imports the compiler, which takes longer than all of swan.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = [
    "constant_result",
    "keep_in_place",
    "keep_in_place_if_compiling",
    "outside_autocast",
    "outside_inference_mode",
]

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(fn: F) -> F:
    """Mark a function to be called once while torch.compile traces: `torch.compiler.assume_constant_result`."""
    fn._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return fn


def keep_in_place(*tensors: Tensor) -> None:
    """Tell the compiler that these tensors stay where they are: CUDA graphs then need no copies of them."""
    if not torch.compiler.is_compiling():
        from torch._dynamo import mark_static_address

        for t in tensors:
            mark_static_address(t, guard=False)


def keep_in_place_if_compiling(tensor: Tensor) -> None:
    """Do as `keep_in_place` if the compiler is loaded; for `constant_result` functions, which eager code calls too."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.mark_static_address(tensor, guard=False)


def outside_inference_mode(fn: F) -> F:
    """Let a function make tensors that can be written to later in any mode, in whatever mode it is called.

    Tensors that are made under `torch.inference_mode` cannot be changed outside of it, nor be used where gradients are
    taken; a cache that is filled under it may be used outside. No gradients are recorded here.
    """

    @functools.wraps(fn)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return fn(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return fn(*args, **kwargs)

    return cast(F, outside)


def outside_autocast(fn: F) -> F:
    """Let a function compute in the dtypes of the tensors that it is given, under `torch.autocast`, too.

    Scores, merged outputs and mixed coordinates are products in float32, which autocast would round to 16 bits.
    """

    @functools.wraps(fn)
    def outside(*args: Any, **kwargs: Any) -> Any:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return outside(*args, **kwargs)
        return fn(*args, **kwargs)

    return cast(F, outside)
