"""The rows of `SwanCache.report`, one for each winnowed layer."""

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from swan.functional.packing import pack
from swan.storage import Layout, unpack

if TYPE_CHECKING:
    from swan.integrations.transformers.cache import SwanCache

__all__ = ["report"]


def report(cache: "SwanCache") -> list[dict[str, Any]]:
    """Make the rows: see `SwanCache.report`."""
    rows = []
    for index, kv in cache.winnowed.items():
        plan_layer = kv.plan_layer
        row: dict[str, Any] = {"layer": index, "tokens": kv.length, "history": kv.history_length}
        row["retention"] = 0.0 if plan_layer is None else plan_layer.retention
        if cache.budget is not None:
            row["budget"] = cache.budget
        if kv.keep is not None:
            row["keep"] = kv.keep
        if cache.budget is not None or kv.keep is not None:
            row["dropped"] = kv.dropped
        row |= {"nbytes": kv.nbytes, "compression": kv.nbytes / max(kv.dense_nbytes, 1)}
        for name, dense in (("keys", kv.state.k_recent), ("values", kv.state.v_recent)):
            layout = None if plan_layer is None else getattr(plan_layer, name)
            row[name] = None if layout is None else dataclasses.asdict(layout)
            row[f"{name}_energy"] = None if layout is None or dense is None else _energy(dense, layout)
        rows.append(row)
    return rows


def _energy(dense: Tensor, layout: Layout) -> float:
    """Measure the share of squared length that a layout keeps: 1 less that of the error, which may be larger."""
    lost = (unpack(pack(dense, layout)).double() - dense).square().sum()
    total = dense.double().square().sum()
    return (1 - lost / total).item() if total > 0 else 1.0
