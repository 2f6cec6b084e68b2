"""The plans between which the dial of a `SwanCache` moves, and the arguments that they come from."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swan.calibration import Calibration, Plan
from swan.calibration.effects import Effects
from swan.modules.checks import check_max_length
from swan.storage.by_head import share_of

__all__ = ["Dial", "Origin", "check_keep", "check_static", "origin_of"]


@dataclass(frozen=True)
class Origin:
    """The argument that the plans of a cache come from: exactly one of these is set."""

    plan: Plan | None = None
    retentions: tuple[float, ...] = ()  # highest first
    budgeted: bool = False


def origin_of(
    plan: Plan | float | None,
    retention: float | None,
    budget: object,
    levels: Sequence[float] | None,
    default: Plan | None,
) -> Origin:
    """Resolve the origin of plans: a plan, a retention (under either name), a budget, levels, or the default plan.

    Raises:
        TypeError: `plan` is neither a plan nor a number, which stands for the retention.
        ValueError: not exactly one of the four is given, and not none where there is a default.
    """
    if isinstance(plan, int | float):
        if retention is not None:
            raise ValueError(f"the retention was given twice: {plan} and {retention}")
        plan, retention = None, plan
    if not isinstance(plan, Plan | None):
        raise TypeError(f"SwanCache(model, ...) takes a retention or a Plan, got {type(plan).__name__}")
    count = 4 - [plan, retention, budget, levels].count(None)
    if count == 0 and default is not None:
        return Origin(plan=default)
    if count != 1:
        raise ValueError("give exactly one of plan, retention, budget and levels")
    retentions = sorted(set(levels or []), reverse=True) if retention is None else [retention]
    return Origin(plan, tuple(retentions), budget is not None)


def check_keep(keep: float | None, plan: object) -> None:
    """Raise a ValueError if a share of tokens that stay is given beside a plan, which has its own."""
    if keep is not None and isinstance(plan, Plan):
        raise ValueError(f"the plan says which tokens stay (keep={plan.keep}): leave keep={keep} out")


def check_static(static: bool, max_length: int | None, budget: object, levels: Sequence[float] | None) -> None:
    """Raise a ValueError if a cache, static or not, cannot have these settings."""
    check_max_length(static, max_length)
    if static and budget is not None:
        raise ValueError(
            "a budget lowers the dial as the history grows, a static cache takes its memory at once; give levels=[...] "
            "and move the dial, or leave static out"
        )
    if levels is not None and not (static and levels):
        raise ValueError(
            f"levels are one or more retentions of a static cache, got {levels} and static={static}; the dial of a "
            "dynamic cache takes every retention"
        )


@dataclass
class Dial:
    """The levels of a cache: the plans between which it moves.

    Args:
        calibration: calibration of the model.
        excluded: the rows of a plan that are not winnowed: they store nothing, and do not compete for bytes.
        buffer: newest tokens kept dense.
        sinks: first tokens kept dense.
        keep: share of the history's tokens that stay, or None.
        rank: rank and size of the model's tensor parallelism.
    """

    calibration: Calibration
    excluded: list[int]
    buffer: int
    sinks: int
    keep: float | None = None
    rank: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        self.levels: list[Plan] = []  # the levels, highest first
        self.retentions: list[float] = []  # the numbers that choose the levels of a static cache
        effects = self.calibration.effects
        self._competing = self.calibration
        if effects is not None and self.excluded:
            rows = torch.tensor(self.excluded, dtype=torch.long, device=effects.keys.device)
            masked = (t.index_fill(0, rows, math.nan) for t in (effects.keys, effects.values))
            self._competing = dataclasses.replace(self.calibration, effects=Effects(*masked))

    def start(self, origin: Origin) -> None:
        """Make the levels from their origin."""
        if origin.plan is not None:
            plans = [origin.plan]
            self.buffer, self.sinks, self.keep = origin.plan.buffer, origin.plan.sinks, origin.plan.keep
        elif origin.budgeted:
            plans = Plan.levels(self._competing, buffer=self.buffer, sinks=self.sinks)
            plans = [dataclasses.replace(plan, keep=self.keep) for plan in plans]
        else:
            plans = [self.plan(retention) for retention in origin.retentions]
        plans[0].check_dims(self.calibration.dims)
        self.levels = [self._stored(plan) for plan in plans]
        self.retentions = list(origin.retentions) or [self.levels[0].retention]

    def plan(self, retention: float) -> Plan:
        """Make the plan of any retention."""
        settings = {"buffer": self.buffer, "sinks": self.sinks, "keep": self.keep}
        plan = dataclasses.replace(Plan.for_retention(retention, self._competing), **settings)
        return self._stored(plan)

    def level(self, retention: float) -> Plan:
        """Find the plan of a static cache for a retention, as it was given or as the plan has it.

        Raises:
            ValueError: it is none of the levels.
        """
        for number, plan in zip(self.retentions, self.levels, strict=True):
            if math.isclose(retention, number) or math.isclose(retention, plan.retention):
                return plan
        raise ValueError(
            f"the dial of this static cache has the levels {', '.join(f'{r:.3g}' for r in self.retentions)}, got "
            f"{retention:.3g}; a new cache can have others (levels=[...])"
        )

    def _stored(self, plan: Plan) -> Plan:
        """Return a plan of what is stored here: without excluded layers, of the KV heads of the rank."""
        layers = [layer and share_of(layer, *self.rank) for layer in plan.layers]
        return dataclasses.replace(
            plan, layers=[None if row in self.excluded else layer for row, layer in enumerate(layers)]
        )
