"""Static caches that several tests look at."""

from swan import LayerPlan, Plan, SwanCache, TopK
from tests.tiny import float32_bound, greatest_difference, left_padded, tokens

TEXT = {"input_ids": tokens(2, 60)}
PADDED = left_padded(60, 23, 41)
LEVELS = [0.5, 0.33, 0.26]
# Values of 16 bits: an int8 step apart is what a rounding of float32 may make of the others.
EXACT = Plan([LayerPlan(TopK(16, 9, bits=16), TopK(16, 7, bits=16))] * 2, buffer=8, sinks=2)
SMALL = {"buffer": 8, "sinks": 2}


def static(model, plan=None, **settings):
    return SwanCache(model, plan, **SMALL | {"static": True, "max_length": 64} | settings)


def twins(model, plan=None, **settings):
    """A static cache and a dynamic one that begins like it."""
    dynamic = dict(settings)
    levels = dynamic.pop("levels", None)
    if levels:
        dynamic["retention"] = max(levels)
    dynamic.pop("max_length", None)
    return static(model, plan, **settings), SwanCache(model, plan, **SMALL | dynamic)


def close(model, a, b, inputs=TEXT):
    return greatest_difference(a, b) <= float32_bound(model, **inputs)
