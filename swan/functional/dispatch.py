"""The choice of implementations: every `impl` is resolved here.

Only what sdpa and flex cannot give (a log-sum-exp, gradients) is refused elsewhere: in attention.py.

``"auto"`` follows a table; the kernels are ``"cpp"`` on a CPU and ``"cuda"`` on an NVIDIA GPU:

| function | CPU | GPU |
|---|---|---|
| `dense_attention` | sdpa; compiled for a log-sum-exp under autograd, in float64, or of values of another dimension | sdpa; compiled for a log-sum-exp under autograd, with a mask, in float32, of values of another dimension, or before Ampere |
| `packed_attention`, `swan_attention` | the kernel for up to 16 query rows of a KV head, layouts that it reads, no gradients; else tensor code in tiles | the kernel for up to 256 query rows, likewise; else tensor code in tiles |
| `pack`, `KVCache.update` | the kernel for `Graded` layouts, no gradients; else tensor code | likewise |

On a GPU, tensor code that attends to layouts that the kernel does not read says so once. An `impl` that is named and
cannot run raises an error that says why; it never becomes another.
"""  # noqa: E501

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from swan.compiling import constant_result
from swan.kernels import calls, cuda
from swan.kernels.calls import kernels_on
from swan.storage import LayerPlan, Layout, Packed
from swan.storage.packed import unpack_mixed

__all__ = [
    "NO_LSE", "Impl", "check_cache_impl", "check_packed_impl", "dense_impl", "is_kernel", "one_call_serves",
    "pack_impl", "packed_impl", "pages_kernel", "sdpa_gives_lse", "store_in_pages_kernel", "store_kernel",
    "take_in_kernel", "unpack_kernel",
]  # fmt: skip

Impl = Literal["auto", "reference", "sdpa", "flex", "compiled", "cpp", "cuda"]
KERNELS = ("cpp", "cuda")
DENSE = ("auto", "reference", "sdpa", "flex", "compiled")
PACKED = ("auto", "reference", "sdpa", "compiled", *KERNELS)
PACK = ("auto", "compiled", *KERNELS)
NO_LSE = (
    "impl='sdpa' gives a log-sum-exp for keys and values of one head dimension, on a CPU not in float64, on a GPU "
    "(Ampere or newer) in bfloat16 and float16 without a mask (device {device}, {d} and {dv}, {dtype}); use "
    "impl='compiled'"
)
DEVICES = {"cpp": "a CPU", "cuda": "an NVIDIA GPU"}


def is_kernel(impl: str) -> bool:
    """Tell if an implementation is a kernel over packed tokens."""
    return impl in KERNELS


def dense_impl(impl: Impl, q: Tensor, k: Tensor, v: Tensor, masked: bool, return_lse: bool) -> Impl:
    """Resolve the `impl` of `dense_attention`.

    Raises:
        ValueError: there is no implementation of this name.
    """
    _check_known("dense_attention", impl, DENSE)
    if impl != "auto":
        return impl
    if not return_lse:
        return "sdpa"
    differentiated = torch.is_grad_enabled() and _require_grad(q, k, v)
    return "sdpa" if sdpa_gives_lse(q, v, masked) and not differentiated else "compiled"


def packed_impl(impl: Impl, q: Tensor, k: Packed, v: Packed) -> Impl:
    """Resolve the `impl` of `packed_attention` and `swan_attention`; "auto" stays "auto" where tensor code serves.

    Raises:
        TypeError: keys or values are not `Packed`.
        ValueError: there is no implementation of this name, or it is a kernel that does not attend to these layouts, or
            not on this device.
        RuntimeError: it is a kernel, and cannot be built.
    """
    for name, packed in (("k", k), ("v", v)):
        if not isinstance(packed, Packed):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"{name} must be Packed, as swan.pack(x, layout) returns it, got {type(packed).__name__}; plain "
                "tensors are for dense_attention"
            )
    if impl != "auto":
        check_packed_impl(impl, q, k.format, v.format)
        return impl
    kernels, rows = kernels_on(q.device), q.shape[1] // k.shape[1] * q.shape[2]
    if kernels is None or rows > kernels.MOST_ROWS:
        return impl
    if torch.is_grad_enabled() and _require_grad(q, *k.tensors, *v.tensors):
        return impl
    if not kernels.attends(q.dtype, k.format, v.format):
        if kernels is cuda:
            cuda.say_slow(f"impl='cuda' attends to {cuda.ATTENDS}; not to {k.format} and {v.format} with {q.dtype}")
        return impl
    return kernels.IMPL if kernels.built(q.device) else impl


def pages_kernel(q: Tensor, k: Packed, v: Packed) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the kernel that attends to these pages with queries of sequences that share them, or None.

    On a GPU one warning says why there is none, as there is one where kernels cannot be built.

    Args:
        q: queries ``[batch, heads, queries, d]``.
        k: packed keys of all pages ``[pages, kv_heads, tokens of a page, d]``.
        v: packed values, likewise.
    """
    kernels, rows = kernels_on(q.device), q.shape[1] // k.shape[1] * q.shape[2]
    if kernels is None or not kernels.attends_pages(k.shape[2]) or rows > kernels.MOST_ROWS:
        return None
    if not (kernels.attends(q.dtype, k.format, v.format) and kernels.attends_dense(q.dtype)):
        if kernels is cuda:
            cuda.say_slow(
                f"the kernel over pages attends to {cuda.PAGES}; not to {k.format} and {v.format} with {q.dtype}"
            )
        return None
    return calls.attend_pages if kernels.built(q.device) else None


def store_in_pages_kernel(k: Tensor, v: Tensor, keys: Layout, values: Layout) -> Callable[..., None] | None:
    """Return the kernel that packs keys and values into pages, or None: then tensor code copies what was packed."""
    kernels = kernels_on(k.device)
    if kernels is None or not kernels.packs_pages(k.dtype, keys, values):
        return None
    if torch.is_grad_enabled() and _require_grad(k, v):
        return None
    return calls.store_in_pages if kernels.built(k.device) else None


def check_packed_impl(impl: Impl, q: Tensor, keys: Layout, values: Layout) -> None:
    """Raise what `packed_impl` does, where a named implementation is unknown or does not read these layouts."""
    if impl == "flex":
        raise ValueError(
            "impl='flex' cannot read packed tensors, FlexAttention has no gather by token; use 'auto' or 'compiled'"
        )
    _check_known("packed_attention", impl, PACKED)
    if is_kernel(impl):
        kernels = _named(impl, q.device)
        if not kernels.attends(q.dtype, keys, values):
            raise ValueError(
                f"impl={impl!r} attends to {kernels.ATTENDS}; not to {keys} and {values} with "
                f"{q.dtype}; use impl='auto'"
            )
        kernels.require(q.device)


def check_cache_impl(impl: Impl, q: Tensor, v: Tensor, plan_layer: LayerPlan | None) -> None:
    """Raise what attention over a cache would, where an implementation that is named cannot serve it.

    Raises:
        ValueError: there is no implementation of this name, it does not read the layouts, or gives no log-sum-exp.
        RuntimeError: it is a kernel, and cannot be built.
    """
    if plan_layer is None:
        if not is_kernel(impl):
            _check_known("dense_attention", impl, DENSE)
        return
    check_packed_impl(impl, q, plan_layer.keys, plan_layer.values)
    if impl == "sdpa" and not sdpa_gives_lse(q, v, masked=False):
        raise ValueError(NO_LSE.format(device=q.device.type, d=q.shape[-1], dv=v.shape[-1], dtype=q.dtype))


def one_call_serves(q: Tensor, k: Packed, v: Packed, k_recent: Tensor, v_recent: Tensor) -> bool:
    """Tell if one call of a kernel serves history and recent tokens together."""
    if k_recent.ndim != 4 or v_recent.ndim != 4 or not kernels_on(q.device).attends_dense(q.dtype):
        return False
    if torch.is_grad_enabled() and _require_grad(q, k_recent, v_recent):
        return False
    (_, k_heads, k_tokens, d), (_, v_heads, v_tokens, dv) = k.shape, v.shape
    keys_fit = (k_recent.shape[1], k_recent.shape[3], k_recent.dtype) == (k_heads, d, k.dtype)
    values_fit = (v_recent.shape[1], v_recent.shape[3], v_recent.dtype) == (v_heads, dv, v.dtype)
    return keys_fit and values_fit and k_tokens == v_tokens


def pack_impl(impl: Impl, x: Tensor, layout: Layout | None) -> Impl:
    """Resolve the `impl` of `pack`: ``"compiled"`` (tensor code) or a kernel that knows the layout and runs here.

    Raises:
        ValueError: there is no implementation of this name, or it cannot store `x` in the layout.
        RuntimeError: it is a kernel, and cannot be built.
    """
    if impl != "auto":
        _check_known("pack", impl, PACK)
    if layout is None or impl == "compiled":  # nothing is stored, or by tensor code
        return impl
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if impl == "auto":
        kernels = kernels_on(x.device)
        if kernels is None or differentiated or not kernels.packs(x.dtype, layout):
            return "compiled"
        return kernels.IMPL if kernels.built(x.device) else "compiled"
    kernels = _named(impl, x.device)
    if differentiated or not kernels.packs(x.dtype, layout):
        raise ValueError(
            f"impl={impl!r} packs {kernels.PACKS}; not {x.dtype} on {x.device} in {layout}; use impl='auto'"
        )
    kernels.require(x.device)
    return impl


def take_in_kernel(impl: Impl, k: Tensor, v: Tensor, plan_layer: LayerPlan | None) -> Callable[..., None] | None:
    """Return the kernel that takes new tokens into a cache in one call, or None: then buffer and history do.

    Raises:
        ValueError: `impl` is unknown, or cannot store the layouts here.
        RuntimeError: it is a kernel, and cannot be built.
    """
    keys, values = (None, None) if plan_layer is None else (plan_layer.keys, plan_layer.values)
    of_keys, of_values = pack_impl(impl, k, keys), pack_impl(impl, v, values)
    return calls.take_in if plan_layer is not None and of_keys in KERNELS and of_values in KERNELS else None


def unpack_kernel(impl: Impl, packed: Packed) -> Callable[[Packed], Tensor]:
    """Return the function that unpacks a tile: for ``"auto"`` the kernel, where it runs, else tensor code."""
    kernels = kernels_on(packed.device)
    if impl != "auto" or kernels is None or not kernels.restores(packed.dtype, packed.format):
        return unpack_mixed
    if torch.is_grad_enabled() and _require_grad(*packed.tensors):
        return unpack_mixed
    return calls.restore if kernels.built(packed.device) else unpack_mixed


def store_kernel(impl: Impl) -> Callable[[Tensor, Layout], Packed]:
    """Return the function that packs vectors: a kernel, or the tensor code of the layout for ``"compiled"``."""
    return calls.store if is_kernel(impl) else _store


def sdpa_gives_lse(q: Tensor, v: Tensor, masked: bool) -> bool:
    """Tell if a kernel of torch's SDPA gives a log-sum-exp: those for CPUs, and FlashAttention on a GPU."""
    d = q.shape[-1]
    if q.device.type == "cuda":
        fits = d == v.shape[-1] and d % 8 == 0 and q.dtype in (torch.bfloat16, torch.float16) and not masked
        return fits and _has_flash(q.device)
    return q.device.type == "cpu" and d == v.shape[-1] and q.dtype != torch.float64


@constant_result
def _has_flash(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def _store(x: Tensor, layout: Layout) -> Packed:
    return layout.pack(x)


def _named(impl: Impl, device: torch.device) -> Any:
    """Return the kernels that are named, if they are those of the device."""
    kernels = kernels_on(device)
    if kernels is None or impl != kernels.IMPL:
        raise ValueError(f"impl={impl!r} needs tensors on {DEVICES[impl]}, these are on {device}; use impl='auto'")
    return kernels


def _require_grad(*tensors: Tensor) -> bool:
    return any([t.requires_grad for t in tensors])


def _check_known(function: str, impl: Any, names: tuple[str, ...]) -> None:
    if impl == "triton":
        raise ValueError("impl='triton' is gone: on a GPU 'auto' takes swan's CUDA kernels, whose name is impl='cuda'")
    if impl not in names:
        raise ValueError(f"impl of {function} must be one of {', '.join(names)}, got {impl!r}")
