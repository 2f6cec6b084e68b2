"""`Plan`: what each layer of a cache stores."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swan.packed import Graded, Layout, PlanLayer, TopK

if TYPE_CHECKING:
    from swan.calibration.artifact import Calibration

__all__ = ["Plan"]

Groups = tuple[tuple[int, int], ...]

# What we advise, from few bytes to many: groups (sixteenths of d, bits) of keys and of values. Chosen on calibration
# text of SmolLM2 by the KL that a layout of keys alone, and one of values alone, adds: the frontier of their sums.
LADDER: tuple[tuple[Groups, Groups], ...] = (
    (((4, 3), (4, 2), (8, 1)), ((4, 2), (12, 1))),  # at d = 64: retention 0.11
    (((2, 5), (6, 3), (8, 1)), ((8, 2), (8, 1))),
    (((2, 5), (6, 3), (8, 1)), ((16, 2),)),  # 0.15
    (((2, 6), (6, 3), (8, 1)), ((2, 3), (14, 2))),
    (((2, 6), (6, 3), (8, 2)), ((2, 3), (14, 2))),
    (((2, 6), (6, 3), (8, 2)), ((8, 3), (8, 2))),
    (((2, 6), (6, 4), (8, 2)), ((8, 3), (8, 2))),  # 0.20
    (((2, 6), (6, 4), (8, 2)), ((16, 3),)),
    (((2, 6), (6, 4), (8, 3)), ((16, 3),)),
    (((2, 8), (6, 5), (8, 3)), ((16, 3),)),  # 0.25
    (((2, 8), (6, 5), (8, 3)), ((4, 4), (12, 3))),
    (((2, 8), (6, 5), (8, 3)), ((8, 4), (8, 3))),
    (((2, 8), (6, 5), (8, 3)), ((16, 4),)),
    (((2, 8), (6, 5), (8, 4)), ((4, 5), (12, 4))),
    (((4, 8), (12, 5)), ((4, 5), (12, 4))),  # 0.33
    (((4, 8), (12, 5)), ((16, 5),)),
    (((4, 8), (12, 6)), ((16, 6),)),  # 0.40
    (((16, 8),), ((16, 6),)),
    (((16, 8),), ((12, 8), (4, 6))),  # 0.50
    (((16, 8),), ((16, 8),)),
)


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
        PlanLayer(keys=Graded(groups=((16, 8), (48, 5))), values=Graded(groups=((16, 5), (48, 4))))
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

        Below 1: `Graded` groups of the sorted basis, more bits for leading coordinates and for keys. At 1:
        everything in the dtype of the cache.

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
        return cls(tuple(_advised_layer(retention, d, dv) for d, dv in dims), buffer=buffer, sinks=sinks)

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


def _advised_layer(retention: float, d: int, dv: int) -> PlanLayer:
    """The highest step of the ladder in the bytes of `retention`."""
    if retention == 1:
        return PlanLayer(Graded(((d, 16),)), Graded(((dv, 16),)))
    room = 2 * (d + dv) * retention + 1e-9
    steps = [PlanLayer(_graded(d, keys), _graded(dv, values)) for keys, values in LADDER]
    sizes = [step.keys.vector_bytes() + step.values.vector_bytes() for step in steps]
    fitting = [step for step, size in zip(steps, sizes, strict=True) if size <= room]
    if not fitting:
        least = math.ceil(min(sizes) / (2 * (d + dv)) * 1e4) / 1e4  # rounded up, so that it can be asked for
        raise ValueError(
            f"no plan fits in retention {retention:.3g} at head dimensions {d} and {dv}; the least is {least}"
        )
    return fitting[-1]


def _graded(d: int, groups: Groups) -> Graded:
    """Groups of sixteenths of `d`, rounded; a group that rounds to nothing is left out."""
    stops = [round(d * sum(size for size, _ in groups[:i]) / 16) for i in range(len(groups) + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(stops)]
    return Graded(tuple((size, bits) for size, (_, bits) in zip(sizes, groups, strict=True) if size))


def _entry(layout: Layout) -> dict[str, Any]:
    return {"form": "topk" if isinstance(layout, TopK) else "graded", **dataclasses.asdict(layout)}


def _layout(entry: dict[str, Any]) -> Layout:
    settings = {name: value for name, value in entry.items() if name != "form"}
    return {"topk": TopK, "graded": Graded}[entry["form"]](**settings)
