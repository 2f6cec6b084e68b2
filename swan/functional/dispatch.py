"""The choice of implementations: every `impl` is resolved here.

Only what sdpa and flex cannot give (a log-sum-exp, gradients) is refused elsewhere: in attention.py.

``"auto"`` follows a table:

| function | CPU | GPU |
|---|---|---|
| `dense_attention` | sdpa; compiled for a log-sum-exp under autograd, in float64, or of values of another dimension | sdpa; compiled for a log-sum-exp |
| `packed_attention`, `swan_attention` | cpp for up to 16 query rows of a KV head, layouts that it reads, no gradients; else tensor code in tiles | tensor code in tiles |
| `pack`, `KVCache.update` | cpp for `Graded` layouts, no gradients; else tensor code | tensor code |

An `impl` that is named and cannot run raises an error that says why; it never becomes another.
"""  # noqa: E501

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from swan.kernels import cpu
from swan.kernels.cpu import attend as attend_cpu
from swan.kernels.cpu import pack as pack_cpu
from swan.storage import LayerPlan, Layout, Packed
from swan.storage.packed import unpack_mixed

__all__ = [
    "Impl", "attend_kernel", "check_packed_impl", "dense_impl", "is_kernel", "one_call_serves", "pack_impl",
    "packed_impl", "sdpa_gives_lse", "store_kernel", "take_in_kernel", "unpack_kernel",
]  # fmt: skip

Impl = Literal["auto", "reference", "sdpa", "flex", "compiled", "cpp", "triton"]
DENSE = ("auto", "reference", "sdpa", "flex", "compiled")
PACKED = ("auto", "reference", "sdpa", "compiled", "cpp", "triton")
PACK = ("auto", "compiled", "cpp", "triton")


def is_kernel(impl: Impl) -> bool:
    """Tell if an implementation is a kernel over packed tokens."""
    return impl in ("cpp", "triton")


def dense_impl(impl: Impl, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Impl:
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
    return "sdpa" if sdpa_gives_lse(q, v) and not differentiated else "compiled"


def packed_impl(impl: Impl, q: Tensor, k: Packed, v: Packed) -> Impl:
    """Resolve the `impl` of `packed_attention` and `swan_attention`; "auto" stays "auto" where tensor code serves.

    Raises:
        TypeError: keys or values are not `Packed`.
        ValueError: there is no implementation of this name, or it is ``"cpp"``, which does not read the layouts here.
        RuntimeError: it is ``"cpp"`` and the kernel cannot be built.
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
    rows = q.shape[1] // k.planes[0].shape[1] * q.shape[2]
    if rows > attend_cpu.MOST_ROWS or not _cpp_attends(q, k.format, v.format):
        return impl
    if torch.is_grad_enabled() and _require_grad(q, *k.tensors, *v.tensors):
        return impl
    return "cpp" if cpu.built() else impl


def check_packed_impl(impl: Impl, q: Tensor, keys: Layout, values: Layout) -> None:
    """Raise what `packed_impl` does, where a named implementation is unknown or does not read these layouts."""
    if impl == "flex":
        raise ValueError(
            "impl='flex' cannot read packed tensors, FlexAttention has no gather by token; use 'auto' or 'compiled'"
        )
    _check_known("packed_attention", impl, PACKED)
    if impl != "cpp":
        return
    if not _cpp_attends(q, keys, values):
        raise ValueError(
            "impl='cpp' reads Graded, and TopK with a bitmap, with queries of float32, bfloat16 or float16 on a "
            f"CPU; not {keys} and {values} with {q.dtype} on {q.device}; use impl='auto'"
        )
    _build_cpp()


def one_call_serves(q: Tensor, k: Packed, v: Packed, k_recent: Tensor, v_recent: Tensor) -> bool:
    """Tell if one call of a kernel serves history and recent tokens together."""
    if k_recent.ndim != 4 or v_recent.ndim != 4:
        return False
    if torch.is_grad_enabled() and _require_grad(q, k_recent, v_recent):
        return False
    (_, k_heads, k_tokens, d), (_, v_heads, v_tokens, dv) = k.shape, v.shape
    keys_fit = (k_recent.shape[1], k_recent.shape[3], k_recent.dtype) == (k_heads, d, k.dtype)
    values_fit = (v_recent.shape[1], v_recent.shape[3], v_recent.dtype) == (v_heads, dv, v.dtype)
    return keys_fit and values_fit and k_tokens == v_tokens


def attend_kernel(impl: Impl) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the kernel of ``"cpp"`` or ``"triton"`` that attends to packed tokens."""
    if impl == "cpp":
        return attend_cpu.attend
    from swan.kernels import attend_triton

    return attend_triton.attend


def pack_impl(impl: Impl, x: Tensor, layout: Layout | None) -> Impl:
    """Resolve the `impl` of `pack`: ``"compiled"`` (tensor code) or a kernel that knows the layout and runs here.

    Raises:
        ValueError: there is no implementation of this name, or it cannot store `x` in the layout.
        RuntimeError: it is ``"cpp"`` and the kernel cannot be built.
    """
    if impl != "auto":
        _check_known("pack", impl, PACK)
    if layout is None:  # nothing is stored
        return impl
    match impl:
        case "auto":
            return "cpp" if pack_cpu.stores(layout) and _cpp_packs(x) and cpu.built() else "compiled"
        case "cpp":
            if not (pack_cpu.stores(layout) and _cpp_packs(x)):
                raise ValueError(
                    "impl='cpp' packs Graded layouts, vectors of float32, bfloat16 or float16 on a CPU, without "
                    f"gradients; not {x.dtype} on {x.device} in {layout}; use impl='auto'"
                )
            _build_cpp()
        case "triton":
            from swan.kernels import gpu

            if not torch.compiler.is_compiling():
                gpu.check_device(x)
                gpu.form_of(*gpu.checked_numbers(layout))
        case _:
            pass
    return impl


def take_in_kernel(impl: Impl, k: Tensor, v: Tensor, plan_layer: LayerPlan | None) -> Callable[..., None] | None:
    """Return the kernel that takes new tokens into a cache in one call, or None: then buffer and history do.

    Raises:
        ValueError: `impl` is unknown, or cannot store the layouts here.
        RuntimeError: it is ``"cpp"`` and the kernel cannot be built.
    """
    keys, values = (None, None) if plan_layer is None else (plan_layer.keys, plan_layer.values)
    impls = [pack_impl(impl, k, keys), pack_impl(impl, v, values)]
    return pack_cpu.take_in if plan_layer is not None and impls == ["cpp", "cpp"] else None


def unpack_kernel(impl: Impl, packed: Packed) -> Callable[[Packed], Tensor]:
    """Return the function that unpacks a tile: for ``"auto"`` the kernel, where it runs, else tensor code."""
    fits = packed.device.type == "cpu" and packed.dtype != torch.float64 and attend_cpu.reads(packed.format)
    if impl != "auto" or not fits or (torch.is_grad_enabled() and _require_grad(*packed.tensors)):
        return unpack_mixed
    return pack_cpu.restore if cpu.built() else unpack_mixed


def store_kernel(impl: Impl) -> Callable[[Tensor, Layout], Packed]:
    """Return the function that packs vectors: a kernel, or the tensor code of the layout for ``"compiled"``."""
    match impl:
        case "cpp":
            return pack_cpu.store
        case "triton":
            from swan.kernels import pack_triton

            return pack_triton.store
        case _:
            return _store


def sdpa_gives_lse(q: Tensor, v: Tensor) -> bool:
    """Tell if torch's SDPA gives a log-sum-exp."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.dtype != torch.float64


def _store(x: Tensor, layout: Layout) -> Packed:
    return layout.pack(x)


def _cpp_attends(q: Tensor, keys: Layout, values: Layout) -> bool:
    return q.device.type == "cpu" and q.dtype != torch.float64 and attend_cpu.reads(keys) and attend_cpu.reads(values)


def _cpp_packs(x: Tensor) -> bool:
    differentiated = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cpu" and x.dtype != torch.float64 and not differentiated


def _build_cpp() -> None:
    if not cpu.built():  # compiled code reads this once
        cpu.build()  # raises an error that says why the kernel cannot be built


def _require_grad(*tensors: Tensor) -> bool:
    return any([t.requires_grad for t in tensors])


def _check_known(function: str, impl: Any, names: tuple[str, ...]) -> None:
    if impl not in names:
        raise ValueError(f"impl of {function} must be one of {', '.join(names)}, got {impl!r}")
