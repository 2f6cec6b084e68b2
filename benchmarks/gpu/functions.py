"""Every public function and module, each with its inputs and an oracle in plain code."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import swan
from swan import Graded, KVCache, LayerPlan, Packed, SwanAttention, TopK, pack, unpack
from swan import functional as F
from swan.functional import reference
from swan.modules.buffer import StaticBuffer
from swan.storage.codes import CLIPS

BATCH, HEADS, KV_HEADS, D, TOKENS, HISTORY = 2, 8, 2, 64, 293, 1500  # odd lengths; a history of two tiles
LAYOUTS = {
    "topk int8 bitmap": TopK(D, 40),
    "topk 16 bitmap": TopK(D, 24, bits=16),
    "topk int8 index": TopK(D, 24, positions="index"),
    "topk int8 all": TopK(D, D),
    "leading": Graded.leading(D, 32),
    "graded": Graded(((8, 16), (24, 0), (24, 16), (8, 0))),
    "graded 6+3+0": Graded(((8, 6), (40, 3), (16, 0))),
}
KERNEL = 2.0**-6  # of an output's root mean square: what a kernel rounds (oracle.py holds it to less)
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Case:
    """One call: `run` gets a compiler and the inputs on the device, `oracle` the inputs as dense tensors."""

    name: str
    inputs: tuple[Any, ...]
    run: Callable[..., Any]
    oracle: Callable[..., Any]
    exact: bool = False
    slack: float = 0.0  # added to the bound: what quantization may do


def cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def distinct(tokens: int) -> Tensor:
        """Draw vectors of distinct magnitudes, exact in every dtype: which coordinates are largest is certain."""
        order = torch.rand(BATCH, KV_HEADS, tokens, D, generator=generator).argsort(-1) + 1
        signs = torch.rand(order.shape, generator=generator).sub(0.5).sign()
        return (order * signs / 32).to(dtype)

    basis = swan.random_rotation(KV_HEADS, D, seed=0).to(dtype)
    q, k, v = randn(BATCH, HEADS, TOKENS, D), randn(BATCH, KV_HEADS, TOKENS, D), randn(BATCH, KV_HEADS, TOKENS, D)
    one = q[:, :, :1].contiguous()
    yield from rotations(basis, q, randn, dtype, device)
    yield from pruning(distinct)
    yield from dense_attentions(q, one, k, v, generator, device)
    history = randn(BATCH, KV_HEADS, HISTORY, D), randn(BATCH, KV_HEADS, HISTORY, D)
    yield from packed_attentions(one, k, v, history, generator)
    yield from modules(basis, q, k, v, distinct, dtype)


def rotations(
    basis: Tensor, q: Tensor, randn: Callable[..., Tensor], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    yield Case("rotate", (q, basis), lambda c, *x: c(F.rotate)(*x), reference.rotate)
    transposed = functools.partial(lambda x, p: reference.rotate(x, p.mT))
    yield Case("inverse_rotate", (q, basis), lambda c, *x: c(F.inverse_rotate)(*x), transposed)
    yield Case("OrthoRotation", (q, basis), ortho_rotation, lambda x, p: (reference.rotate(x, p), transposed(x, p)))
    yield Case(
        "random_rotation",
        (basis,),  # as the reader of this case's dtype
        lambda c, _: F.random_rotation(KV_HEADS, D, seed=0, dtype=dtype, device=device),
        drawn_on_cpu,
    )
    weights = randn(KV_HEADS * D, 48), randn(48, HEADS * D), basis, randn(KV_HEADS * D)
    yield Case("fold_value_rotation", weights, lambda c, *x: c(F.fold_value_rotation)(*x), folded)


def drawn_on_cpu(basis: Tensor) -> Tensor:
    with torch.device("cpu"):  # whatever the device on which oracles make tensors
        return F.random_rotation(KV_HEADS, D, seed=0, dtype=basis.dtype)


def ortho_rotation(c: Compile, x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    module = swan.OrthoRotation(basis)
    return c(module)(x), c(module.inverse)(x)


def folded(v_weight: Tensor, o_weight: Tensor, basis: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = o_weight.shape[1] // v_weight.shape[0]
    whole, wider = torch.block_diag(*basis), torch.block_diag(*basis.repeat_interleave(groups, 0))
    return whole.mT @ v_weight, o_weight @ wider, whole.mT @ bias


def pruning(distinct: Callable[[int], Tensor]) -> Iterator[Case]:
    x = distinct(37)
    groups = ((8, 16), (24, 0), (32, 16))
    topk, graded = functools.partial(F.topk_prune, keep=24), functools.partial(F.graded_prune, groups=groups)
    yield Case("topk_prune", (x,), lambda c, x: c(topk)(x), lambda x: reference.topk_prune(x, 24), exact=True)
    yield Case("graded_prune", (x,), lambda c, x: c(graded)(x), lambda x: reference.graded_prune(x, groups), exact=True)
    for name, layout in LAYOUTS.items():
        slack = largest_error(x, layout)
        for what, run in (("pack, unpack", packed_twice), ("StructuredPruner", pruned_by_module)):
            yield Case(
                f"{what}: {name}",
                (x,),
                lambda c, x, run=run, layout=layout: mixed(run(c, x, layout).double(), layout),
                functools.partial(uncoded, layout=layout),
                exact=not slack,
                slack=slack,
            )


def mixed(x: Tensor, layout: Any) -> Tensor:
    """Return the coordinates that a layout codes, in which its error is bounded."""
    matrix = layout.mix(x.dtype, x.device)
    return x if matrix is None else x @ matrix


def uncoded(x: Tensor, layout: Any) -> Tensor:
    """Prune vectors as a layout does, in its coordinates, before it codes what is left."""
    if isinstance(layout, TopK):
        return reference.prune(x, layout)
    return mixed(reference.graded_prune(x, tuple((size, 16 if bits else 0) for size, bits in layout.groups)), layout)


def largest_error(x: Tensor, layout: Any) -> float:
    """Bound the error of a coordinate by the codes of a layout, over the root mean square of what it keeps.

    Half a step; of clipped codes, whose scale is a mean of what numbers are over their codes, twice the largest number.
    """
    exact = uncoded(x.double(), layout)
    if isinstance(layout, TopK):
        error = exact.abs().max() / 254 * 1.01 if layout.bits == 8 else exact.new_zeros(())  # bfloat16 rounds the scale
    else:
        share = {b: 2.0 if b in CLIPS else 2 ** (1 / 8 - b) for _, _, b in layout.stored if b < 16}  # scales round up
        errors = [share[b] * exact[..., i:j].abs().max() for i, j, b in layout.stored if b in share]
        error = torch.stack([exact.new_zeros(()), *errors]).max()
    return (error / exact.square().mean().sqrt()).item()


def packed_twice(c: Compile, x: Tensor, layout: Any) -> Tensor:
    return c(unpack)(c(pack)(x, layout))


def pruned_by_module(c: Compile, x: Tensor, layout: Any) -> Tensor:
    return unpack(c(swan.StructuredPruner(layout))(x))


def dense_attentions(
    q: Tensor, one: Tensor, k: Tensor, v: Tensor, generator: torch.Generator, device: torch.device
) -> Iterator[Case]:
    seen = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=generator) < 0.5
    seen[0, 0, 5] = False  # a query that sees nothing
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        (f"decode {impl}", (one, k, v), {"impl": impl}) for impl in ("auto", "sdpa", "flex", "compiled")
    ]
    calls += [
        (f"causal {impl}", (q, k, v), {"impl": impl, "causal": True}) for impl in ("auto", "sdpa", "flex", "compiled")
    ]
    calls += [(f"mask {impl}", (q, k, v, seen), {"impl": impl}) for impl in ("sdpa", "flex", "compiled")]
    calls += [
        ("mask and lse auto", (q, k, v, seen), {"return_lse": True}),
        ("dv of 48, lse, scale auto", (q, k, v[..., :48].contiguous()), {"return_lse": True, "scale": 0.2}),
    ]
    if device.type == "cuda":  # on the CPU FlexAttention has no log-sum-exp
        calls += [("decode, lse flex", (one, k, v), {"impl": "flex", "return_lse": True})]
    for name, inputs, settings in calls:
        plain = {key: value for key, value in settings.items() if key in ("causal", "scale")}
        yield Case(
            f"dense_attention: {name}",
            inputs,
            functools.partial(
                lambda c, *x, settings: c(with_mask(F.dense_attention, **settings))(*x), settings=settings
            ),
            functools.partial(
                lambda *x, plain, lse: with_mask(reference.dense_attention, **plain)(*x)[: 1 + lse],
                plain=plain,
                lse=settings.get("return_lse", False),
            ),
        )


def with_mask(attention: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    return lambda q, k, v, mask=None: attention(q, k, v, mask=mask, **settings)


def packed_attentions(
    one: Tensor,
    k: Tensor,
    v: Tensor,
    history: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Iterator[Case]:
    parts = tuple(reference.dense_attention(one, *(t[:, :, i] for t in (k, v))) for i in (slice(7), slice(7, None)))
    yield Case("merge_attention", (list(parts),), lambda c, x: c(F.merge_attention)(x), reference.merge_attention)
    seen = torch.rand(BATCH, 1, 1, HISTORY, generator=generator) < 0.7
    recent = torch.rand(BATCH, 1, 1, TOKENS, generator=generator) < 0.7
    for name, layout in LAYOUTS.items():
        packed = tuple(pack(t, layout, impl="compiled") for t in history)  # on the CPU, as all inputs
        slack = KERNEL if isinstance(layout, Graded) else 0.0
        yield Case(
            f"packed_attention: {name}",
            (one, *packed),
            lambda c, *x: c(with_mask(F.packed_attention, return_lse=True))(*x),
            with_mask(reference.dense_attention),
            slack=slack,
        )
        if name not in ("topk int8 bitmap", "leading"):
            continue
        for masks in ((None, None), (seen, recent)):
            yield Case(
                f"swan_attention: {name}{'' if masks[0] is None else ', masks'}",
                (one, *packed, k, v, *masks),
                lambda c, *x: c(swan_call)(*x),
                joined_attention,
                slack=slack,
            )


def swan_call(q: Tensor, k: Packed, v: Packed, k_buffer: Tensor, v_buffer: Tensor, seen: Any, recent: Any) -> Tensor:
    return F.swan_attention(q, k, v, k_buffer, v_buffer, history_mask=seen, buffer_mask=recent)


def joined_attention(
    q: Tensor, k: Tensor, v: Tensor, k_buffer: Tensor, v_buffer: Tensor, seen: Tensor | None, recent: Tensor | None
) -> Tensor:
    mask = None if seen is None or recent is None else torch.cat([seen, recent], dim=-1)
    keys, values = torch.cat([k, k_buffer], dim=2), torch.cat([v, v_buffer], dim=2)
    return reference.dense_attention(q, keys, values, mask=mask)[0]


def modules(
    basis: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distinct: Callable[[int], Tensor],
    dtype: torch.dtype,
) -> Iterator[Case]:
    yield Case("DenseBuffer", (k,), pushed, lambda k: k[:, :, 2:-16], exact=True)
    keys, values = distinct(TOKENS), distinct(TOKENS)
    for name, static in itertools.product(("topk 16 bitmap", "leading"), (False, True)):
        yield Case(
            f"KVCache: {name} {'static' if static else 'dynamic'}",
            (q, keys, values),
            functools.partial(decoded, layout=LAYOUTS[name], static=static),
            functools.partial(windowed, layout=LAYOUTS[name]),
            slack=KERNEL if name == "leading" else 0.0,
        )
    x = q[:, 0, :48].contiguous()
    weights = {name: t.to(dtype) for name, t in SwanAttention(D, HEADS, KV_HEADS, D).state_dict().items()}
    weights |= {"key_basis": basis, "value_basis": basis.flip(0)}
    yield Case("SwanAttention: no cache", (x, weights), swan_attention_module, layer_alone)
    yield Case("SwanAttention: cache", (x, weights), functools.partial(swan_attention_module, cached=True), layer_alone)


def pushed(c: Compile, k: Tensor) -> Tensor:
    """Push tokens through a buffer and return those that leave it: all but the sinks and the newest."""
    buffer = StaticBuffer(size=16, sinks=2)
    out = [buffer.push(k[:, :, :50], k[:, :, :50])]
    push = c(buffer.push)
    out += [push(t, t) for t in k[:, :, 50:].split(1, dim=2)]
    places = torch.cat([evicted.places for evicted in out if evicted.places is not None])
    left = torch.cat([evicted.keys for evicted in out], dim=2)
    return left[:, :, places >= 0]


def decoded(c: Compile, q: Tensor, k: Tensor, v: Tensor, layout: Any, static: bool) -> Tensor:
    """Take in a prompt of 250 tokens, then one by one; compile steps only with a static cache."""
    cache = KVCache(
        LayerPlan(layout, layout), buffer=32, sinks=3, prefill="windowed", static=static,
        max_length=TOKENS if static else None,
    )  # fmt: skip

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cache.attend(q, cache.update(k, v))

    one = c(step) if static else step
    out = [step(*(t[:, :, :250] for t in (q, k, v)))]
    out += [one(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(250, TOKENS)]
    return torch.cat(out, dim=2)


def windowed(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
    pruned = (unpack(pack(x, layout, impl="compiled")) for x in (k, v))  # which have cases of their own
    return reference.windowed_attention(q, k, v, *pruned, buffer=32, sinks=3)


def layer(x: Tensor, weights: dict[str, Tensor]) -> SwanAttention:
    module = SwanAttention(D, HEADS, KV_HEADS, D).to(x.device, x.dtype)
    module.load_state_dict(weights)
    return module


def layer_alone(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return layer(x, weights)(x)


def swan_attention_module(c: Compile, x: Tensor, weights: dict[str, Tensor], cached: bool = False) -> Tensor:
    """Run without a cache, or token by token on one that keeps everything: the same function."""
    module = layer(x, weights)
    if not cached:
        return c(module)(x)
    everything = TopK(D, D, bits=16)
    cache = KVCache(LayerPlan(everything, everything), buffer=8, sinks=1, static=True, max_length=x.shape[1])
    step = c(module)
    return torch.cat([module(x[:, :20], cache), *(step(t, cache) for t in x[:, 20:].split(1, dim=1))], dim=1)
