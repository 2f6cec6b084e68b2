"""swan in Hugging Face transformers: an attention function, `SwanCache`, attach and detach."""

import dataclasses
import inspect
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Literal, NoReturn, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from swan.calibration import Calibration, Plan
from swan.calibration.capture import attention_layers, evaluating, tensor_parallel, unwrapped
from swan.calibration.effects import Effects
from swan.calibration.moments import output_projection
from swan.functional.packing import pack
from swan.functional.rotation import fold_value_rotation, inverse_rotate, rotate
from swan.integrations import cache_file
from swan.modules import KVCache
from swan.modules.cache import BLOCK, Prefill, check_max_length
from swan.storage import unpack

try:
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        StaticCache,
    )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError as error:
    raise ImportError("swan works with transformers >= 5.10: pip install 'swan-attention[hf]'") from error

__all__ = ["SwanCache", "attach", "attachment_of", "cache_keyword", "detach", "is_attached"]

NAME = "swan"  # of the attention function in transformers
UNITS = (
    {"B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)}
    | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
)
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cache")


@dataclass
class _Attachment:
    """What caches need to know, and what `detach` needs to put a model back as it was."""

    calibration: Calibration
    implementation: str
    folded: list[tuple[nn.Parameter, Tensor]]  # parameters and what they were
    plan: Plan | None = None  # of caches that are told nothing else
    hooks: list[RemovableHandle] = dataclasses.field(default_factory=list)


def attach(model: PreTrainedModel, calibration: Calibration, fold: bool = False) -> None:
    """See `swan.attach`."""
    if is_attached(model):
        raise ValueError("this model is already attached; call swan.detach(model) first")
    if _config(model)._attn_implementation == NAME:
        raise ValueError(
            "this model shares its config object with an attached model, and its attention with it; build it from a "
            "copy of the config"
        )
    calibration.check_model(model)
    layers = attention_layers(model)
    if len(layers) != len(calibration.layers):
        raise ValueError(f"calibrated {len(calibration.layers)} attention layers, the model has {len(layers)}")
    if fold:
        for index, layer in layers.items():
            _check_foldable(index, layer)
    AttentionInterface.register(NAME, _swan_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    attachment = _Attachment(calibration, _config(model)._attn_implementation, [])
    model._swan_attachment = attachment  # type: ignore[assignment]
    rank, ranks = tensor_parallel(model)
    for index, bases in zip(sorted(layers), calibration.layers, strict=True):
        layer = layers[index]
        key_basis, value_basis = (b.chunk(ranks)[rank] for b in (bases.key_basis, bases.value_basis))
        place = next((p for p in layer.parameters() if p.is_floating_point()), None)
        options: dict[str, Any] = (
            {"dtype": model.dtype} if place is None else {"dtype": place.dtype, "device": place.device}
        )
        layer.register_buffer("swan_key_basis", key_basis.to(**options), persistent=False)
        if fold:
            attachment.folded += _fold(layer, value_basis)
        layer.register_buffer("swan_value_basis", None if fold else value_basis.to(**options), persistent=False)
    model.set_attn_implementation(NAME)
    attachment.hooks += _accept_cache(model)
    try:
        _try_cache(model)
    except Exception as error:
        detach(model)
        computes = "it computes with keys and values between its cache and its attention"
        reason = computes if isinstance(error, _Strayed) else error
        raise ValueError(f"swan does not support {type(model).__name__}: {reason}") from error


def detach(model: PreTrainedModel) -> None:
    """See `swan.detach`."""
    attachment = getattr(model, "_swan_attachment", None)
    if not isinstance(attachment, _Attachment):
        raise ValueError("this model is not attached; there is nothing to detach")
    for parameter, before in attachment.folded:
        parameter.data.copy_(before)
    for layer in attention_layers(model).values():
        del layer.swan_key_basis, layer.swan_value_basis
    model.set_attn_implementation(attachment.implementation)
    for hook in attachment.hooks:
        hook.remove()
    vars(model).pop("generate", None)
    del model._swan_attachment


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` was called on this model."""
    return isinstance(getattr(unwrapped(model), "_swan_attachment", None), _Attachment)


def cache_keyword(model: nn.Module) -> str:
    """Name under which this version of transformers takes a cache: ``past_key_values``, or ``cache``."""
    return "cache" if "cache" in inspect.signature(unwrapped(model).forward).parameters else "past_key_values"


def _accept_cache(model: PreTrainedModel) -> list[RemovableHandle]:
    """Let a model of transformers before 5.24 take a cache under its later name too: ``cache``."""
    if cache_keyword(model) == "cache":
        return []
    vars(model)["generate"] = MethodType(_generate, model)
    parts = dict.fromkeys((model, cast(nn.Module, model.base_model)))
    return [part.register_forward_pre_hook(_with_old_name, with_kwargs=True) for part in parts]


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    _, kwargs = _with_old_name(model, args, kwargs)
    return cast(Any, type(model)).generate(model, *args, **kwargs)


_generate.__name__ = "generate"  # a pickled method is found again by its name


def _with_old_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if "cache" not in kwargs:
        return args, kwargs
    if kwargs.get("past_key_values") is not None:
        raise ValueError("give the cache as cache or as past_key_values, not as both")
    kwargs = dict(kwargs)
    kwargs["past_key_values"] = kwargs.pop("cache")
    return args, kwargs


def _source(
    plan: Plan | float | None, retention: float | None, budget: object, levels: object, default: Plan | None
) -> tuple[Plan | None, float | None]:
    """The plan or the retention of a cache, where it is not a budget or levels that it is made from.

    Raises:
        TypeError: `plan` is neither a plan nor a number, which stands for the retention.
        ValueError: not exactly one of the four is given; none will do where there is a default.
    """
    if isinstance(plan, int | float):
        if retention is not None:
            raise ValueError(f"the retention was given twice: {plan} and {retention}")
        plan, retention = None, plan
    if not isinstance(plan, Plan | None):
        raise TypeError(f"SwanCache(model, ...) takes a retention or a Plan, got {type(plan).__name__}")
    given = 4 - [plan, retention, budget, levels].count(None)
    if given == 0 and default is not None:
        return default, None
    if given != 1:
        raise ValueError("give exactly one of plan, retention, budget and levels")
    return plan, retention


class SwanCache(Cache):
    """A winnowed cache for `generate` and forward of an attached transformers model.

    Layers with full attention are winnowed; sliding, linear-attention and convolution layers, and those in `exclude`,
    keep transformers' own caches.

    With a `budget`, `nbytes` never exceeds it. The cache begins at retention 1; a forward whose tokens would not
    fit first moves the whole history to the highest of `Plan.levels` at which they do, before anything is stored.
    A level fits if

        nbytes after the forward + the largest part of a layer <= budget

    where a part is the keys or the values of a layer's history or buffer (both, of a sliding layer): it exists twice
    for the moment in which it grows or is packed anew, so that the bytes held between two layers are within the
    budget too. What the model computes with (activations, and tiles of 1024 tokens) is not counted.

    With ``static=True`` the memory for `max_length` tokens is taken with the first ones, and counters are tensors:
    ``torch.compile(model, fullgraph=True)`` decodes without graph breaks, and without a recompilation from the first
    step to the last. The dial of a static cache has the `levels` that were given to it: each compiles once, and moving
    between them afterwards does not. Compiled code does not check whether the cache is full.

    Args:
        model: the model, after `swan.attach`.
        plan: what each layer stores, or a number: the `retention`; or give `retention`, or `budget`, or `levels`; none
            of them for the plan that a model from `swan.from_pretrained` came with.
        retention: bytes per history token over the bf16 bytes of the same key and value: the plan is
            `Plan.for_retention` with the calibration that the model was attached with.
        budget: the most bytes that the cache may hold: a number, or text like ``"64MiB"``, ``"1.5GB"``, ``"500kB"``.
        on_full: what happens to tokens that do not fit in the budget at the least level: ``"raise"`` a ValueError and
            leave the cache as it was, or ``"evict"`` the oldest tokens of the history, 64 at a time, with one warning.
            Sinks stay, and so do positions: `get_seq_length` goes on counting the tokens seen.
        buffer: recent tokens kept dense (a plan has its own).
        sinks: first tokens kept dense (likewise).
        prefill: ``"chunk"``: tokens given at once see each other dense; ``"windowed"``: the same as token
            by token, whatever the chunks.
        static: fixed memory, for compiled decoding. `reset` keeps it, and the number of rows.
        max_length: tokens that a static cache can hold.
        levels: retentions between which the dial of a static cache moves; it begins at the highest.
        exclude: indices of layers that stay dense; `retention` does not count them, `nbytes` and `compression` do.

    Raises:
        TypeError: `plan` is neither a plan nor a number.
        ValueError: the model is not attached, not exactly one of `plan`, `retention`, `budget` and `levels` is given,
            the budget is not a positive number of bytes, or given to a static cache or a model with layers that keep
            a state, `on_full` is not one of the two or has no budget, a static cache has no `max_length` or a dynamic
            one `levels`, or no layer of full attention is left. Later, in a forward or when rows are repeated: the
            budget or the static cache is full.

    Example:
        ```python
        swan.attach(model, swan.calibrate(model, batches))
        cache = swan.SwanCache(model, retention=0.33)
        model.generate(**inputs, cache=cache)
        cache.retention = 0.25  # the dial: re-packs what is stored

        cache = swan.SwanCache(model, budget="64MiB", on_full="evict")  # the dial moves by itself

        cache = swan.SwanCache(model, levels=[0.5, 0.33], static=True, max_length=4096)
        logits = model(**prompt, cache=cache).logits
        step = torch.compile(model, fullgraph=True)
        step(logits[:, -1:].argmax(-1), cache=cache)  # and so on: compiled once
        cache.retention = 0.33  # compiles once more, and then never again
        ```

    Source: arXiv:2511.18936.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan | float | None = None,
        *,
        retention: float | None = None,
        budget: int | str | None = None,
        on_full: Literal["raise", "evict"] = "raise",
        buffer: int = 128,
        sinks: int = 4,
        prefill: Prefill = "chunk",
        static: bool = False,
        max_length: int | None = None,
        levels: Sequence[float] | None = None,
        exclude: Sequence[int] = (),
    ) -> None:
        model = cast(PreTrainedModel, unwrapped(model))
        attachment = attachment_of(model)
        plan, retention = _source(plan, retention, budget, levels, attachment.plan)
        if on_full not in ("raise", "evict") or (on_full == "evict" and budget is None):
            raise ValueError(
                f"on_full must be 'raise', or 'evict' with a budget; got {on_full!r} and budget={budget!r}"
            )
        _check_static(static, max_length, budget, levels)
        attention = attention_layers(model)
        self._shapes = {index: _shape(attention[index]) for index in sorted(attention)}
        self.budget = None if budget is None else byte_count(budget)
        self.on_full = on_full
        self._warned = False
        self.static, self.max_length, self.exclude = static, max_length, tuple(sorted(set(exclude)))
        kept: dict[str, Any] = {"prefill": prefill, "static": static, "max_length": max_length}
        self._settings = kept | {"exclude": self.exclude}  # with which a saved cache is built again
        self._config, self._dense_itemsize = model.config, 0
        self._calibration = _without(attachment.calibration, self._excluded_rows)
        asked = [retention] if retention is not None else sorted(set(levels or []), reverse=True)
        if plan is not None:
            plans = [plan]
        elif budget is not None:
            plans = Plan.levels(self._calibration, buffer=buffer, sinks=sinks)
        else:
            plans = [Plan.for_retention(r, self._calibration, buffer=buffer, sinks=sinks) for r in asked]
        if len(plans[0].layers) != len(attention):
            raise ValueError(f"the plan has {len(plans[0].layers)} layers, the model {len(attention)}")
        self._levels = [self._of_winnowed(plan) for plan in plans]
        plan = self._levels[0]
        self._retentions = asked or [plan.retention]  # by which the levels of a static cache are called
        layers: list[Any] = DynamicCache(config=model.config).layers
        _check_layers(layers, list(attention))
        _check_excluded(self.exclude, layers)
        if budget is not None and len(layers) > len(attention):
            raise ValueError("a budget needs layers of attention only; this model has others, so give retention")
        winnowed = [type(layer) is DynamicLayer and i not in self.exclude for i, layer in enumerate(layers)]
        if max_length is not None:
            layers = StaticCache(config=model.config, max_cache_len=max_length).layers
        for index, entry in zip(self._shapes, plan.layers, strict=True):
            if winnowed[index]:
                kv = KVCache(entry, buffer=plan.buffer, sinks=plan.sinks, **kept)
                layers[index] = _StaticSwanLayer(kv) if static else _SwanLayer(kv)
        super().__init__(layers=layers)
        self.plan = plan

    @property
    def winnowed(self) -> dict[int, KVCache]:
        """The winnowed caches by layer."""
        return {i: layer.kv for i, layer in enumerate(self.layers) if isinstance(layer, _SwanLayer)}

    @property
    def retention(self) -> float:
        """The dial. Setting it re-packs the history layer by layer and stores new tokens at the new level.

        Lowering frees memory at once; raising keeps what old tokens had. Nothing is recalibrated. With a budget the
        dial goes on to fall as the history grows, and raising it to what does not fit is a ValueError; so is, in a
        static cache, what is none of its levels.
        """
        return self.plan.retention

    @retention.setter
    def retention(self, retention: float) -> None:
        if self.static:
            plan = self._level(retention)
        else:
            kept: dict[str, Any] = {"buffer": self.plan.buffer, "sinks": self.plan.sinks}
            plan = self._of_winnowed(Plan.for_retention(retention, self._calibration, **kept))
        if any(kv.plan_layer is None for kv in self.winnowed.values()):
            raise ValueError("this cache keeps no history in some layers, so its retention is fixed")
        held = self._held
        if self.budget is not None and plan.retention > self.retention and held is not None:
            needed = self._needed(plan, 0, held.shape[0], held.element_size())
            if needed > self.budget:
                raise ValueError(
                    f"retention {plan.retention:.3g} would need {needed} bytes, the budget is {self.budget}; the cache "
                    f"stays at {self.retention:.3g}"
                )
        self._move_to(plan)

    @property
    def dropped(self) -> int:
        """Tokens after the sinks that a full budget has dropped from the history (``on_full="evict"``)."""
        return max((kv.dropped for kv in self.winnowed.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of every storage held: history with its slack, buffers, sinks, sliding layers."""
        return sum(self._layer_bytes(i)[0] for i in range(len(self.layers)))

    @property
    def compression(self) -> float:
        """`nbytes` over the bytes of a dense cache of the same tokens in the same dtype; 1 when empty."""
        stored, dense = (sum(column) for column in zip(*map(self._layer_bytes, range(len(self.layers))), strict=True))
        return stored / dense if dense else 1.0

    def report(self) -> list[dict[str, Any]]:
        """For each winnowed layer its layouts, retention, bytes, compression and captured energy.

        With a budget also the budget (of the whole cache) and the tokens dropped. Captured energy is the share of
        squared length that the layouts keep of the keys and values now in the buffer: no token of the history is
        dense, so those are what can be measured.
        """
        rows = []
        for index, cache in self.winnowed.items():
            entry = cache.plan_layer
            row: dict[str, Any] = {"layer": index, "tokens": cache.length, "history": cache.history_length}
            row["retention"] = 0.0 if entry is None else entry.retention
            if self.budget is not None:
                row |= {"budget": self.budget, "dropped": cache.dropped}
            row |= {"nbytes": cache.nbytes, "compression": cache.nbytes / max(cache.dense_nbytes, 1)}
            for name, dense in (("keys", cache.buffer.keys), ("values", cache.buffer.values)):
                layout = None if entry is None else getattr(entry, name)
                row[name] = None if layout is None else dataclasses.asdict(layout)
                row[f"{name}_energy"] = None if layout is None or dense is None else _energy(dense, layout)
            rows.append(row)
        return rows

    def __repr__(self) -> str:
        kind = "" if self.budget is None else f"budget={self.budget}, on_full={self.on_full!r}, "
        kind += f"exclude={list(self.exclude)}, " if self.exclude else ""
        if self.static:
            kind += f"static, max_length={self.max_length}, levels={[round(r, 3) for r in self._retentions]}, "
        return (
            f"SwanCache({kind}retention={self.retention:.3g}, buffer={self.plan.buffer}, sinks={self.plan.sinks}, "
            f"tokens={int(self.get_seq_length())}, nbytes={self.nbytes}, compression={self.compression:.3g})"
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new tokens of a layer; with a budget, the first layer makes room for those of all layers."""
        if self.budget is None:
            first = next(iter(self._shapes))  # of hybrids not the first layer
            if self.static and layer_idx == first and not torch.compiler.is_compiling():
                next(iter(self.winnowed.values())).check_room(key_states.shape[2])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        rows, _, tokens, _ = key_states.shape
        held = self._held
        dtype = _computed_dtype(key_states)
        fits = held is None or (held.shape[0], held.dtype) == (rows, dtype)  # else the layers refuse it
        if layer_idx == 0 and fits:
            self._dense_itemsize = key_states.element_size()
            self._make_room(tokens, rows, dtype.itemsize)
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        if tokens > 1 and layer.is_sliding:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # not a window into all tokens
        return states

    def reset(self) -> None:
        """Forget all tokens and free the memory; with a budget, begin at the highest level again.

        A static cache keeps its memory and its level: the next tokens are of as many rows, and nothing recompiles.
        """
        super().reset()
        if self.static:
            return
        fresh = DynamicCache(config=self._config).layers  # their own reset keeps the old memory, as zeros
        self.layers = [old if isinstance(old, _SwanLayer) else new for old, new in zip(self.layers, fresh, strict=True)]
        if self.budget is not None:
            self._move_to(self._levels[0])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; a budget makes room first."""
        self._check_rows("repeat")
        self._make_room_for_rows(_rows(self._held) * repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; a budget makes room first where they are more."""
        self._check_rows("select")
        self._make_room_for_rows(torch.arange(_rows(self._held))[indices.cpu()].numel())
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; a budget makes room first where they are more."""
        self._make_room_for_rows(beam_idx.numel())
        super().reorder_cache(cast(Any, beam_idx))

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> None:
        """Move the winnowed layers, or one of them, to the CPU: each comes back by itself when it is used next."""
        for index, layer in enumerate(self.layers):
            if layer_idx in (None, index) and isinstance(layer, _SwanLayer):
                layer.offload()

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file: to go on from a long prompt another day, in another process.

        Args:
            path: a file that is there is replaced whole or not at all.

        Raises:
            TypeError: a layout, or what a layer keeps, has no form in the file.

        Example:
            ```python
            cache = swan.SwanCache(model, retention=0.33)
            model(**document, cache=cache)
            cache.save("document.safetensors")

            cache = swan.SwanCache.load("document.safetensors", model)  # of an attached model, as often as you like
            ```
        """
        winnowed = self.winnowed
        layers = [
            cache_file.kv_state(winnowed[i]) if i in winnowed else cache_file.other_state(layer)
            for i, layer in enumerate(self.layers)
        ]
        about = {
            "bases": cache_file.digest(self._calibration),
            "settings": self._settings,
            "plans": [json.loads(plan.to_json()) for plan in (self.plan, *self._levels)],
            "budget": [self.budget, self.on_full, self._warned],
            "retentions": self._retentions,
        }
        cache_file.write(path, about, layers)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "SwanCache":
        """Read what `save` wrote.

        Args:
            path: the file.
            model: an attached model, with the bases that the cache was filled with; folded or not.

        Raises:
            ValueError: the file is no cache, or the model is not attached or has other bases.
        """
        model = cast(PreTrainedModel, unwrapped(model))
        about, layers = cache_file.read(path)
        if cache_file.digest(attachment_of(model).calibration) != about["bases"]:
            raise ValueError(
                f"{path} was filled in other bases; attach the model with the calibration that it was filled with"
            )
        now, *levels = (Plan.from_json(json.dumps(plan)) for plan in about["plans"])
        settings = about["settings"]
        if settings["prefill"] == "dense":  # what "chunk" was called in files of 0.1.0
            settings["prefill"] = "chunk"
        cache = cls(model, now, **settings)
        cache._levels, cache._retentions = levels, about["retentions"]
        cache.budget, cache.on_full, cache._warned = about["budget"]
        attention, winnowed = attention_layers(model), cache.winnowed
        for index, (layer, state) in enumerate(zip(cache.layers, layers, strict=True)):
            basis = getattr(attention.get(index), "swan_key_basis", None)
            device = model.device if basis is None else basis.device
            if index in winnowed:
                cache_file.restore_kv(winnowed[index], state, device)
                vars(layer)["is_initialized"] = True
            else:
                cache_file.restore_other(layer, state, device)
        return cache

    @property
    def _excluded_rows(self) -> list[int]:
        """Which layers of a plan are excluded."""
        return [row for row, index in enumerate(self._shapes) if index in self.exclude]

    def _of_winnowed(self, plan: Plan) -> Plan:
        """A plan whose retention does not count excluded layers."""
        rows = self._excluded_rows
        return dataclasses.replace(plan, layers=[None if i in rows else x for i, x in enumerate(plan.layers)])

    @property
    def _held(self) -> Tensor | None:
        """Some of what is held, for its batch size and dtype; None when empty."""
        return next((kv.buffer.keys for kv in self.winnowed.values()), None)

    def _check_rows(self, verb: str) -> None:
        for layer in self.layers:
            if not hasattr(layer, "batch_select_indices"):
                raise ValueError(f"{type(layer).__name__} of transformers cannot {verb} rows")

    def _make_room_for_rows(self, rows: int) -> None:
        held = self._held
        if self.budget is not None and held is not None and rows > held.shape[0]:
            self._make_room(0, rows, held.element_size())

    def _make_room(self, tokens: int, rows: int, itemsize: int) -> None:
        """Lower the level, then drop old tokens, until the budget holds so many more tokens in so many rows.

        Raises:
            ValueError: that is not possible, or not allowed; nothing has changed.
        """
        assert self.budget is not None
        if self._needed(self.plan, tokens, rows, itemsize) <= self.budget:
            return
        level = self.retention
        for plan in self._levels:
            if plan.retention < level and self._needed(plan, tokens, rows, itemsize) <= self.budget:
                return self._move_to(plan)
        least = self._levels[-1]
        history = max(kv.history_after(tokens) for kv in self.winnowed.values())
        drops = [min(n, history) for n in range(BLOCK, history + BLOCK, BLOCK)]
        drop = next((n for n in drops if self._needed(least, tokens, rows, itemsize, n) <= self.budget), None)
        if drop is None or self.on_full == "raise":
            raise ValueError(self._full(tokens, rows, itemsize, history if drop is None else None))
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the budget of {self.budget} bytes is full at the least retention, {least.retention:.3g}: from now on "
                "the oldest tokens outside the sinks are dropped; a larger budget keeps them, on_full='raise' stops "
                "instead",
                stacklevel=2,
            )
        for kv in self.winnowed.values():
            kv.evict(drop)
        self._move_to(least)

    def _move_to(self, plan: Plan) -> None:
        winnowed = self.winnowed
        for index, entry in zip(self._shapes, plan.layers, strict=True):
            if index in winnowed:
                assert entry is not None
                winnowed[index].repack(entry)
        self.plan = plan

    def _level(self, retention: float) -> Plan:
        """The plan of a static cache for a retention, as it was asked for or as the plan has it."""
        for asked, plan in zip(self._retentions, self._levels, strict=True):
            if math.isclose(retention, asked) or math.isclose(retention, plan.retention):
                return plan
        raise ValueError(
            f"the dial of this static cache has the levels {', '.join(f'{r:.3g}' for r in self._retentions)}, got "
            f"{retention:.3g}; a new cache can have others (levels=[...])"
        )

    def _needed(self, plan: Plan, tokens: int, rows: int, itemsize: int, drop: int = 0) -> int:
        """Bytes that a budget needs for so many more tokens: of all parts, and of the largest once more."""
        parts = []
        for (index, (kv_heads, d, dv)), entry in zip(self._shapes.items(), plan.layers, strict=True):
            layer = self.layers[index]
            if isinstance(layer, _SwanLayer):
                assert entry is not None
                sizes = {"rows": rows, "kv_heads": kv_heads, "itemsize": itemsize}
                parts += layer.kv.nbytes_after(tokens, entry, **sizes, drop=drop)
            else:
                vector_bytes = kv_heads * (d + dv) * (self._dense_itemsize or itemsize)
                parts.append(_other_nbytes_after(layer, tokens, rows, vector_bytes))
        return sum(parts) + max(parts)

    def _full(self, tokens: int, rows: int, itemsize: int, history: int | None) -> str:
        """Why so many more tokens do not fit, with `history` not even without that history, and what to do."""
        least = self._levels[-1]
        needed = self._needed(least, tokens, rows, itemsize, history or 0)
        text = f"{rows} x {self.get_seq_length() + tokens} tokens"
        what = text if history is None else f"buffer and sinks of {text} alone"
        what += f" with {len(self.exclude)} dense layers" if self.exclude else ""
        evict = "on_full='evict', which drops the oldest tokens, a shorter text, " if history is None else ""
        return (
            f"the budget of {self.budget} bytes is full: {what} need {needed} bytes at the least retention, "
            f"{least.retention:.3g}; give a larger budget, {evict}fewer rows or a smaller buffer"
        )

    def _layer_bytes(self, index: int) -> tuple[int, int]:
        """Bytes held and bytes of a dense cache."""
        layer = self.layers[index]
        if isinstance(layer, _SwanLayer):
            return layer.kv.nbytes, layer.kv.dense_nbytes
        names = ("keys", "values", "conv_states", "recurrent_states")
        held = [t for t in pytree.tree_leaves([getattr(layer, name, None) for name in names]) if isinstance(t, Tensor)]
        size = sum(t.untyped_storage().nbytes() for t in held)
        return size, size


def _check_static(static: bool, max_length: int | None, budget: object, levels: Sequence[float] | None) -> None:
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


def byte_count(budget: int | str) -> int:
    """A budget as a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", budget) if isinstance(budget, str) else None
    if match and match[2] in UNITS:
        size = int(float(match[1]) * UNITS[match[2]])
    elif isinstance(budget, int) and not isinstance(budget, bool):
        size = budget
    else:
        raise ValueError(f"a budget is a number of bytes or text like '64MiB' in {', '.join(UNITS)}; got {budget!r}")
    if size < 1:
        raise ValueError(f"a budget must be at least one byte, got {budget!r}")
    return size


def _rows(held: Tensor | None) -> int:
    return 0 if held is None else held.shape[0]


def _other_nbytes_after(layer: Any, tokens: int, rows: int, vector_bytes: int) -> int:
    """Bytes that a dense or sliding layer holds at most, before and after so many more tokens."""
    if layer.keys is None or layer.keys.numel() == 0:
        held = now = 0
    else:
        held = layer.keys.shape[-2]
        now = sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values)) * rows // layer.keys.shape[0]
    stored = held + tokens
    if layer.is_sliding and tokens > 1 and not getattr(layer, "record_past", False):
        stored = min(stored, layer.sliding_window - 1)  # see `SwanCache.update`
    return max(now, stored * rows * vector_bytes)


class _Strayed(AttributeError):
    """Something else than swan's attention function used keys and values of a `SwanCache`."""

    def __init__(self, asked: str) -> None:
        super().__init__(
            f"a SwanCache reached an attention function that is not swan's (it asked for {asked!r}); call "
            "swan.attach(model, calibration), and leave the attention implementation at 'swan' while the cache is used"
        )


class _Pending:
    """Keys and values of new tokens on their way from `Cache.update` to swan's attention function."""

    def __init__(self, states: Tensor, cache: KVCache) -> None:
        self.states, self.cache = states, cache

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _Strayed(name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise _Strayed(func.__name__)


class _SwanLayer(CacheLayerMixin):
    """One winnowed layer in transformers' cache protocol. The work is done in the attention function."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, kv: KVCache) -> None:
        super().__init__()
        self.kv = kv
        self.home: torch.device | None = None  # where it goes back to, when it is offloaded
        self.is_initialized = not kv.buffer.static

    def __repr__(self) -> str:
        return f"SwanLayer({self.kv.plan_layer})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is allocated with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.prefetch()
        return _Pending(key_states, self.kv), _Pending(value_states, self.kv)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kv.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.kv.length

    def get_max_length(self) -> int:
        return self.kv.max_length or -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.15

    def reset(self) -> None:
        self.kv.reset()

    def crop(self, tokens_to_remove: int) -> None:
        # Negative: tokens to remove. Positive: the length to keep, in versions before 5.15.
        length = self.kv.length
        self.kv.crop(max(length + tokens_to_remove, 0) if tokens_to_remove <= 0 else min(tokens_to_remove, length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.kv.map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.kv.map_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.kv.map_batch(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        if self.home is None and self.kv.buffer.keys is not None:
            self.home = self.kv.buffer.keys.device
            self.kv.move(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.home is not None:
            self.kv.move(self.home)
            self.home = None


class _StaticSwanLayer(_SwanLayer):
    """One winnowed layer with fixed memory. Its length is a tensor: compiled code does not depend on it."""

    is_compileable = True
    supports_early_init = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        dtype = _computed_dtype(key_states)
        self.kv.allocate(key_states.to(dtype), value_states.to(dtype))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        return self.kv.buffer.length

    def reset(self) -> None:
        self.kv.crop(0)


def _swan_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention on the winnowed cache where there is one, else transformers' own SDPA attention."""
    if not isinstance(key, _Pending):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if asked or kwargs.get("output_attentions"):
        raise ValueError(f"swan's attention does not support {', '.join(asked) or 'output_attentions'}")
    cache, key_basis, value_basis = key.cache, module.swan_key_basis, module.swan_value_basis
    assert isinstance(key_basis, Tensor)
    dtype = _computed_dtype(query)
    query, keys, values, key_basis = (t.to(dtype) for t in (query, key.states, value.states, key_basis))
    value_basis = None if value_basis is None else cast(Tensor, value_basis).to(dtype)
    padding = _padding(cache, attention_mask, query.shape[2])
    cache.update(
        rotate(keys, key_basis), values if value_basis is None else rotate(values, value_basis), padding=padding
    )
    out = cache.attend(rotate(query, key_basis), mask=attention_mask, scale=scaling)
    if value_basis is not None:
        out = inverse_rotate(out, value_basis)
    return rearrange(out, "b h t d -> b t h d").contiguous(), None


def _computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention is computed: under autocast norms and RoPE may have left another."""
    place = x.device.type
    casting = torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place)
    return torch.get_autocast_dtype(place) if casting else x.dtype


def _padding(cache: KVCache, mask: Tensor | None, queries: int) -> Tensor | None:
    """Left padding of each row as the mask shows it, until each row has begun; None where there is none."""
    length, known, static = cache.buffer.length, cache.buffer.padding, cache.buffer.static
    if mask is None or (not static and (length > 0 if known is None else bool((known < length).all()))):
        return None
    new = mask[:, 0, -1].index_select(-1, torch.arange(queries, device=mask.device) + length)
    before = torch.where(new.any(-1), new.int().argmax(-1), queries)  # new tokens before the first of a row
    padding = before if known is None else torch.where(known < length, known, length + before)
    return padding if known is not None or bool(padding.any()) else None


def _energy(dense: Tensor, layout: Any) -> float:
    kept = unpack(pack(dense, layout)).double().square().sum()
    total = dense.double().square().sum()
    return (kept / total).item() if total > 0 else 1.0


def _shape(attention: nn.Module) -> tuple[int, int, int]:
    """KV heads, and the dimensions of keys and of values."""
    key_basis = attention.swan_key_basis
    head_dim = getattr(attention, "head_dim", None)
    assert isinstance(key_basis, Tensor)
    value_basis = attention.swan_value_basis
    dv = value_basis.shape[-1] if isinstance(value_basis, Tensor) else head_dim or key_basis.shape[-1]
    return key_basis.shape[0], key_basis.shape[-1], dv


def attachment_of(model: nn.Module) -> _Attachment:
    """What `attach` left in a model; a ValueError if it is not attached."""
    attachment = getattr(unwrapped(model), "_swan_attachment", None)
    if not isinstance(attachment, _Attachment):
        raise ValueError("this model is not attached; call swan.attach(model, calibration) first")
    return attachment


def _config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _try_cache(model: PreTrainedModel) -> None:
    """Run two tokens on a cache: some architectures do other things with one than hand it to their attention."""
    body = cast(nn.Module, model.base_model)
    cache = SwanCache(model, retention=1.0)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad(), evaluating(model):
        body(tokens, **{cache_keyword(body): cache})
    unused = [index for index, kv in cache.winnowed.items() if kv.length != 2]
    if unused:
        raise ValueError(f"it does not use the cache in layers {unused}")


def _check_layers(layers: list[Any], attention: list[int]) -> None:
    """Refuse what transformers itself would keep in other caches than of whole or sliding attention."""
    kinds = [type(layers[index]) if index < len(layers) else None for index in attention]
    other = {kind.__name__ for kind in kinds if kind and kind not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if other or None in kinds:
        raise ValueError(
            f"{len(attention)} attention layers with a cache of their own each were expected, got {len(layers)} caches"
            + (f" with {', '.join(sorted(other))} among them" if other else "")
        )
    if DynamicLayer not in kinds:
        raise ValueError("every layer attends to a sliding window only; there is no history to winnow")


def _without(calibration: Calibration, rows: list[int]) -> Calibration:
    """A calibration in which these layers do not compete for bytes."""
    if calibration.effects is None or not rows:
        return calibration
    effects, index = calibration.effects, torch.tensor(rows)
    masked = Effects(effects.keys.index_fill(0, index, math.nan), effects.values.index_fill(0, index, math.nan))
    return dataclasses.replace(calibration, effects=masked)


def _check_excluded(exclude: tuple[int, ...], layers: list[Any]) -> None:
    full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not set(exclude) <= set(full):
        raise ValueError(f"exclude takes layers of full attention, here {full}, got {list(exclude)}")
    if len(exclude) == len(full):
        raise ValueError("every layer of full attention is excluded; there is no history to winnow")


def _check_foldable(index: int, layer: nn.Module) -> None:
    for name, child in (("v_proj", getattr(layer, "v_proj", None)), ("o_proj", output_projection(layer))):
        if type(child) is not nn.Linear or type(child.weight) is not nn.Parameter:  # of quantized weights it is not
            kind = type(getattr(child, "weight", None)) if type(child) is nn.Linear else type(child)
            got = "no such module" if child is None else f"{kind.__module__}.{kind.__qualname__}"
            raise ValueError(
                f"layer {index}: fold=True needs a plain torch.nn.Linear as {name}, got {got}; attach with fold=False, "
                "which rotates at run time and changes no weight"
            )


def _fold(layer: nn.Module, basis: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Fold the value basis into the projections; returns the changed parameters with what they were."""
    v, o = layer.v_proj, output_projection(layer)
    assert isinstance(v, nn.Linear) and isinstance(o, nn.Linear)
    folded = fold_value_rotation(v.weight, o.weight, basis.to(v.weight.device), v.bias)
    changed = []
    for parameter, new in zip((v.weight, o.weight, v.bias), folded, strict=True):
        if parameter is not None and new is not None:
            changed.append((parameter, parameter.detach().clone()))
            parameter.data.copy_(new)
    return changed
