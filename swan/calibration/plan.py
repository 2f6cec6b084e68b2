"""`Plan`: what each layer of a cache stores."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swan.packed import Graded, Layout, PlanLayer, TopK

if TYPE_CHECKING:
    from swan.calibration.artifact import Calibration

__all__ = ["Plan"]

KEY_SHARE = 1 / 8  # keys keep this share of d more coordinates than values: they are more sensitive


@dataclass(frozen=True)
class Plan:
    """For each layer the layouts of keys and values; one buffer and one number of sinks.

    Args:
        layers: one `PlanLayer` per layer; None keeps no history in that layer (a sliding window).
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.

    Example:
        >>> plan = Plan.for_retention(0.33, dims=[(64, 64)] * 2)
        >>> plan.layers[0]
        PlanLayer(keys=TopK(d=64, keep=36, bits=8, positions='bitmap'), \
values=TopK(d=64, keep=28, bits=8, positions='bitmap'))
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    layers: tuple[PlanLayer | None, ...]
    buffer: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.buffer < 1 or self.sinks < 0:
            raise ValueError(f"a plan needs buffer >= 1 and sinks >= 0, got {self.buffer} and {self.sinks}")

    @classmethod
    def for_retention(
        cls,
        retention: float,
        calibration: "Calibration | None" = None,
        *,
        dims: Sequence[tuple[int, int]] | None = None,
        buffer: int = 128,
        sinks: int = 4,
    ) -> "Plan":
        """The plan we advise at a retention; never stores more, and is monotone in it.

        Below 1: top-k with int8 values and bitmaps, keys keeping an eighth of ``d`` more
        coordinates than values. At 1: everything in the dtype of the cache.

        Args:
            retention: bytes per history token over the bf16 bytes of the same key and value, up to 1.
            calibration: gives the head dimensions.
            dims: head dimensions of keys and values of each layer, where there is no calibration.
            buffer: recent tokens kept dense.
            sinks: first tokens kept dense.

        Returns:
            The plan.

        Raises:
            ValueError: the retention is out of range or too small for any plan, or neither
                `calibration` nor `dims` is given.
        """
        if calibration is not None:
            dims = calibration.dims
        if dims is None:
            raise ValueError("give a calibration, or dims=[(key_dim, value_dim), ...] with one entry per layer")
        if not 0 < retention <= 1:
            raise ValueError(f"retention must be above 0 and at most 1, got {retention}")
        return cls(tuple(_topk_layer(retention, d, dv) for d, dv in dims), buffer=buffer, sinks=sinks)

    @property
    def retention(self) -> float:
        """Bytes per history token over the bf16 bytes of the same keys and values, all layers."""
        layers = [layer for layer in self.layers if layer is not None]
        if not layers:
            return 0.0
        weights = [layer.keys.d + layer.values.d for layer in layers]
        return sum(layer.retention * w for layer, w in zip(layers, weights, strict=True)) / sum(weights)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it."""
        layers = [None if p is None else {"keys": _entry(p.keys), "values": _entry(p.values)} for p in self.layers]
        return json.dumps({"buffer": self.buffer, "sinks": self.sinks, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """A plan from the JSON text of `to_json`.

        Raises:
            ValueError: the text is not such a plan.
        """
        try:
            data = json.loads(text)
            layers = [
                None if p is None else PlanLayer(_layout(p["keys"]), _layout(p["values"])) for p in data["layers"]
            ]
            return cls(tuple(layers), buffer=data["buffer"], sinks=data["sinks"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not the JSON of a plan ({error!r}); write one with Plan.to_json") from error


def _topk_layer(retention: float, d: int, dv: int) -> PlanLayer:
    """The most coordinates in the bytes of `retention`, keys ahead of values by a share of ``d``."""
    if retention == 1:
        return PlanLayer(Graded(((d, 16),)), Graded(((dv, 16),)))
    room = math.floor(retention * 2 * (d + dv) + 1e-9)
    lead = round(KEY_SHARE * d)
    for total in range(d + dv, 1, -1):
        keep = min(max((total + lead) // 2, total - dv), total - 1, d)
        layer = PlanLayer(TopK(d, keep), TopK(dv, total - keep))
        if layer.keys.vector_bytes() + layer.values.vector_bytes() <= room:
            return layer
    least = math.ceil(1000 * PlanLayer(TopK(d, 1), TopK(dv, 1)).retention) / 1000
    raise ValueError(f"no plan fits in retention {retention:.3g} at head dimension {d}; the least is {least}")


def _entry(layout: Layout) -> dict[str, Any]:
    return {"form": "topk" if isinstance(layout, TopK) else "graded", **dataclasses.asdict(layout)}


def _layout(entry: dict[str, Any]) -> Layout:
    settings = {name: value for name, value in entry.items() if name != "form"}
    return {"topk": TopK, "graded": Graded}[entry["form"]](**settings)
