"""`Attachment`: what `attach` leaves in a model, and who asks for it."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swan.calibration import Calibration, Plan
from swan.calibration.capture import unwrapped

__all__ = ["Attachment", "attachment_of", "head_shape", "is_attached", "query_group"]


@dataclass
class Attachment:
    """The data of an attached model: its calibration and plan for caches, and its former state for `detach`."""

    calibration: Calibration
    bases: str  # a digest of its bases: caches belong to them
    implementation: str  # the model's own attention implementation
    folded: list[tuple[nn.Parameter, Tensor]]  # parameters that were folded, and their original values
    plan: Plan | None = None  # for caches that are made without a plan
    hooks: list[RemovableHandle] = dataclasses.field(default_factory=list)


def is_attached(model: nn.Module) -> bool:
    """Tell whether `attach` was called on this model."""
    return isinstance(getattr(unwrapped(model), "_swan_attachment", None), Attachment)


def attachment_of(model: nn.Module) -> Attachment:
    """Return the data that `attach` left in a model.

    Raises:
        ValueError: it is not attached.
    """
    attachment = getattr(unwrapped(model), "_swan_attachment", None)
    if not isinstance(attachment, Attachment):
        raise ValueError("this model is not attached; call swan.attach(model, calibration) first")
    return attachment


def query_group(attention: nn.Module) -> int:
    """Return the query heads for each KV head, as transformers' own attention functions find them."""
    return int(getattr(attention, "num_key_value_groups", 1))


def head_shape(attention: nn.Module) -> tuple[int, int, int]:
    """Return the KV heads, and the dimensions of keys and of values, of an attached layer."""
    key_basis, value_basis = attention.swan_key_basis, attention.swan_value_basis
    head_dim = getattr(attention, "head_dim", None)
    assert isinstance(key_basis, Tensor)
    dv = value_basis.shape[-1] if isinstance(value_basis, Tensor) else head_dim or key_basis.shape[-1]
    return key_basis.shape[0], key_basis.shape[-1], dv
