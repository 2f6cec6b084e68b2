"""swan in Hugging Face transformers: an attention function, `SwanCache`, attach and detach."""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from swan.calibration import Calibration, Plan
from swan.calibration.capture import attention_layers, evaluating
from swan.calibration.moments import output_projection
from swan.functional.rotation import fold_value_rotation, inverse_rotate, rotate
from swan.modules import KVCache
from swan.modules.cache import Prefill
from swan.packed import pack, unpack

try:
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError as error:
    raise ImportError("swan works with transformers >= 5.10: pip install 'swan-attention[hf]'") from error

__all__ = ["SwanCache", "attach", "cache_keyword", "detach", "is_attached"]

NAME = "swan"  # of the attention function in transformers
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cache")


@dataclass
class _Attachment:
    """What `detach` needs to put a model back as it was."""

    implementation: str
    folded: list[tuple[nn.Parameter, Tensor]]  # parameters and what they were


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
    attachment = _Attachment(_config(model)._attn_implementation, [])
    model._swan_attachment = attachment  # type: ignore[assignment]
    for index, bases in zip(sorted(layers), calibration.layers, strict=True):
        layer = layers[index]
        place = next((p for p in layer.parameters() if p.is_floating_point()), None)
        options: dict[str, Any] = (
            {"dtype": model.dtype} if place is None else {"dtype": place.dtype, "device": place.device}
        )
        layer.register_buffer("swan_key_basis", bases.key_basis.to(**options), persistent=False)
        if fold:
            attachment.folded += _fold(layer, bases.value_basis)
        value_basis = None if fold else bases.value_basis.to(**options)
        layer.register_buffer("swan_value_basis", value_basis, persistent=False)
    model.set_attn_implementation(NAME)
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
    del model._swan_attachment


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` was called on this model."""
    return isinstance(getattr(model, "_swan_attachment", None), _Attachment)


def cache_keyword(model: nn.Module) -> str:
    """Name under which this version of transformers takes a cache: ``past_key_values``, or ``cache``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class SwanCache(Cache):
    """A winnowed cache for `generate` and forward of an attached transformers model.

    Layers with full attention are winnowed; sliding layers keep transformers' own cache.

    Args:
        model: the model, after `swan.attach`.
        plan: what each layer stores; or give `retention`.
        retention: bytes per history token over the bf16 bytes of the same key and value: the plan is
            `Plan.for_retention`.
        buffer: recent tokens kept dense (with `retention`; a plan has its own).
        sinks: first tokens kept dense (likewise).
        prefill: ``"dense"``: tokens given at once see each other dense; ``"windowed"``: the same as token
            by token, whatever the chunks.

    Raises:
        ValueError: the model is not attached, or not exactly one of `plan` and `retention` is given.

    Example:
        ```python
        swan.attach(model, swan.calibrate(model, batches))
        cache = swan.SwanCache(model, retention=0.33)
        model.generate(**inputs, past_key_values=cache)
        cache.retention = 0.25  # the dial: re-packs what is stored
        ```

    Source: arXiv:2511.18936.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan | None = None,
        *,
        retention: float | None = None,
        buffer: int = 128,
        sinks: int = 4,
        prefill: Prefill = "dense",
    ) -> None:
        if not is_attached(model):
            raise ValueError("this model is not attached; call swan.attach(model, calibration) first")
        if (plan is None) == (retention is None):
            raise ValueError("give either a plan or a retention")
        attention = attention_layers(model)
        self._dims = [_dims(attention[index]) for index in sorted(attention)]
        if retention is not None:
            plan = Plan.for_retention(retention, dims=self._dims, buffer=buffer, sinks=sinks)
        assert plan is not None
        if len(plan.layers) != len(self._dims):
            raise ValueError(f"the plan has {len(plan.layers)} layers, the model {len(self._dims)}")
        layers: list[Any] = DynamicCache(config=model.config).layers
        _check_layers(layers, len(attention))
        for index, entry in zip(sorted(attention), plan.layers, strict=True):
            if type(layers[index]) is DynamicLayer:
                kv = KVCache(entry, buffer=plan.buffer, sinks=plan.sinks, prefill=prefill)
                layers[index] = _SwanLayer(kv)
        super().__init__(layers=layers)
        self.plan = plan

    @property
    def winnowed(self) -> dict[int, KVCache]:
        """The winnowed caches by layer."""
        return {i: layer.kv for i, layer in enumerate(self.layers) if isinstance(layer, _SwanLayer)}

    @property
    def retention(self) -> float:
        """The dial. Setting it re-packs the history layer by layer and stores new tokens at the new level.

        Lowering frees memory at once; raising keeps what old tokens had. Nothing is recalibrated.
        """
        return self.plan.retention

    @retention.setter
    def retention(self, retention: float) -> None:
        plan = Plan.for_retention(retention, dims=self._dims, buffer=self.plan.buffer, sinks=self.plan.sinks)
        if any(entry is None for entry in self.plan.layers):
            raise ValueError("this cache keeps no history in some layers, so its retention is fixed")
        for index, cache in self.winnowed.items():
            entry = plan.layers[index]
            assert entry is not None
            cache.repack(entry)
        self.plan = plan

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
        """For each winnowed layer its layouts, bytes, compression and captured energy.

        Captured energy is the share of squared length that the layouts keep of the keys and values now in
        the buffer: no token of the history is dense, so those are what can be measured.
        """
        rows = []
        for index, cache in self.winnowed.items():
            entry = cache.plan_layer
            row: dict[str, Any] = {"layer": index, "tokens": cache.length, "history": cache.history_length}
            row |= {"nbytes": cache.nbytes, "compression": cache.nbytes / max(cache.dense_nbytes, 1)}
            for name, dense in (("keys", cache.buffer.keys), ("values", cache.buffer.values)):
                layout = None if entry is None else getattr(entry, name)
                row[name] = None if layout is None else dataclasses.asdict(layout)
                row[f"{name}_energy"] = None if layout is None or dense is None else _energy(dense, layout)
            rows.append(row)
        return rows

    def __repr__(self) -> str:
        return (
            f"SwanCache(retention={self.retention:.3g}, buffer={self.plan.buffer}, sinks={self.plan.sinks}, "
            f"tokens={self.get_seq_length()}, nbytes={self.nbytes}, compression={self.compression:.3g})"
        )

    def _layer_bytes(self, index: int) -> tuple[int, int]:
        """Bytes held and bytes of a dense cache."""
        layer = self.layers[index]
        if isinstance(layer, _SwanLayer):
            return layer.kv.nbytes, layer.kv.dense_nbytes
        held = [t for name in ("keys", "values") if isinstance(t := getattr(layer, name, None), Tensor)]
        size = sum(t.untyped_storage().nbytes() for t in held)
        return size, size


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
        self.is_initialized = True

    def __repr__(self) -> str:
        return f"SwanLayer({self.kv.plan_layer})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is allocated with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return _Pending(key_states, self.kv), _Pending(value_states, self.kv)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kv.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.kv.length

    def get_max_length(self) -> int:
        return -1

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
        raise NotImplementedError("a SwanCache stays on its device; make it smaller with cache.retention instead")

    prefetch = offload


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
    values = value.states if value_basis is None else rotate(value.states, cast(Tensor, value_basis))
    padding = _padding(cache, attention_mask, query.shape[2])
    cache.update(rotate(key.states, key_basis), values, padding=padding)
    out = cache.attend(rotate(query, key_basis), mask=attention_mask, scale=scaling)
    if value_basis is not None:
        out = inverse_rotate(out, cast(Tensor, value_basis))
    return rearrange(out, "b h t d -> b t h d").contiguous(), None


def _padding(cache: KVCache, mask: Tensor | None, queries: int) -> Tensor | None:
    """Left padding of each row as the mask shows it, until each row has begun; None where there is none."""
    known = cache.buffer.padding
    begun = cache.length > 0 if known is None else bool((known < cache.length).all())
    if mask is None or begun:
        return None
    columns = cache.length + queries
    visible = mask[:, 0, -1, :columns]
    padding = torch.where(visible.any(-1), visible.int().argmax(-1), columns)
    return padding if known is not None or bool(padding.any()) else None


def _energy(dense: Tensor, layout: Any) -> float:
    kept = unpack(pack(dense, layout)).double().square().sum()
    total = dense.double().square().sum()
    return (kept / total).item() if total > 0 else 1.0


def _dims(attention: nn.Module) -> tuple[int, int]:
    key_basis = attention.swan_key_basis
    head_dim = getattr(attention, "head_dim", None)
    assert isinstance(key_basis, Tensor)
    value_basis = attention.swan_value_basis
    dv = value_basis.shape[-1] if isinstance(value_basis, Tensor) else head_dim or key_basis.shape[-1]
    return key_basis.shape[-1], dv


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


def _check_layers(layers: list[Any], count: int) -> None:
    """Refuse what transformers itself would keep in other caches than of whole or sliding attention."""
    other = [type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if other or len(layers) != count:
        raise ValueError(
            f"{count} attention layers with a cache of their own each were expected, got {len(layers)} caches"
            + (f" with {', '.join(sorted(set(other)))} among them" if other else "")
        )
    if all(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError("every layer attends to a sliding window only; there is no history to winnow")


def _check_foldable(index: int, layer: nn.Module) -> None:
    for name, child in (("v_proj", getattr(layer, "v_proj", None)), ("o_proj", output_projection(layer))):
        if type(child) is not nn.Linear:
            got = "no such module" if child is None else type(child).__name__
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
