"""`SwanCache`: a winnowed cache in transformers' protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from swan.calibration import Plan
from swan.calibration.capture import attention_layers, tensor_parallel, unwrapped
from swan.compiling import outside_inference_mode
from swan.integrations.sizes import byte_count
from swan.integrations.transformers import report, saving
from swan.integrations.transformers.attachment import attachment_of, head_shape, query_group
from swan.integrations.transformers.attention import computed_dtype
from swan.integrations.transformers.budget import Budget, OnFull
from swan.integrations.transformers.layers import (
    StaticSwanLayer,
    SwanLayer,
    check_croppable,
    check_excluded,
    check_layers,
    is_full,
    layer_bytes,
)
from swan.integrations.transformers.levels import Dial, check_keep, check_static, origin_of
from swan.kernels import cuda
from swan.kernels.calls import kernels_on
from swan.modules import KVCache
from swan.modules.cache import Prefill
from swan.modules.checks import check_crop, check_room

__all__ = ["SwanCache"]


class SwanCache(Cache):
    """A winnowed cache for `generate` and forward of an attached transformers model.

    Layers with full attention are winnowed; sliding, linear-attention and convolution layers, and those in `exclude`,
    keep transformers' own caches.

    With a `budget`, `nbytes` never exceeds it. The cache begins at retention 1; a forward whose tokens would not
    fit first moves the whole history to the highest of `Plan.levels` at which they do, before anything is stored.
    A level fits if

        nbytes after the forward + the largest piece of a layer <= budget

    where a piece is the keys or the values of a layer's history or of its recent tokens (both, of a sliding layer): it
    exists twice for the moment in which it grows or is packed anew, so that between two layers, too, the cache is
    within the budget. What the model computes with (activations, and tiles of 1024 tokens) is not counted.

    With ``static=True`` the memory for `max_length` tokens is taken with the first ones, and counters are tensors:
    ``torch.compile(model, fullgraph=True)`` decodes without graph breaks, and without a recompilation from the first
    step to the last. The dial of a static cache has the `levels` that were given to it: each compiles once, and moving
    between them afterwards does not. Compiled code does not check whether the cache is full.

    Args:
        model: the model, after `swan.attach`.
        plan: the layouts of each layer, or a number: the `retention`; or give `retention`, or `budget`, or `levels`;
            none of them for the plan that a model from `swan.from_pretrained` came with.
        retention: bytes per history token over the bf16 bytes of the same key and value: the plan is
            `Plan.for_retention` with the calibration that the model was attached with.
        budget: the most bytes that the cache may hold: a number, or text like ``"64MiB"``, ``"1.5GB"``, ``"500kB"``.
        on_full: the response to tokens that do not fit in the budget at the least level: ``"raise"`` a ValueError and
            leave the cache as it was, or ``"evict"`` the oldest tokens of the history, 64 at a time, with one warning;
            with `keep`, also ``keep=1``, each KV head drops those that drew least attention instead.
            Sinks stay, and so do positions: `get_seq_length` goes on counting the tokens seen.
        buffer: newest tokens kept dense (a plan has its own).
        sinks: first tokens kept dense (likewise).
        keep: share of the history's tokens that stay (likewise): after each 64 tokens every KV head drops those that
            drew least attention. The history then takes ``keep * retention`` of its bf16 bytes, and a byte of score for
            each token. In a tenth of the bytes that is better than fewer bits for all, but what is dropped can no
            longer be asked about. Then no mask but one of left padding is taken, and `crop` goes back no further than
            the last choice.
        prefill: ``"chunk"``: tokens given at once see each other dense; ``"windowed"``: the same as token
            by token, for chunks of any size.
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
        cache.retention = 0.25  # the dial: packs the history anew

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
        on_full: OnFull = "raise",
        buffer: int = 128,
        sinks: int = 4,
        keep: float | None = None,
        prefill: Prefill = "chunk",
        static: bool = False,
        max_length: int | None = None,
        levels: Sequence[float] | None = None,
        exclude: Sequence[int] = (),
    ) -> None:
        model = cast(PreTrainedModel, unwrapped(model))
        attachment = attachment_of(model)
        origin = origin_of(plan, retention, budget, levels, attachment.plan)
        if on_full not in ("raise", "evict") or (on_full == "evict" and budget is None):
            raise ValueError(
                f"on_full must be 'raise', or 'evict' with a budget; got {on_full!r} and budget={budget!r}"
            )
        check_static(static, max_length, budget, levels)
        check_keep(keep, plan)
        self.prefill, self.static, self.max_length = prefill, static, max_length
        self.exclude = tuple(sorted(set(exclude)))
        self.set_budget(None if budget is None else byte_count(budget), on_full)
        attention = attention_layers(model)
        self.shapes = {index: head_shape(attention[index]) for index in sorted(attention)}
        self.groups = {index: query_group(attention[index]) for index in self.shapes}
        excluded = [row for row, index in enumerate(self.shapes) if index in self.exclude]
        self.dial = Dial(attachment.calibration, excluded, buffer, sinks, keep, tensor_parallel(model))
        self.dial.start(origin)
        self.plan, self.bases = self.dial.levels[0], attachment.bases
        self._compiled: Plan | None = None
        self._config = model.config
        super().__init__(layers=self._new_layers())

    @property
    def winnowed(self) -> dict[int, KVCache]:
        """The winnowed caches by layer."""
        return {i: layer.kv for i, layer in enumerate(self.layers) if isinstance(layer, SwanLayer)}

    @property
    def retention(self) -> float:
        """The retention of the plan in use: the dial. Setting it packs the history anew, layer by layer.

        Lowering frees memory at once; raising brings no pruned numbers back. Nothing is recalibrated. With a budget the
        dial goes on to fall as the history grows, and raising it beyond the budget is a ValueError; so is, in a
        static cache, a retention that is none of its levels.
        """
        return self.plan.retention

    @retention.setter
    def retention(self, retention: float) -> None:
        plan = self.dial.level(retention) if self.static else self.dial.plan(retention)
        if any(kv.plan_layer is None for kv in self.winnowed.values()):
            raise ValueError("this cache keeps no history in some layers, so its retention is fixed")
        if self.byte_budget is not None:
            self.byte_budget.check_raise(self, plan)
        self.move_to(plan)

    def move_to(self, plan: Plan) -> None:
        """Store the history, and new tokens, in the layouts of a plan; setting `retention` does that by a number."""
        winnowed, recent = self.winnowed, self.stored
        if recent is not None:
            self._compile_ahead(plan, recent)
        for index, plan_layer in zip(self.shapes, plan.layers, strict=True):
            if index in winnowed:
                assert plan_layer is not None
                winnowed[index].repack(plan_layer)
        self.plan = plan

    @property
    def budget(self) -> int | None:
        """The most bytes that the cache may hold, or None."""
        return None if self.byte_budget is None else self.byte_budget.nbytes

    @property
    def on_full(self) -> OnFull:
        """The response of a full budget; ``"raise"`` where there is none."""
        return "raise" if self.byte_budget is None else self.byte_budget.on_full

    def set_budget(self, nbytes: int | None, on_full: OnFull = "raise", warned: bool = False) -> None:
        """Set or lift the budget."""
        self.byte_budget = None if nbytes is None else Budget(nbytes, on_full, warned)

    @property
    def dropped(self) -> int:
        """Tokens after the sinks that the history does not keep (`keep`, or a full budget with ``on_full="evict"``)."""
        return max((kv.dropped for kv in self.winnowed.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all its storages: history with its slack, buffers, sinks, sliding layers."""
        return sum(layer_bytes(layer)[0] for layer in self.layers)

    @property
    def compression(self) -> float:
        """`nbytes` over the bytes of a dense cache of the same tokens in the same dtype; 1 when empty."""
        stored, dense = (sum(column) for column in zip(*map(layer_bytes, self.layers), strict=True))
        return stored / dense if dense else 1.0

    def report(self) -> list[dict[str, Any]]:
        """Report for each winnowed layer its layouts, retention, bytes, compression and captured energy.

        With a budget also the budget (of the whole cache), with `keep` also that, and with both the tokens dropped.
        Captured energy is the share of squared length that the layouts keep of the keys and values now in the buffer,
        1 less that of the error (below 0 where that is larger, as of spikes in codes of 1 bit): tokens of the history
        are no longer dense, so it cannot be measured on them.
        """
        return report.report(self)

    def __repr__(self) -> str:
        settings = "" if self.budget is None else f"budget={self.budget}, on_full={self.on_full!r}, "
        settings += f"exclude={list(self.exclude)}, " if self.exclude else ""
        keep = "" if self.plan.keep is None else f"keep={self.plan.keep:g}, "
        if self.static:
            levels = [round(retention, 3) for retention in self.dial.retentions]
            settings += f"static, max_length={self.max_length}, levels={levels}, "
        return (
            f"SwanCache({settings}retention={self.retention:.3g}, {keep}buffer={self.plan.buffer}, "
            f"sinks={self.plan.sinks}, tokens={int(self.get_seq_length())}, nbytes={self.nbytes}, "
            f"compression={self.compression:.3g})"
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new tokens of a layer; with a budget, the first layer makes room for those of all layers."""
        rows, _, tokens, _ = key_states.shape
        first = next(iter(self.shapes))  # in hybrid models not layer 0
        if self.static and layer_idx == first and not torch.compiler.is_compiling():
            assert self.max_length is not None
            check_room(tokens, next(iter(self.winnowed.values())).length, self.max_length)
        if self._compiled is not self.plan and not torch.compiler.is_compiling():
            self._compile_ahead(self.plan, key_states)
        layer: Any = self.layers[layer_idx]
        if self.static and not layer.is_initialized:
            _take_memory(layer, key_states, value_states)
        if self.byte_budget is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        stored, dtype = self.stored, computed_dtype(key_states)
        fits = stored is None or (stored.shape[0], stored.dtype) == (rows, dtype)  # else the layers raise an error
        if layer_idx == first and fits:
            self.byte_budget.dense_itemsize = key_states.element_size()
            self.byte_budget.make_room(self, tokens, rows, dtype.itemsize)
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if tokens > 1 and layer.is_sliding:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # views would keep all tokens in memory
        return states

    def reset(self) -> None:
        """Forget all tokens and free the memory; with a budget, begin at the highest level again.

        A static cache keeps its memory and its level: the next tokens are of as many rows, and nothing recompiles.
        """
        super().reset()
        if self.static:
            return
        fresh = DynamicCache(config=self._config).layers  # the reset of transformers keeps the memory, as zeros
        self.layers = [old if isinstance(old, SwanLayer) else new for old, new in zip(self.layers, fresh, strict=True)]
        if self.byte_budget is not None:
            self.move_to(self.dial.levels[0])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: how many, as a negative number; a positive one is the length to keep.

        Raises:
            ValueError: a layer of transformers cannot, or tokens before it were dropped by score (`keep`); nothing has
                changed then.
        """
        check_croppable(self.layers)
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - int(self.get_seq_length()), 0)
        for kv in self.winnowed.values():
            check_crop(max(kv.length + tokens_to_remove, 0), kv.state)
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; a budget makes room first."""
        self._check_rows("repeat")
        self._make_room_for_rows(repeats * (0 if self.stored is None else self.stored.shape[0]))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; a budget makes room first where they are more."""
        self._check_rows("select")
        rows = torch.arange(0 if self.stored is None else self.stored.shape[0], device="cpu")
        self._make_room_for_rows(rows[indices.cpu()].numel())
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; a budget makes room first where they are more."""
        self._make_room_for_rows(beam_idx.numel())
        super().reorder_cache(cast(Any, beam_idx))

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> None:
        """Move the winnowed layers, or one of them, to the CPU: each comes back by itself when it is used next."""
        for index, layer in enumerate(self.layers):
            if layer_idx in (None, index) and isinstance(layer, SwanLayer):
                layer.offload()

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file: to go on from a long prompt another day, in another process.

        Args:
            path: the file; an older one is replaced whole or not at all.

        Raises:
            TypeError: a layout, or an attribute of a layer, cannot be written to a file.

        Example:
            ```python
            cache = swan.SwanCache(model, retention=0.33)
            model(**document, cache=cache)
            cache.save("document.safetensors")

            cache = swan.SwanCache.load("document.safetensors", model)  # of an attached model, as often as you like
            ```
        """
        saving.save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "SwanCache":
        """Read a file that `save` wrote.

        Args:
            path: the file.
            model: an attached model, with the bases that the cache was filled with; folded or not.

        Raises:
            ValueError: the file is no cache, or the model is not attached or has other bases.
        """
        return saving.load(cls, path, cast(PreTrainedModel, unwrapped(model)))

    @property
    def stored(self) -> Tensor | None:
        """The recent keys of one layer, for their batch size and dtype; None when empty."""
        return next((kv.state.k_recent for kv in self.winnowed.values()), None)

    @outside_inference_mode
    def _new_layers(self) -> list[Any]:
        layers: list[Any] = DynamicCache(config=self._config).layers
        check_layers(layers, list(self.shapes), self._config)
        check_excluded(self.exclude, layers, self._config)
        if self.byte_budget is not None and len(layers) > len(self.shapes):
            raise ValueError("a budget needs layers of attention only; this model has others, so give retention")
        winnowed = [is_full(layer, self._config) and i not in self.exclude for i, layer in enumerate(layers)]
        if self.max_length is not None:
            layers = StaticCache(config=self._config, max_cache_len=self.max_length).layers
        settings: dict[str, Any] = {"prefill": self.prefill, "static": self.static, "max_length": self.max_length}
        for index, plan_layer in zip(self.shapes, self.plan.layers, strict=True):
            if winnowed[index]:
                keep = None if plan_layer is None else self.plan.keep
                kv = KVCache(plan_layer, buffer=self.plan.buffer, sinks=self.plan.sinks, keep=keep, **settings)
                layers[index] = (StaticSwanLayer if self.static else SwanLayer)(kv, self.bases)
        return layers

    def _compile_ahead(self, plan: Plan, like: Tensor) -> None:
        """Compile the kernels of all layers at once for caches of keys like these, where there are GPU kernels."""
        self._compiled = plan
        if kernels_on(like.device) is cuda:
            plans = self.dial.levels if self.static else [plan]
            layers = [layer for each in plans for layer in each.layers if layer is not None]
            cuda.compile_ahead(layers, computed_dtype(like), like.device)

    def _check_rows(self, verb: str) -> None:
        for layer in self.layers:
            if not hasattr(layer, "batch_select_indices"):
                raise ValueError(f"{type(layer).__name__} of transformers cannot {verb} rows")

    def _make_room_for_rows(self, rows: int) -> None:
        if self.byte_budget is not None:
            self.byte_budget.make_room_for_rows(self, rows)


@outside_inference_mode
def _take_memory(layer: Any, key_states: Tensor, value_states: Tensor) -> None:
    """Have a static layer, swan's or transformers', take its memory for tokens like these."""
    layer.lazy_initialization(key_states, value_states)
