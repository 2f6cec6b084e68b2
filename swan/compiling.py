"""Marks of functions and tensors for torch.compile. None imports the compiler, which takes longer than all of swan."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["constant_result", "keep_in_place", "keep_in_place_if_compiling"]

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
