"""Layouts as values of JSON, both ways."""

import dataclasses
import functools
from typing import Any

from swan.storage import ByHead, Graded, LayerPlan, Layout, TopK

__all__ = ["fields_of", "layer_from_json", "to_json"]


def to_json(layout: Layout) -> dict[str, Any]:
    """Return a layout as values of JSON."""
    if isinstance(layout, ByHead):
        return {"form": layout.form, "groups": [each.groups for each in layout.layouts]}
    if not isinstance(layout, TopK | Graded):
        raise TypeError(f"only TopK, Graded and ByHead layouts can be written as JSON, got {layout}")
    return {"form": layout.form, **dataclasses.asdict(layout)}


def layer_from_json(values: Any) -> LayerPlan:
    """Read the layouts of a layer from values of JSON, which may be anything; raise a ValueError or TypeError if so."""
    keys, values = fields_of(values, "keys", "values")
    return LayerPlan(_from_json(keys), _from_json(values))


def _from_json(values: Any) -> Layout:
    if isinstance(values, dict) and values.get("form") == "topk":
        _, d, keep, bits, positions = fields_of(values, "form", "d", "keep", "bits", "positions")
        numbers, layout = [d, keep, bits], functools.partial(TopK, d, keep, bits, positions)
    else:
        form, groups = fields_of(values, "form", "groups")
        if form not in ("graded", "by-head"):
            raise ValueError("the form of a layout is 'topk', 'graded' or 'by-head'")
        heads = groups if form == "by-head" else [groups]
        numbers = [number for head in heads for pair in head for number in pair]
        layout = functools.partial(Graded, groups) if form == "graded" else functools.partial(_by_head, groups)
    if not all(type(number) is int for number in numbers):  # fractions would be rounded, true taken for 1
        raise ValueError(f"sizes and bits of a layout must be whole numbers, got {numbers}")
    return layout()


def _by_head(heads: Any) -> ByHead:
    return ByHead(tuple(Graded(groups) for groups in heads))


def fields_of(values: Any, *names: str) -> list[Any]:
    """Return the values of an object of JSON that has these keys and no others."""
    if not isinstance(values, dict) or values.keys() != set(names):
        raise ValueError(f"expected an object of {', '.join(names)}")
    return [values[name] for name in names]
