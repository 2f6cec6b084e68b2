"""`Plan`: the layouts of each layer of a cache."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from swan.calibration.effects import KEYS, VALUES, Effects, Groups, graded
from swan.calibration.files import parse_json, reason_of
from swan.calibration.json_layouts import fields_of, layer_from_json, to_json
from swan.modules import KVCache
from swan.modules.cache import Prefill
from swan.modules.checks import check_keep
from swan.storage import ByHead, Graded, LayerPlan, Layout
from swan.storage.by_head import by_head as by_head_layout

if TYPE_CHECKING:
    from swan.calibration.artifact import Calibration

__all__ = ["Plan"]

# Without measured effects, from few bytes to many: groups (sixteenths of d, bits) of keys and of values. Chosen on
# calibration text of SmolLM2 by the KL that a layout of keys alone, and one of values alone, adds: the frontier of
# their sums; of those with 8 bits for the leading keys, without which models whose keys have outliers fall apart.
LADDER: tuple[tuple[Groups, Groups], ...] = (
    (((2, 8), (6, 3), (8, 1)), ((8, 2), (8, 1))),  # at d = 64: retention 0.18
    (((2, 8), (6, 4), (8, 2)), ((8, 2), (8, 1))),
    (((2, 8), (6, 4), (8, 2)), ((16, 2),)),  # 0.20
    (((2, 8), (6, 4), (8, 2)), ((8, 3), (8, 2))),
    (((2, 8), (6, 4), (8, 2)), ((16, 3),)),
    (((2, 8), (6, 5), (8, 3)), ((16, 3),)),  # 0.27
    (((2, 8), (6, 5), (8, 3)), ((4, 4), (12, 3))),
    (((2, 8), (6, 5), (8, 3)), ((8, 4), (8, 3))),
    (((2, 8), (6, 5), (8, 3)), ((16, 4),)),
    (((2, 8), (6, 5), (8, 4)), ((16, 4),)),
    (((2, 8), (6, 5), (8, 4)), ((4, 5), (12, 4))),
    (((4, 8), (12, 5)), ((4, 5), (12, 4))),  # 0.33
    (((4, 8), (12, 5)), ((16, 5),)),
    (((4, 8), (12, 6)), ((16, 6),)),  # 0.40
    (((16, 8),), ((16, 6),)),
    (((16, 8),), ((12, 8), (4, 6))),  # 0.50
    (((16, 8),), ((16, 8),)),
)

LOW_LEVELS = (0.15, 0.125, 0.1)  # of a byte budget, below the ladder; past the last, fewer tokens do better
RUNS = 3  # of neighbouring KV heads in a layer that have a layout of their own
FORMAT = "swan-plan-1"
MOST_TOKENS = 2**31  # of a buffer or of sinks that are read
ROUNDING = 1e-9  # retentions are quotients, equal only up to the rounding of floats

Dims = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    r"""For each layer the layouts of keys and values; one buffer and one number of sinks.

    Its `retention` is $\sum_l \text{bytes}_l \big/ \sum_l 2\,(d_{k,l} + d_{v,l})$ over the layers with a history: bytes
    stored of a token over its bfloat16 bytes.

    Args:
        layers: one `LayerPlan` per layer; None keeps no history in that layer (a sliding window).
        buffer: newest tokens kept dense.
        sinks: first tokens kept dense.
        keep: share of the history's tokens that stay, chosen by the attention that they draw, as `KVCache` says; None
            for all.

    Raises:
        TypeError: a layer is no `LayerPlan`, or `buffer` or `sinks` no whole number.
        ValueError: `buffer` below 1, `sinks` below 0, or `keep` not above 0 and at most 1.

    Example:
        >>> plan = Plan.for_retention(0.33, dims=[(64, 64)] * 2)
        >>> plan.layers[0]
        LayerPlan(keys=Graded(groups=((16, 8), (16, 5), (32, 4))), values=Graded(groups=((64, 4),)))
        >>> Plan.from_json(plan.to_json()) == plan
        True

    Source: this library; steps along convex hulls of bytes and effect are Shoham and Gersho's (1988) bit allocation.
    """

    layers: tuple[LayerPlan | None, ...]
    buffer: int = 128
    sinks: int = 4
    keep: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            if not isinstance(layer, LayerPlan | None):
                raise TypeError(f"a plan has a LayerPlan for each layer, or None, got {type(layer).__name__}")
        if not all(type(number) is int for number in (self.buffer, self.sinks)):
            raise TypeError(f"buffer and sinks are numbers of tokens, got {self.buffer!r} and {self.sinks!r}")
        if self.buffer < 1 or self.sinks < 0:
            raise ValueError(f"a plan needs buffer >= 1 and sinks >= 0, got {self.buffer} and {self.sinks}")
        check_keep(self.keep)

    @classmethod
    def for_retention(
        cls,
        retention: float,
        calibration: "Calibration | None" = None,
        *,
        dims: Sequence[tuple[int, int]] | None = None,
        buffer: int = 128,
        sinks: int = 4,
        keep: float | None = None,
        by_head: bool = True,
    ) -> "Plan":
        """Make the plan that we advise at a retention: it never stores more, and is monotone in it.

        Below 1: `Graded` groups of the sorted basis, more bits for leading coordinates and for keys. With a
        calibration that has effects, layers and KV heads compete for the bytes by what each adds to the KL divergence,
        and layers with a sliding window have no entry; without, all layers are the same. At 1: everything in the dtype
        of the cache.

        Args:
            retention: bytes per history token over the bf16 bytes of the same key and value, up to 1.
            calibration: calibration of the model.
            dims: head dimensions of keys and values of each layer, where there is no calibration.
            buffer: newest tokens kept dense.
            sinks: first tokens kept dense.
            keep: share of the history's tokens that stay; the retention is that of these.
            by_head: let KV heads of a layer differ, in up to 3 runs of neighbours (`swan.ByHead`).

        Returns:
            The plan.

        Raises:
            TypeError: the retention is no number.
            ValueError: the retention is out of range or too small for any plan, or neither
                `calibration` nor `dims` is given.
        """
        if not isinstance(retention, int | float):
            raise TypeError(
                f"the retention comes first, a number such as 0.33: Plan.for_retention(0.33, calibration); got "
                f"{type(retention).__name__}"
            )
        dims, effects = _dims_and_effects(calibration, dims)
        if not 0 < retention <= 1:
            raise ValueError(f"retention must be above 0 and at most 1, got {retention}")
        least = _least(dims, effects)
        if retention < least - ROUNDING:
            rounded_up = math.ceil(least * 1e4) / 1e4  # rounded down it would not fit
            raise ValueError(
                f"no plan fits in retention {retention:.3g} at these head dimensions; the least is {rounded_up}"
                + (
                    "; fewer bytes are safe where effects were measured: calibrate(..., effects=True)"
                    * (effects is None)
                )
            )
        if retention == 1:
            unpruned = [LayerPlan(Graded(((d, 16),)), Graded(((dv, 16),))) for d, dv in dims]
            layers = [layer if _is_winnowed(effects, index) else None for index, layer in enumerate(unpruned)]
        elif effects is None:
            layers = [_step_within(retention, d, dv) for d, dv in dims]
        else:
            layers = _layers_by_effect(retention, dims, effects, by_head)
        return cls(tuple(layers), buffer=buffer, sinks=sinks, keep=keep)

    @classmethod
    def levels(
        cls,
        calibration: "Calibration | None" = None,
        *,
        dims: Sequence[tuple[int, int]] | None = None,
        buffer: int = 128,
        sinks: int = 4,
        by_head: bool = True,
    ) -> list["Plan"]:
        """Make plans of `for_retention` from 1 down to a tenth, some 20: the levels of a byte budget.

        Without effects they end where those of `for_retention` do.

        Args:
            calibration: calibration of the model.
            dims: head dimensions of keys and values of each layer, where there is no calibration.
            buffer: newest tokens kept dense.
            sinks: first tokens kept dense.
            by_head: as in `for_retention`.

        Returns:
            The plans, descending in retention.

        Raises:
            ValueError: neither `calibration` nor `dims` is given.

        Example:
            >>> levels = Plan.levels(dims=[(64, 64)])
            >>> [round(plan.retention, 2) for plan in (levels[0], levels[1], levels[-1])]
            [1.0, 0.51, 0.18]
        """
        dims, effects = _dims_and_effects(calibration, dims)
        least = _least(dims, effects)
        steps = [step.retention for d, dv in set(dims) for step in _steps(d, dv)]
        last = max(least, LOW_LEVELS[-1])
        retentions = sorted({1.0, last, *(r for r in (*steps, *LOW_LEVELS) if last < r < 1)}, reverse=True)
        settings: dict[str, Any] = {"dims": dims, "buffer": buffer, "sinks": sinks, "by_head": by_head}
        plans = [cls.for_retention(r, calibration, **settings) for r in retentions]
        return list(dict.fromkeys(plans))

    def caches(
        self, *, static: bool = False, max_length: int | None = None, prefill: Prefill = "chunk"
    ) -> list[KVCache]:
        """Make a cache for each layer of a model of your own, with the buffer and the sinks of the plan.

        Args:
            static: fixed memory for `max_length` tokens, for torch.compile.
            max_length: tokens that a static cache can hold.
            prefill: way in which several tokens at once are attended, as in `KVCache`.

        Returns:
            The caches, empty.

        Raises:
            ValueError: settings that do not fit each other.

        Example:
            >>> plan = Plan.for_retention(0.33, dims=[(64, 64)] * 2, buffer=32)
            >>> [cache.buffer.size for cache in plan.caches(static=True, max_length=100)]
            [32, 32]
        """
        settings: dict[str, Any] = {"static": static, "max_length": max_length, "prefill": prefill}
        settings |= {"buffer": self.buffer, "sinks": self.sinks}
        return [KVCache(layer, keep=None if layer is None else self.keep, **settings) for layer in self.layers]

    @property
    def retention(self) -> float:
        """Bytes per history token that stays over the bf16 bytes of the same keys and values, all layers."""
        layers = [layer for layer in self.layers if layer is not None]
        if not layers:
            return 0.0
        weights = [layer.keys.d + layer.values.d for layer in layers]
        return sum(layer.retention * w for layer, w in zip(layers, weights, strict=True)) / sum(weights)

    @property
    def share(self) -> float:
        r"""Bytes of the history over the bf16 bytes of all its tokens: without `keep` the retention.

        With it $\text{keep}\,(r + n / \sum_l 2\,(d_{k,l} + d_{v,l}))$ for the retention $r$ and $n$ layers with a
        history: each token that stays has a byte of score in each KV head.

        Example:
            >>> round(Plan.for_retention(0.33, dims=[(64, 64)], keep=0.5).share, 3)
            0.158
        """
        layers = [layer for layer in self.layers if layer is not None]
        if self.keep is None or not layers:
            return self.retention
        vectors = sum(2 * (layer.keys.d + layer.values.d) for layer in layers)
        return self.keep * (self.retention + len(layers) / vectors)

    def predicted_kl(self, calibration: "Calibration") -> Tensor:
        r"""Predict what keys and values of each KV head add to the KL divergence from the dense model.

        The sum of all, $\sum_{l,h} (\mathrm{KL}_{k,l,h} + \mathrm{KL}_{v,l,h})$, is a low estimate: it takes heads one
        by one, errors as small, and the text of the calibration. On text of another kind 1.4 to 1.6 times as much was
        measured at retentions of 0.26 and 0.20, and about twice as much at 0.15 and 0.10.

        Args:
            calibration: calibration of the model, with effects.

        Returns:
            Nats per token ``[layers, kv_heads, 2]``: of keys and of values. NaN for layers without a history, and for
            heads that a layer does not have.

        Raises:
            ValueError: the calibration has no effects or is of another model, or a layout is none of those that were
                measured (of `for_retention`, or 16 bits).

        Example:
            >>> import torch, swan
            >>> model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
            >>> calibration = swan.calibrate(model, [torch.randn(1, 100, 64)], effects=True)
            >>> plan = swan.Plan.for_retention(0.5, calibration)
            >>> plan.predicted_kl(calibration).shape
            torch.Size([1, 4, 2])
        """
        effects = calibration.effects
        if effects is None:
            raise ValueError("this calibration has no effects; run swan.calibrate(..., effects=True)")
        self.check_dims(calibration.dims)
        found = torch.full((*effects.keys.shape[:2], 2), torch.nan, device=effects.keys.device)
        for index, layer in enumerate(self.layers):
            if layer is None:
                continue
            sides = ((layer.keys, KEYS, effects.keys), (layer.values, VALUES, effects.values))
            for side, (layout, candidates, table) in enumerate(sides):
                of_heads = _effects_of(layout, candidates, table[index])
                found[index, : len(of_heads), side] = torch.tensor(of_heads, device=found.device)
        return found

    def check_dims(self, dims: Sequence[tuple[int, int]]) -> None:
        """Raise a ValueError if this is no plan for layers of such head dimensions of keys and values."""
        if len(self.layers) != len(dims):
            raise ValueError(f"the plan has {len(self.layers)} layers, the model {len(dims)}")
        for index, (layer, pair) in enumerate(zip(self.layers, dims, strict=True)):
            if layer is not None and (layer.keys.d, layer.values.d) != pair:
                raise ValueError(
                    f"the plan stores keys and values of {layer.keys.d} and {layer.values.d} coordinates in layer "
                    f"{index}, the model has {pair[0]} and {pair[1]}"
                )

    def to_json(self) -> str:
        """Write the plan as JSON text; `from_json` reads it, and what that would refuse is not written."""
        layers = [None if p is None else {"keys": to_json(p.keys), "values": to_json(p.values)} for p in self.layers]
        values = {"format": FORMAT, "buffer": self.buffer, "sinks": self.sinks, "layers": layers}
        text = json.dumps(values if self.keep is None else values | {"keep": self.keep})
        self.from_json(text)
        return text

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan from the JSON text of `to_json`.

        Raises:
            ValueError: the text is not such a plan.
        """
        try:
            values = parse_json(text)
            if isinstance(values, dict) and values.pop("format", FORMAT) != FORMAT:  # the first plans have none
                raise ValueError(f"this version of swan reads the format {FORMAT!r}")
            keep = values.pop("keep", None) if isinstance(values, dict) else None
            buffer, sinks, layers = fields_of(values, "buffer", "sinks", "layers")
            if max(buffer, sinks) >= MOST_TOKENS:
                raise ValueError(f"buffer and sinks must be below {MOST_TOKENS}")
            read = tuple(None if layer is None else layer_from_json(layer) for layer in layers)
            return cls(read, buffer, sinks, keep)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"this is not the JSON of a plan ({reason_of(error)}); write one with Plan.to_json"
            ) from error


def _effects_of(layout: Layout, candidates: Sequence[Groups], effects: Tensor) -> list[float]:
    """Look up what one of the candidates adds in each KV head; effects are ``[kv_heads, candidates]``."""
    heads, exact = _heads_of(effects), Graded(((layout.d, 16),))
    measured: list[Layout] = [graded(layout.d, groups) for groups in candidates]
    found = []
    for head, each in enumerate(layout.layouts if isinstance(layout, ByHead) else [layout] * heads):
        if each not in (*measured, exact):
            raise ValueError(f"the effect of {each} was not measured; plans of Plan.for_retention have one")
        found.append(0.0 if each == exact else effects[head, measured.index(each)].item())
    return found


def _heads_of(effects: Tensor) -> int:
    """Count the KV heads of a layer, given its effects ``[kv_heads, candidates]``."""
    return int(effects[:, 0].isfinite().sum())


def _dims_and_effects(calibration: "Calibration | None", dims: Dims | None) -> tuple[Dims, Effects | None]:
    if calibration is not None:
        return calibration.dims, calibration.effects
    if dims is None:
        raise ValueError("give a calibration, or dims=[(key_dim, value_dim), ...] with one entry per layer")
    return dims, None


def _is_winnowed(effects: Effects | None, index: int) -> bool:
    return effects is None or not bool(effects.keys[index].isnan().all())


def _steps(d: int, dv: int) -> list[LayerPlan]:
    return [LayerPlan(graded(d, keys), graded(dv, values)) for keys, values in LADDER]


def _step_within(retention: float, d: int, dv: int) -> LayerPlan:
    """Return the highest step of the ladder within the bytes of `retention`."""
    return [step for step in _steps(d, dv) if step.retention <= retention + ROUNDING][-1]


def _least(dims: Dims, effects: Effects | None) -> float:
    """Return the lowest retention of any plan."""
    if effects is None:
        return max(min(step.retention for step in _steps(d, dv)) for d, dv in dims)
    winnowed = [pair for index, pair in enumerate(dims) if _is_winnowed(effects, index)]
    size = sum(
        min(graded(n, groups).vector_bytes() for groups in side)
        for pair in winnowed
        for n, side in zip(pair, (KEYS, VALUES), strict=True)
    )
    return size / sum(2 * (d + dv) for d, dv in winnowed)


def _layers_by_effect(retention: float, dims: Dims, effects: Effects, by_head: bool) -> list[LayerPlan | None]:
    """Begin all at their fewest bytes, and take first the step that lowers the predicted KL most per byte.

    Keys and values of runs of neighbouring KV heads compete, of which a layer has one, or up to `RUNS`. Steps are those
    of the lower convex hull, each in the parts that other candidates divide it into: so the last bytes are spent, too.
    """
    winnowed = [index for index in range(len(dims)) if _is_winnowed(effects, index)]
    runs = [(index, run) for index in winnowed for run in _runs(effects, index, RUNS if by_head else 1)]
    room = sum(2 * sum(dims[index]) for index in winnowed) * (retention + ROUNDING)
    chosen: dict[tuple[int, int], list[Graded]] = {}  # by layer and side, for each KV head
    steps: list[_Step] = []
    for side, candidates, table in ((0, KEYS, effects.keys), (1, VALUES, effects.values)):
        layouts_of = {d: [graded(d, groups) for groups in candidates] for d in {pair[side] for pair in dims}}
        of_heads = _cautious(torch.stack([table[index, run].mean(0) for index, run in runs])).tolist()
        for (index, run), of_head in zip(runs, of_heads, strict=True):
            heads, layouts = run.stop - run.start, layouts_of[dims[index][side]]
            share = heads / _heads_of(table[index])  # of the bytes of the layer
            sized = [(share * x.vector_bytes(), heads * kl, x) for x, kl in zip(layouts, of_head, strict=True)]
            points = _falling(sized)
            hull = _hull(points)
            room -= hull[0][0]
            chosen.setdefault((index, side), []).extend([hull[0][2]] * heads)
            for a, b in itertools.pairwise(hull):
                parts = itertools.pairwise(point for point in points if a[0] <= point[0] <= b[0])
                steps += [_Step(_slope(a, b), index, side, run, less[0], more[0], more[2]) for less, more in parts]
    for step in sorted(steps, key=lambda step: (step.slope, step.layer, step.side, step.run.start, step.begin)):
        if step.end - step.begin > room:
            break  # smaller steps after it are not taken either: a plan of more bytes has all steps of one of fewer
        room -= step.end - step.begin
        chosen[step.layer, step.side][step.run] = [step.layout] * (step.run.stop - step.run.start)
    sides = {place: by_head_layout(layouts) for place, layouts in chosen.items()}
    return [LayerPlan(sides[i, 0], sides[i, 1]) if (i, 0) in sides else None for i in range(len(dims))]


class _Step(NamedTuple):
    """More bytes for the keys or the values of a run of KV heads."""

    slope: float  # of the predicted KL by the bytes, of the step that this one is a part of
    layer: int
    side: int
    run: slice
    begin: float  # bytes
    end: float
    layout: Graded


def _runs(effects: Effects, index: int, most: int) -> list[slice]:
    """Divide the KV heads of a layer into a few runs of neighbours whose effects are as alike as can be."""
    heads = _heads_of(effects.keys[index])
    if most == 1:
        return [slice(0, heads)]
    logs = torch.cat([table[index, :heads].clamp(min=1e-30).log() for table in (effects.keys, effects.values)], dim=1)
    # Squared distances from the mean of each run, from sums of all that begin with the first head.
    sums, squares = (torch.nn.functional.pad(x.double().cumsum(0), (0, 0, 1, 0)) for x in (logs, logs.square()))
    ends = torch.arange(heads + 1, device=sums.device)
    sizes = ends - ends[:, None]
    spread = (squares - squares[:, None] - (sums - sums[:, None]).square() / sizes.clamp(min=1)[..., None]).sum(-1)
    table = spread.tolist()
    edges = [(0, *inner, heads) for inner in itertools.combinations(range(1, heads), min(most, heads) - 1)]
    best = min(edges, key=lambda each: sum(table[start][stop] for start, stop in itertools.pairwise(each)))
    return [slice(*edge) for edge in itertools.pairwise(best)]


def _cautious(table: Tensor) -> Tensor:
    """Raise effects that are below the mean of all rows a quarter of the way to it, in their logarithm.

    On other texts layers and heads differ less; but one whose effect is above the mean has outliers, on any text.
    """
    logs = table.clamp(min=1e-30).log()
    return torch.maximum(logs, logs.lerp(logs.nanmean(0), 0.25)).exp()


def _falling(points: list[tuple[float, float, Graded]]) -> list[tuple[float, float, Graded]]:
    """Return the points whose effect is less than that of all with fewer bytes or as many."""
    falling: list[tuple[float, float, Graded]] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if not falling or point[1] < falling[-1][1]:
            falling.append(point)
    return falling


def _hull(points: list[tuple[float, float, Graded]]) -> list[tuple[float, float, Graded]]:
    """Return those of `_falling` points (bytes, effect, layout) that are on the lower convex hull."""
    hull: list[tuple[float, float, Graded]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float, Graded], b: tuple[float, float, Graded]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
