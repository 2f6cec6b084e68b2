"""The quantized caches of transformers, which run as they are."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from swan.calibration.bases import Basis

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["TransformersQuantized"]


@dataclass(frozen=True)
class TransformersQuantized:
    """`QuantizedCache` of transformers with one of its backends; scored in chunks, its dense tail 0 to 127 tokens.

    Its own form: no sinks, and the whole history is coded anew each time the tail is full.

    Args:
        backend: ``"quanto"`` or ``"hqq"``.
        bits: 2 or 4.

    Source: transformers, whose cache follows KIVI, arXiv:2402.02750.
    """

    backend: str
    bits: int
    group: int = field(default=64, init=False, repr=False)
    tail: int = field(default=128, init=False, repr=False)
    basis: Basis | None = field(default=None, init=False, repr=False)  # runs on the model as it is
    seed: int = field(default=0, init=False, repr=False)
    chunk: int = field(default=128, init=False, repr=False)

    @property
    def form(self) -> str:
        """Return the name of the backend."""
        return self.backend

    @property
    def retention(self) -> float:
        """Return the retention: codes, and a scale and an offset of 16 bits for every group."""
        return (self.bits + 32 / self.group) / 16

    def cache(self, model: "PreTrainedModel") -> "Cache":
        """Make a cache for a model that is not attached."""
        from transformers import QuantizedCache

        axis = 0 if self.backend == "quanto" else 1
        return QuantizedCache(
            self.backend, model.config, nbits=self.bits, axis_key=axis, axis_value=axis, q_group_size=self.group,
            residual_length=self.tail,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"bits": self.bits, "group": self.group, "buffer": self.tail // 2, "sinks": 0}
