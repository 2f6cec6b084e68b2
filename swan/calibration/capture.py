"""Observation of q, k and v inside the attention function of a model: no hooks per architecture."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from swan.modules import SwanAttention

__all__ = [
    "CHANGE_SCORES", "Observed", "attention_layers", "boolean_mask", "call", "config_fingerprint", "decoder",
    "device_of", "evaluating", "fingerprint", "given", "hides",
    "observing", "register_attention", "swan_layers", "tensor_parallel", "unwrapped",
]  # fmt: skip


@dataclass(frozen=True)
class Observed:
    """One forward of one attention layer.

    Args:
        module: the layer.
        q: queries after RoPE ``[batch, heads, tokens, d]``.
        k: keys after RoPE ``[batch, kv_heads, tokens, d]``.
        v: values ``[batch, kv_heads, tokens, dv]``.
        out: input of the output projection ``[batch, tokens, heads, dv]``.
        mask: boolean ``[batch or 1, heads or 1, tokens, tokens]``, or None where it is causal.
        scale: factor of the scores.
        sliding: the layer attends to a window only.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    mask: Tensor | None
    scale: float
    sliding: bool

    @property
    def real(self) -> Tensor | None:
        """``[batch, tokens]``, False for padding: a token is real where it sees itself."""
        if self.mask is None:
            return None
        seen = self.mask.any(1).diagonal(dim1=-2, dim2=-1)
        return seen.expand(self.k.shape[0], -1)


Observer = Callable[[int, Observed], None]
OBSERVE = "swan_observe"  # name of the observing attention function in transformers
# Arguments of attention functions that change the scores.
CHANGE_SCORES = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")

HIDING = -1e3  # a mask that is added to scores hides a token by a number of at most this: its weight is 0

_observer: Observer | None = None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model in a `peft.PeftModel`, whose adapters stay in it; any other model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model  # pyright: ignore[reportReturnType]


def swan_layers(model: nn.Module) -> list[SwanAttention]:
    """List the `SwanAttention` modules of a model, in order."""
    return [module for module in model.modules() if isinstance(module, SwanAttention)]


def decoder(model: nn.Module) -> Any:
    """Return the part of a transformers model that reads text: towers for images or sound have attention of their own.

    It is the outermost module with the configuration of the text; the model itself where there is none.
    """
    text = _config(model)
    parts = (m for m in model.modules() if getattr(m, "config", None) is text and hasattr(m, "set_attn_implementation"))
    return next(parts, model)


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the attention modules of the decoder of a transformers model by their layer index.

    Raises:
        ValueError: a layer has two.
    """
    layers: dict[int, nn.Module] = {}
    for module in decoder(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal"):
            if index in layers:
                names = f"{type(layers[index]).__name__} and {type(module).__name__}"
                raise ValueError(f"layer {index} of {type(model).__name__} has two attentions ({names}): not supported")
            layers[index] = module
    return layers


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module computes on, at its beginning where there are several.

    Weights that accelerate keeps elsewhere are on `meta` until they are used: its hooks know where that is.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(device)
        for t in itertools.chain(part.parameters(recurse=False), part.buffers(recurse=False)):
            if t.device.type != "meta":
                return t.device
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def hides(window: int | None, config: Any) -> bool:
    """Tell if a sliding window hides anything from a model with a configuration: some are wider than its positions."""
    positions = (
        None if config is None else getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    )
    return window is not None and (positions is None or window < positions)


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Give transformers an attention function under a name, and with it the boolean masks of SDPA."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def given(arguments: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return those of the names that an attention function was given a value for."""
    return [name for name in names if arguments.get(name) is not None and arguments[name] is not False]


def boolean_mask(
    module: nn.Module, mask: Tensor | None, query: Tensor, is_causal: bool | None, before: int | Tensor = 0
) -> Tensor | None:
    """Return what an attention function is given as its mask as a boolean one, True where a token is seen.

    Args:
        module: the attention module.
        mask: a boolean mask; numbers that are added to the scores; or None, which stands for what `is_causal` says.
        query: of the tokens that attend ``[batch, heads, tokens, d]``.
        is_causal: as the attention function got it; None for what the module says.
        before: tokens before these.

    Returns:
        The mask; None where it is causal.

    Raises:
        ValueError: the numbers do more than hide tokens.
        TypeError: there are such numbers in compiled code, which cannot look at them.
    """
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        queries = query.shape[2]
        if causal or queries == 1:
            return None
        return torch.ones(1, 1, queries, int(before) + queries, dtype=torch.bool, device=query.device)
    if not mask.is_floating_point():
        return mask
    if torch.compiler.is_compiling():
        raise TypeError(f"in compiled code a mask must be boolean (True where a token is seen), got {mask.dtype}")
    seen = ~(mask <= HIDING)
    if bool(((mask != 0) & seen).any()):
        raise ValueError(
            f"{type(module).__name__} computes its attention with a mask of {mask.dtype} that changes scores (it has "
            f"other numbers than 0, and {HIDING:g} or less, which hide tokens): not supported; a boolean mask is True "
            "where a token is seen"
        )
    return seen


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch as `calibrate` takes it (token ids, or a mapping of arguments); return its output."""
    device = device_of(model)
    kwargs: dict[str, Any] = {} if swan_layers(model) else {"use_cache": False}
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        kwargs |= {name: _moved(t, device) if isinstance(t, Tensor) else t for name, t in named.items()}
        return model(**kwargs)
    return model(_moved(batch, device), **kwargs)


def _moved(t: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device; one of inference mode is copied, as no backward pass could use it."""
    t = t.to(device)
    return t.clone() if t.is_inference() else t


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return the fields of the configuration in which a calibration and its model must agree; never weights.

    The vocabulary is not among them: words may be added to a model that was calibrated.
    """
    layers = swan_layers(model)
    if layers:
        return {"kind": "swan", "layers": [[a.dim, a.heads, a.kv_heads, a.head_dim, a.rope] for a in layers]}
    return config_fingerprint(_config(model))


def config_fingerprint(config: Any) -> dict[str, Any]:
    """Return the `fingerprint` of a configuration of transformers."""
    config = config.get_text_config(decoder=True)
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {"kind": "transformers", **{name: _field(config, name) for name in names}}


@contextlib.contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer`, within a with block, with the index of an attention layer and each of its forwards."""
    layers = swan_layers(model)
    watch = _observe_swan(layers, observer) if layers else _observe_transformers(model, observer)
    with watch:
        yield


def tensor_parallel(model: nn.Module) -> tuple[int, int]:
    """Return rank and size of a model's tensor parallelism: each rank has equal shares of the heads, in their order."""
    ranks = getattr(model, "tp_size", None) or 1
    if ranks == 1:
        return 0, 1
    mesh = cast(Any, model)._device_mesh
    mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    return mesh.get_local_rank(), ranks


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within a with block; each module returns to the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _observe_swan(layers: list[SwanAttention], observer: Observer) -> Iterator[None]:
    def observe(index: int, layer: SwanAttention) -> Callable[..., None]:
        scale = layer.head_dim**-0.5
        return lambda q, k, v, out: observer(index, Observed(layer, q, k, v, out, None, scale, sliding=False))

    for index, layer in enumerate(layers):
        layer.observer = observe(index, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


@contextlib.contextmanager
def _observe_transformers(model: nn.Module, observer: Observer) -> Iterator[None]:
    global _observer
    config = _config(model)
    import transformers

    register_attention(OBSERVE, _observed_attention)
    assert isinstance(model, transformers.PreTrainedModel)
    part, implementation = decoder(model), config._attn_implementation
    if _observer is not None:
        raise RuntimeError("another calibration is running in this process; wait for it")
    _observer = observer
    part.set_attn_implementation(OBSERVE)
    try:
        yield
    finally:
        _observer = None
        part.set_attn_implementation(implementation)


def _observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert _observer is not None
    if unsupported := given(kwargs, CHANGE_SCORES):
        raise ValueError(f"{type(module).__name__} computes its attention with {', '.join(unsupported)}: not supported")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{type(module).__name__} attends to other tokens than its own: not supported")
    mask = boolean_mask(module, attention_mask, query, kwargs.get("is_causal"))
    index = module.layer_idx
    assert isinstance(index, int)
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if torch.is_grad_enabled() and not out.requires_grad:
        out.requires_grad_()  # it does not, where the parameters of the model are frozen
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    sliding = hides(kwargs.get("sliding_window"), getattr(module, "config", None))
    _observer(index, Observed(module, query, key, value, out, mask, scale, sliding))
    return out, None


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise TypeError(
            f"{type(model).__name__} has no SwanAttention modules and is not a transformers model; build its attention "
            "from swan.SwanAttention, or load it with transformers"
        )
    if config.is_encoder_decoder:
        raise TypeError(f"{type(model).__name__} has an encoder and a decoder; swan is for decoders alone")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise TypeError(
            f"{type(model).__name__} makes keys and values from a latent vector (MLA): its cache should hold that, and "
            "swan does not winnow it"
        )
    if shared := getattr(text, "num_kv_shared_layers", 0):
        raise TypeError(
            f"{type(model).__name__} has {shared} layers that use the keys and values of earlier ones: swan does not "
            "winnow those"
        )
    if crossing := getattr(text, "cross_attention_layers", None):
        raise TypeError(
            f"{type(model).__name__} attends to images in layers {list(crossing)} (cross-attention): swan does not "
            "winnow those"
        )
    return text


def _field(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers raises it for a field that differs from layer to layer
        return None
