"""Inputs of `calibrate`: what a batch is, how many tokens it has, and its beginning."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["beginning", "check_batch", "check_batches", "check_ids", "placed", "positions_of", "rows_of", "tokens_of"]

INPUTS = ("input_ids", "inputs_embeds")  # arguments of a transformers model that hold its text
POSITIONS = 8192  # that texts are spread over by default, at most
GOLDEN, ROOT = (5**0.5 - 1) / 2, 2**0.5  # multiples, without their whole part, are spread evenly, be they few or many
TOKENIZE = 'tokenizer(text, return_tensors="pt")'


def check_batches(batches: Any) -> None:
    """Raise a TypeError if these are not several batches."""
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be several, such as ids.split(1) or [batch, ...], got one {type(batches).__name__}; put it "
            "into a list"
        )


def check_batch(batch: Any, model: nn.Module | None) -> None:
    """Raise a TypeError or ValueError if this is no batch.

    Args:
        batch: an input of a model.
        model: the transformers model that it is for; None for a model of one's own, whose inputs may be any tensors.
    """
    if not isinstance(batch, Tensor | Mapping):
        raise TypeError(
            f"a batch is a tensor of token ids [rows, tokens], or what {TOKENIZE} gives, got {type(batch).__name__}"
        )
    named = _named(batch)
    if model is not None:
        given = [name for name in INPUTS if named.get(name) is not None]
        if not given:
            raise ValueError(f"a batch needs input_ids or inputs_embeds, got {', '.join(map(str, named)) or 'nothing'}")
        if not isinstance(named[given[0]], Tensor):
            got = type(named[given[0]]).__name__
            raise TypeError(f"{given[0]} must be a tensor, got {got}; a tokenizer gives one by {TOKENIZE}")
        if given[0] == "input_ids":
            check_ids(named["input_ids"], model)
    if any(t.numel() == 0 for t in named.values() if isinstance(t, Tensor)):
        raise ValueError("a batch holds no tokens; leave out empty texts")


def check_ids(ids: Any, model: nn.Module) -> None:
    """Raise a TypeError or ValueError if these are no token ids ``[rows, tokens]`` of a transformers model."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"token ids are a tensor [rows, tokens], such as of {TOKENIZE}, got {type(ids).__name__}")
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token ids are integers [rows, tokens], got {ids.dtype} {list(ids.shape)}")
    network = cast(Any, model)
    only_text = network.config.get_text_config(decoder=True) is network.config  # else ids may stand for images
    count = getattr(network.get_input_embeddings(), "num_embeddings", None) if only_text else None
    if ids.numel() and count is not None and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}, the model has {count}; is the tokenizer of "
            "another model?"
        )


def tokens_of(batch: Any) -> int:
    """Count the tokens in a row of a batch."""
    return _text(batch).shape[1]


def rows_of(batch: Any) -> int:
    """Count the rows of a batch."""
    return _text(batch).shape[0]


def beginning(batch: Any, tokens: int) -> Any:
    """Cut a batch to its first row and at most so many tokens; return the batch itself if that is all of it.

    One with other tensors than those of tokens, such as images, stays whole: which of them belong to the beginning is
    not known.
    """
    shape, named = _text(batch).shape[:2], _named(batch)
    if (shape[0] == 1 and shape[1] <= tokens) or _has_images(named, shape):
        return batch
    window = named | {name: t[_axes(t, shape, tokens)] for name, t in named.items() if isinstance(t, Tensor)}
    return window if isinstance(batch, Mapping) else window["input_ids"]


def positions_of(model: nn.Module) -> int:
    """Count the positions that a transformers model rotates keys by in the same way; 1 where texts stay where they are.

    That is, where it has no rotary embedding, takes no positions, or does not say how many it knows.
    """
    network = cast(Any, model)
    text = network.config.get_text_config(decoder=True)
    rotary = getattr(text, "rope_parameters", None)
    parts = (network, network.base_model)
    if not rotary or not all(map(_takes_positions, parts)):
        return 1
    kinds = [rotary] if "rope_type" in rotary else [kind for kind in rotary.values() if isinstance(kind, Mapping)]
    known = [getattr(text, "max_position_embeddings", None) or 1]
    # These rotate by other frequencies in texts of more tokens than they were first trained on.
    longer = (kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope"))
    known += [kind.get("original_max_position_embeddings") or known[0] for kind in longer]
    return min(known)


def _takes_positions(module: nn.Module) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def placed(batch: Any, number: int, positions: int) -> Any:
    """Let each row of a batch begin at a position of its own, spread over so many, half of them in the first quarter.

    One with positions stays as it is, and so does one with other tensors than those of tokens, such as images.

    Args:
        batch: a batch of a transformers model.
        number: batches before.
        positions: how many there are.
    """
    shape = rows, tokens = _text(batch).shape[:2]
    named = _named(batch)
    if positions <= tokens or named.get("position_ids") is not None or _has_images(named, shape):
        return batch
    firsts = [int(((number * GOLDEN + row * ROOT) % 1) ** 2 * (positions - tokens)) for row in range(rows)]
    return named | {"position_ids": torch.tensor(firsts, device="cpu")[:, None] + torch.arange(tokens, device="cpu")}


def _has_images(named: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Tell if there are other tensors than those of tokens."""
    return any(_axes(t, shape) is None for t in named.values() if isinstance(t, Tensor))


def _axes(t: Tensor, shape: tuple[int, ...], tokens: int = 0) -> tuple[slice, ...] | None:
    """Index the beginning of a tensor: of tokens, or a mask of four axes; None for any other."""
    if t.shape[:2] == shape:
        return slice(0, 1), slice(0, tokens)
    if t.ndim == 4 and t.shape[0] in (1, shape[0]) and tuple(t.shape[2:]) == (shape[1], shape[1]):
        return slice(0, 1), slice(None), slice(0, tokens), slice(0, tokens)
    return None


def _named(batch: Any) -> dict[str, Any]:
    return dict(cast("Mapping[str, Any]", batch)) if isinstance(batch, Mapping) else {"input_ids": batch}


def _text(batch: Any) -> Tensor:
    named = _named(batch)
    first = next((named[name] for name in INPUTS if named.get(name) is not None), None)
    return next(t for t in named.values() if isinstance(t, Tensor)) if first is None else first
