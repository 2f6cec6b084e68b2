"""Old names that still work for a while, with a warning. CONTRIBUTING.md has the policy, and an example of each use."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["renamed_arguments", "warn_renamed"]

F = TypeVar("F", bound=Callable[..., Any])
_warned: set[str] = set()


def warn_renamed(old: str, new: str, removal: str, stacklevel: int = 2) -> None:
    """Warn once, in eager code, that an old name goes in the version `removal`, and what is new instead."""
    if old not in _warned and not torch.compiler.is_compiling():
        _warned.add(old)
        warnings.warn(f"{old} goes in swan {removal}; use {new}", FutureWarning, stacklevel + 1)


def renamed_arguments(removal: str, **renamed: str) -> Callable[[F], F]:
    """Let a function take old names of its keyword arguments: ``@renamed_arguments("0.4", old="new")``."""

    def decorate(fn: F) -> F:
        @functools.wraps(fn)
        def renaming(*args: Any, **kwargs: Any) -> Any:
            for old in renamed.keys() & kwargs.keys():
                new = renamed[old]
                if new in kwargs:
                    raise TypeError(f"{fn.__qualname__} got {new} and {old}, its old name; give {new} only")
                warn_renamed(f"{old} of {fn.__qualname__}", new, removal, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return fn(*args, **kwargs)

        return renaming  # pyright: ignore[reportReturnType]

    return decorate
