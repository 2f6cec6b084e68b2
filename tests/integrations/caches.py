"""Caches of a small model that several tests look at."""

from swan import SwanCache
from tests.tiny import (
    logits_of,
    tokens,
)

TEXT = {"input_ids": tokens(2, 60)}
NEXT = {"input_ids": tokens(2, 5, seed=9)}


def pruned(model, retention=0.5, **settings):
    return SwanCache(model, **{"retention": retention, "buffer": 8, "sinks": 2} | settings)


def filled(model, cache, **inputs):
    logits_of(model, cache, chunk=20, **inputs or TEXT)
    return cache
