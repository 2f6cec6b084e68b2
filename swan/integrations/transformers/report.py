"""What each layer of a `SwanCache` stores, as rows."""

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from swan.functional.packing import pack
from swan.storage import Layout, unpack

if TYPE_CHECKING:
    from swan.integrations.transformers.cache import SwanCache

__all__ = ["report"]


def report(cache: "SwanCache") -> list[dict[str, Any]]:
    """See `SwanCache.report`."""
    rows = []
    for index, kv in cache.winnowed.items():
        entry = kv.plan_layer
        row: dict[str, Any] = {"layer": index, "tokens": kv.length, "history": kv.history_length}
        row["retention"] = 0.0 if entry is None else entry.retention
        if cache.budget is not None:
            row |= {"budget": cache.budget, "dropped": kv.dropped}
        row |= {"nbytes": kv.nbytes, "compression": kv.nbytes / max(kv.dense_nbytes, 1)}
        for name, dense in (("keys", kv.state.k_recent), ("values", kv.state.v_recent)):
            layout = None if entry is None else getattr(entry, name)
            row[name] = None if layout is None else dataclasses.asdict(layout)
            row[f"{name}_energy"] = None if layout is None or dense is None else _energy(dense, layout)
        rows.append(row)
    return rows


def _energy(dense: Tensor, layout: Layout) -> float:
    """Share of the squared length that a layout keeps."""
    stored = unpack(pack(dense, layout)).double().square().sum()
    total = dense.double().square().sum()
    return (stored / total).item() if total > 0 else 1.0
