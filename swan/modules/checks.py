"""Checks of the arguments of a cache, before anything in it changes."""

from typing import Any

import torch
from torch import Tensor

from swan.modules.state import COUNTERS, KEPT, PAGE, CacheState
from swan.modules.visible import Visible
from swan.storage import ByHead, LayerPlan, TopK
from swan.storage.topk import check_positions

__all__ = [
    "check_choice",
    "check_crop",
    "check_keep",
    "check_latest",
    "check_mask",
    "check_max_length",
    "check_new",
    "check_queries",
    "check_room",
    "check_saved",
    "check_settings",
]


def check_settings(
    plan_layer: Any, prefill: str, static: bool, max_length: int | None, keep: float | None = None
) -> None:
    """Raise a ValueError or TypeError if these are no settings of a cache."""
    if prefill not in ("chunk", "windowed"):
        raise ValueError(f"prefill must be 'chunk' or 'windowed', got {prefill!r}")
    if not isinstance(plan_layer, LayerPlan | None):
        advice = "plan.caches()" if hasattr(plan_layer, "layers") else "LayerPlan(keys, values)"
        raise TypeError(
            f"KVCache takes the LayerPlan of one layer, or None, got {type(plan_layer).__name__}; use {advice}"
        )
    check_max_length(static, max_length)
    check_keep(keep)
    if keep is not None and (static or plan_layer is None):
        reason = "a static cache keeps all its tokens" if static else "a cache without history has none to keep"
        raise ValueError(f"keep={keep:g} needs a dynamic cache with a history: {reason}")


def check_keep(keep: Any) -> None:
    """Raise a TypeError or ValueError if this is no share of tokens that stay."""
    if keep is None:
        return
    if not isinstance(keep, int | float):
        raise TypeError(f"keep is the share of tokens that stay, a number, got {type(keep).__name__}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of tokens that stay, above 0 and at most 1, got {keep}")


def check_max_length(static: bool, max_length: int | None) -> None:
    """Raise a ValueError if a cache that is static or not cannot have this `max_length`."""
    if static and (max_length is None or max_length < 1):
        raise ValueError(f"a static cache needs max_length, the tokens it can hold; got {max_length}")
    if max_length is not None and not static:
        raise ValueError("max_length is for static caches; a dynamic one grows as it needs")


def check_room(tokens: int, length: int, max_length: int) -> None:
    """Raise a ValueError if a static cache cannot hold so many more tokens."""
    if length + tokens > max_length:
        raise ValueError(
            f"the static cache holds {length} of {max_length} tokens, {tokens} more do not fit; "
            "build it with a larger max_length"
        )


def check_new(k: Tensor, v: Tensor, padding: Tensor | None, plan_layer: LayerPlan | None, state: CacheState) -> None:
    """Raise a ValueError or TypeError if new keys and values do not fit the layouts, or the tokens in the cache."""
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[2] == 0:
        raise ValueError(
            "expected keys [batch, kv_heads, tokens, d] and values [batch, kv_heads, tokens, dv] with at least one "
            f"token, got {list(k.shape)} and {list(v.shape)}"
        )
    if k.dtype != v.dtype or not k.is_floating_point():
        raise TypeError(f"keys and values must have one floating-point dtype, got {k.dtype} and {v.dtype}")
    for name, new, layout, stored in (
        ("keys", k, plan_layer and plan_layer.keys, state.k_recent),
        ("values", v, plan_layer and plan_layer.values, state.v_recent),
    ):
        if layout is not None and new.shape[3] != layout.d:
            raise ValueError(f"the plan stores {name} of {layout.d} coordinates, got {new.shape[3]}")
        if isinstance(layout, ByHead) and new.shape[1] != layout.kv_heads:
            raise ValueError(f"the plan stores {name} of {layout.kv_heads} KV heads, got {new.shape[1]}")
        if stored is None:
            continue
        if stored.dtype != new.dtype:
            raise TypeError(f"the cache holds {stored.dtype} {name}, got {new.dtype}; reset() it to change")
        if stored.device != new.device:
            raise ValueError(f"the cache is on {stored.device}, got {name} on {new.device}")
        if stored.shape[:2] != new.shape[:2]:
            raise ValueError(
                f"the cache holds {name} of batch and heads {list(stored.shape[:2])}, got {list(new.shape[:2])}; "
                "reset() it for another batch"
            )
    if padding is not None and tuple(padding.shape) != (k.shape[0],):
        raise ValueError(f"padding counts each row's left padding, [{k.shape[0]}], got {list(padding.shape)}")


def check_queries(q: Tensor, tokens: int, state: CacheState) -> None:
    """Raise a ValueError if queries are not those of so many new tokens, or of other heads than those before them."""
    if q.ndim != 4 or q.shape[2] != tokens:
        raise ValueError(f"{tokens} tokens were taken in, so queries [batch, heads, {tokens}, d]; got {list(q.shape)}")
    if state.queries is not None and state.queries.shape[1] != q.shape[1]:
        raise ValueError(
            f"the cache scores its tokens by the attention of {state.queries.shape[1]} query heads, got {q.shape[1]}; "
            "reset() it for another number"
        )


def check_crop(length: int, state: CacheState) -> None:
    """Raise a ValueError if a cache cannot go back to so many tokens."""
    if not 0 <= length <= int(state.length):
        raise ValueError(f"cannot crop to {length} tokens, the cache holds {int(state.length)}")
    if 0 < length < state.chosen:
        raise ValueError(
            f"cannot crop to {length} tokens: of the first {state.chosen} some were dropped for the sake of "
            "later ones; crop to no less than that, or to 0"
        )


def check_choice(mask: Tensor, sinks: int, chosen: int, padding: Tensor | None) -> None:
    """Raise a ValueError if a mask hides more than padding before column `chosen`: some tokens there were dropped."""
    if chosen <= sinks:
        return
    columns = torch.arange(sinks, chosen, device=mask.device)
    real = columns >= 0 if padding is None else columns >= padding.view(-1, 1, 1, 1)
    if bool((mask[..., sinks:chosen] != real).any()):
        raise ValueError(
            "tokens of the history were dropped by score, so it is no longer known which is which: a mask can hide "
            f"left padding of its first {chosen} columns, and nothing else"
        )


def check_latest(visible: Visible, state: CacheState) -> None:
    """Raise a ValueError if the cache has changed since an update; counters on a device are not waited for."""
    length, first_query = state.length, visible.first_query
    if isinstance(length, int) and isinstance(first_query, int) and first_query + visible.queries != length:
        raise ValueError(
            f"attend follows its update: that ended at {first_query + visible.queries} tokens, the cache holds "
            f"{length}; attend before the cache changes again"
        )


def check_mask(mask: Tensor | None, q: Tensor, length: int) -> None:
    """Raise a ValueError or TypeError if a mask does not cover a sequence of so many tokens."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"the mask must be boolean (True = visible), got {mask.dtype}")
    batch, heads, queries, _ = q.shape
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    if not fits or mask.shape[2] != queries or mask.shape[3] < length:
        raise ValueError(
            f"expected a mask [{batch} or 1, {heads} or 1, {queries}, {length} or more columns] over the "
            f"whole sequence, got {list(mask.shape)}"
        )


def check_saved(
    tensors: dict[str, Tensor],
    plan_layer: LayerPlan | None,
    size: int,
    sinks: int,
    max_length: int | None,
    keep: float | None = None,
) -> None:
    """Raise a ValueError if these are not the tensors and counters that a cache with these settings writes.

    Args:
        tensors: as `CacheState.to_dict` names them.
        plan_layer: layouts of the cache.
        size: newest tokens kept dense.
        sinks: first tokens kept dense.
        max_length: tokens that a static cache can hold.
        keep: share of tokens that stay, or None.
    """
    if not tensors:
        return  # an empty cache
    if keep is not None:
        tensors = _check_kept(tensors, sinks)
    missing = {*COUNTERS, "keys", "values"} - set(tensors)
    owes = set(tensors) == {*COUNTERS}  # an empty cache that drops the first tokens to come
    if missing and not owes:
        raise ValueError(f"a saved cache has {', '.join(sorted(missing))} too")
    if any(tensors[name].ndim or tensors[name].dtype != torch.int64 for name in COUNTERS):
        raise ValueError("the counters of a saved cache must be whole numbers")
    length, first, padded, dropped = (int(tensors[name]) for name in COUNTERS)
    stored = 0 if plan_layer is None else max(first - sinks - dropped, 0)
    limit = 2**31 if max_length is None else max_length
    fits = 0 <= first <= length <= min(first + size, limit) and stored <= max(limit - sinks - size, 0)
    if not (fits and 0 <= padded < 2**31 and 0 <= dropped < 2**31):
        raise ValueError(
            f"a saved cache cannot have {dict(zip(COUNTERS, (length, first, padded, dropped), strict=True))}"
        )
    if owes:
        if length or first:
            raise ValueError(f"a saved cache without keys and values holds no tokens, got {length}")
        return
    slots = tensors["keys"].shape[2] - sinks if tensors["keys"].ndim == 4 else 0
    if first or not length <= slots <= size:  # a ring that has never been full has memory for a part of it
        slots = size
    expected = _saved_shapes(tensors["keys"], tensors["values"], plan_layer, sinks + slots, stored)
    if stored == 0 and "k.plane0" not in tensors:  # no token has left the buffer yet
        expected = {name: like for name, like in expected.items() if "." not in name}
    if "padding" in tensors:
        expected["padding"] = (tensors["keys"].shape[:1], torch.int64)
    found = {name: (t.shape, t.dtype) for name, t in tensors.items() if name not in COUNTERS}
    for name in found.keys() | expected.keys():
        if found.get(name) != expected.get(name):
            wanted, got = (_said(like.get(name)) for like in (expected, found))
            raise ValueError(f"{name[:40]} of a saved cache must be {wanted}, got {got}")
    if "padding" in tensors and not bool(((tensors["padding"] >= 0) & (tensors["padding"] < 2**31)).all()):
        raise ValueError("the padding of a saved cache must be counts of tokens")
    if plan_layer is not None:
        for side, layout in (("k", plan_layer.keys), ("v", plan_layer.values)):
            if isinstance(layout, TopK) and f"{side}.positions" in tensors:
                check_positions(tensors[f"{side}.positions"], layout)


def _check_kept(tensors: dict[str, Tensor], sinks: int) -> dict[str, Tensor]:
    """Check what only a cache that drops tokens by score saves, and return the others."""
    kept = {name: tensors[name] for name in (*KEPT, "queries", "scores") if name in tensors}
    if not kept:
        return tensors  # it has seen no query
    if any(name not in kept or kept[name].ndim or kept[name].dtype != torch.int64 for name in KEPT):
        raise ValueError(f"the counters {' and '.join(KEPT)} of a saved cache must be whole numbers")
    observed, chosen = (int(kept[name]) for name in KEPT)
    keys, queries, scores = tensors.get("keys"), kept.get("queries"), kept.get("scores")
    first, dropped = (int(tensors.get(name, 0)) for name in ("first", "dropped"))
    if not (0 <= observed < 2**31 and observed % PAGE == 0 and 0 <= chosen <= max(first, 0)):
        raise ValueError(f"a saved cache cannot have observed {observed} and chosen from {chosen} columns")
    if keys is None or keys.ndim != 4 or queries is None or queries.ndim != 4 or queries.shape[1] % keys.shape[1]:
        raise ValueError("a saved cache that drops tokens has queries of all heads")
    wanted = (keys.shape[0], queries.shape[1], PAGE, keys.shape[3])
    if tuple(queries.shape) != wanted or queries.dtype != keys.dtype:
        raise ValueError(f"queries of a saved cache must be {_said((wanted, keys.dtype))}")
    if scores is not None:
        fits = scores.ndim == 3 and scores.shape[:2] == keys.shape[:2]
        fits = fits and scores.shape[2] <= max(first - sinks - dropped, 0)
        if not fits or scores.dtype != torch.uint8:
            raise ValueError("scores of a saved cache must be bytes, one for each token of the history at most")
    return {name: t for name, t in tensors.items() if name not in kept}


Like = tuple[tuple[int, ...], torch.dtype]


def _saved_shapes(
    keys: Tensor, values: Tensor, plan_layer: LayerPlan | None, slots: int, stored: int
) -> dict[str, Like]:
    """Return the shape and dtype of each tensor of a saved cache, given those of its recent keys and values."""
    if keys.ndim != 4 or values.ndim != 4 or not keys.is_floating_point() or keys.numel() == 0:
        raise ValueError("keys and values of a saved cache must be [batch, kv_heads, tokens, d]")
    rows, heads = keys.shape[:2]
    d, dv = (keys.shape[3], values.shape[3]) if plan_layer is None else (plan_layer.keys.d, plan_layer.values.d)
    expected: dict[str, Like] = {
        "keys": ((rows, heads, slots, d), keys.dtype),
        "values": ((rows, heads, slots, dv), keys.dtype),
    }
    if plan_layer is None:
        return expected
    for side, layout in (("k", plan_layer.keys), ("v", plan_layer.values)):
        if isinstance(layout, ByHead) and layout.kv_heads != heads:
            raise ValueError(f"the plan is for {layout.kv_heads} KV heads, the saved cache has {heads}")
        packed = layout.pack(torch.zeros(1, heads, 1, layout.d, dtype=keys.dtype, device=keys.device))
        named = {f"plane{i}": plane for i, plane in enumerate(packed.planes)}
        named |= {"scales": packed.scales, "positions": packed.positions}
        for name, t in named.items():
            if t is not None:
                expected[f"{side}.{name}"] = ((rows, t.shape[1], stored, t.shape[3]), t.dtype)
    return expected


def _said(like: Like | None) -> str:
    return "nothing" if like is None else f"{like[1]} {list(like[0])}"
