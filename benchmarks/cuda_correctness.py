"""Every public function and module on an accelerator, eager and compiled, against float64 on the CPU.

    python benchmarks/cuda_correctness.py [--device cuda] [--seconds 200] [--only TEXT] [--json FILE] [--quick]

Prints a table and ends with status 1 if a result is out of its bound. Inputs are rounded to the dtype
first, so the oracle, the plain code of `swan.functional.reference` in float64, sees the same numbers. The
error of an output is its largest deviation over the root mean square of the oracle. Its bound is 4 times
the error of the same plain code run in the dtype, plus 8 of the dtype's epsilon; for what only selects
and moves numbers it is 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.utils import _pytree as pytree

import swan
from swan import Graded, KVCache, LayerPlan, Packed, SwanAttention, TopK, pack, unpack
from swan import functional as F
from swan.evaluation.machine import TooLong, at_most, machine, versions
from swan.functional import reference
from swan.kernels import attend_cpu

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=200, help="time; compiled cases beyond it are skipped")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--quick", action="store_true", help="compile with aot_eager instead of inductor")
    parser.add_argument("--only", default="", help="cases with this in their name")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.error_on_recompile = True  # every case, steps of a static cache too, compiles once
    deadline = time.monotonic() + args.seconds
    inductor = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    compilers: dict[str, Compile] = {
        "eager": lambda fn: fn,
        "compiled": functools.partial(inductor, backend="aot_eager") if args.quick else inductor,
    }
    rows: list[dict[str, Any]] = []
    print(f"{'case':44} {'dtype':9} {'mode':9} {'error':>9} {'bound':>9}")
    for mode, compiler in compilers.items():
        for dtype in DTYPES:
            for case in cases(dtype, torch.device(args.device)):
                if args.only not in case.name:
                    continue
                left = deadline - time.monotonic() if mode == "compiled" else 60
                row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
                row |= check(case, dtype, args.device, compiler, left)
                rows.append(row)
                print("{case:44} {dtype:9} {mode:9}".format(**row), verdict(row), flush=True)
    failed, skipped = ([row for row in rows if row["result"] == result] for result in ("failed", "skipped"))
    print(f"{len(rows) - len(failed) - len(skipped)} passed, {len(failed)} failed, {len(skipped)} skipped for time")
    for row in failed:
        print("FAILED: {case}, {dtype}, {mode}:".format(**row), verdict(row))
    if args.json:
        settings = {"device": args.device, "quick": args.quick, "seconds": args.seconds}
        command = "python " + " ".join(sys.argv)
        about = {"command": command, "date": date.today().isoformat(), "versions": versions(), "machine": machine()}
        result = about | {"settings": settings, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


def verdict(row: dict[str, Any]) -> str:
    if row["error"] is None:
        return f"{row['result']}: {row['reason']}"
    return f"{row['error']:9.2e} {row['bound']:9.2e} {'' if row['result'] == 'passed' else 'OUT OF BOUND'}"


def check(case: Case, dtype: torch.dtype, device: str, compiler: Compile, seconds: float) -> dict[str, Any]:
    if seconds <= 0:
        return {"error": None, "bound": None, "result": "skipped", "reason": "the time is over"}
    torch.compiler.reset()
    try:
        expected = tensors(case.oracle(*pytree.tree_map(wide, case.inputs, is_leaf=is_packed)))
        plain = tensors(case.oracle(*pytree.tree_map(dense, case.inputs, is_leaf=is_packed)))
        with at_most(seconds, "the case"), torch.no_grad():
            out = tensors(case.run(compiler, *pytree.tree_map_only(Tensor, lambda t: t.to(device), case.inputs)))
            error = deviation([t.cpu() for t in out], expected)
    except TooLong as late:
        return {"error": None, "bound": None, "result": "skipped", "reason": str(late)}
    except Exception as failure:
        reason = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"[:300]
        return {"error": None, "bound": None, "result": "failed", "reason": reason}
    bound = 0.0 if case.exact else 4 * deviation(plain, expected) + 8 * torch.finfo(dtype).eps + case.slack
    return {"error": error, "bound": bound, "result": "passed" if error <= bound else "failed", "reason": None}


def deviation(out: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The worst output's largest deviation over the oracle's root mean square."""
    worst = 0.0
    for a, b in zip(out, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shape {list(a.shape)}, expected {list(b.shape)}")
        a, b, finite = a.double(), b.double(), b.isfinite()
        if not torch.equal(a[~finite], b[~finite]) or not a.isfinite().equal(finite):
            raise ValueError("infinite or NaN where the oracle is not, or the other way round")
        scale = b[finite].square().mean().sqrt().clamp(min=1e-30)
        worst = max(worst, ((a - b)[finite].abs().max() / scale).item())
    return worst


def tensors(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def wide(x: Any) -> Any:
    """Inputs of the oracle: float64, packed vectors dense and without the rounding of the dtype."""
    if isinstance(x, Packed):
        return unpack(dataclasses.replace(x, dtype=torch.float64)).double()
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def dense(x: Any) -> Any:
    return unpack(x) if isinstance(x, Packed) else x


# Cases --------------------------------------------------------------------------------------------


def cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def distinct(tokens: int) -> Tensor:
        """Vectors of distinct magnitudes, exact in every dtype: which coordinates are largest is certain."""
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
    yield from packed_attentions(one, k, v, history, generator, device)
    yield from modules(basis, q, k, v, distinct, dtype, device)


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
        lambda p: F.random_rotation(KV_HEADS, D, seed=0, dtype=p.dtype),
    )
    weights = randn(KV_HEADS * D, 48), randn(48, HEADS * D), basis, randn(KV_HEADS * D)
    yield Case("fold_value_rotation", weights, lambda c, *x: c(F.fold_value_rotation)(*x), folded)


def ortho_rotation(c: Compile, x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    module = swan.OrthoRotation(basis)
    return c(module)(x), c(module.inverse)(x)


def folded(v_weight: Tensor, o_weight: Tensor, basis: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = o_weight.shape[1] // v_weight.shape[0]
    whole, wider = torch.block_diag(*basis), torch.block_diag(*basis.repeat_interleave(groups, 0))
    return whole.mT @ v_weight, o_weight @ wider, whole.mT @ bias


def pruning(distinct: Callable[[int], Tensor]) -> Iterator[Case]:
    x = distinct(37)
    prune = functools.partial(F.topk_prune, keep=24)
    yield Case("topk_prune", (x,), lambda c, x: c(prune)(x), lambda x: reference.topk_prune(x, 24), exact=True)
    groups = ((8, 16), (24, 0), (32, 16))
    prune = functools.partial(F.graded_prune, groups=groups)
    yield Case("graded_prune", (x,), lambda c, x: c(prune)(x), lambda x: reference.graded_prune(x, groups), exact=True)
    for name, layout in LAYOUTS.items():
        slack = half_step(x, layout)
        for what, run in (("pack, unpack", packed_twice), ("StructuredPruner", pruned_by_module)):
            yield Case(
                f"{what}: {name}",
                (x,),
                lambda c, x, run=run, layout=layout: mixed(run(c, x, layout).double(), layout),
                functools.partial(kept, layout=layout),
                exact=not slack,
                slack=slack,
            )


def mixed(x: Tensor, layout: Any) -> Tensor:
    """The coordinates that a layout codes, in which its error is at most half a step of each."""
    matrix = layout.mix(x.dtype, x.device)
    return x if matrix is None else x @ matrix


def kept(x: Tensor, layout: Any) -> Tensor:
    """What a layout keeps, in its coordinates and before it is coded."""
    if isinstance(layout, TopK):
        return reference.prune(x, layout)
    return mixed(reference.graded_prune(x, tuple((size, 16 if bits else 0) for size, bits in layout.groups)), layout)


def half_step(x: Tensor, layout: Any) -> float:
    """Half the largest step of the codes of a layout, over the root mean square of what it keeps."""
    exact = kept(x.double(), layout)
    if isinstance(layout, TopK):
        step = exact.abs().max() / 127 * 1.01 if layout.bits == 8 else exact.new_zeros(())  # bfloat16 rounds the scale
    else:
        steps = [2 ** (9 / 8 - bits) * exact[..., i:j].abs().max() for i, j, bits in layout.stored if bits < 16]
        step = torch.stack([exact.new_zeros(()), *steps]).max()  # a scale is a power of 2 ** (1 / 8), rounded up
    return (step / 2 / exact.square().mean().sqrt()).item()


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
    device: torch.device,
) -> Iterator[Case]:
    kernel = "triton" if device.type == "cuda" else "cpp"  # both read the same layouts
    parts = tuple(reference.dense_attention(one, *(t[:, :, i] for t in (k, v))) for i in (slice(7), slice(7, None)))
    yield Case("merge_attention", (list(parts),), lambda c, x: c(F.merge_attention)(x), reference.merge_attention)
    seen = torch.rand(BATCH, 1, 1, HISTORY, generator=generator) < 0.7
    recent = torch.rand(BATCH, 1, 1, TOKENS, generator=generator) < 0.7
    for name, layout in LAYOUTS.items():
        packed = tuple(pack(t, layout) for t in history)
        for impl in ("auto", kernel) if attend_cpu.reads(layout) else ("auto",):
            settings = {"impl": impl, "return_lse": True}
            yield Case(
                f"packed_attention: {name} {impl}",
                (one, *packed),
                functools.partial(lambda c, *x, s: c(with_mask(F.packed_attention, **s))(*x), s=settings),
                with_mask(reference.dense_attention),
            )
            if name not in ("topk int8 bitmap", "leading"):
                continue
            for masks in ((None, None), (seen, recent)):
                yield Case(
                    f"swan_attention: {name} {impl}{'' if masks[0] is None else ', masks'}",
                    (one, *packed, k, v, *masks),
                    functools.partial(lambda c, *x, impl: c(swan_call(impl))(*x), impl=impl),
                    joined_attention,
                )


def swan_call(impl: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Packed, v: Packed, k_buffer: Tensor, v_buffer: Tensor, seen: Any, recent: Any) -> Tensor:
        return F.swan_attention(q, k, v, k_buffer, v_buffer, history_mask=seen, buffer_mask=recent, impl=impl)

    return call


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
    device: torch.device,
) -> Iterator[Case]:
    yield Case("DenseBuffer", (k,), pushed, lambda k: k[:, :, 2:-16], exact=True)
    keys, values = distinct(TOKENS), distinct(TOKENS)
    impls = ("auto", "triton") if device.type == "cuda" else ("auto",)
    for name, impl in itertools.product(("topk 16 bitmap", "leading"), impls):
        for static in (False, True):
            yield Case(
                f"KVCache: {name} {'static' if static else 'dynamic'} {impl}",
                (q, keys, values),
                functools.partial(decoded, layout=LAYOUTS[name], static=static, impl=impl),
                functools.partial(windowed, layout=LAYOUTS[name]),
            )
    x = q[:, 0, :48].contiguous()
    weights = {name: t.to(dtype) for name, t in SwanAttention(D, HEADS, KV_HEADS, D).state_dict().items()}
    weights |= {"key_basis": basis, "value_basis": basis.flip(0)}
    yield Case("SwanAttention: no cache", (x, weights), swan_attention_module, layer_alone)
    yield Case("SwanAttention: cache", (x, weights), functools.partial(swan_attention_module, cached=True), layer_alone)


def pushed(c: Compile, k: Tensor) -> Tensor:
    """Tokens that leave a buffer: all but the sinks and the newest."""
    buffer = swan.DenseBuffer(size=16, sinks=2, static=True)
    out = [buffer.push(k[:, :, :50], k[:, :, :50])]
    push = c(buffer.push)
    out += [push(t, t) for t in k[:, :, 50:].split(1, dim=2)]
    places = torch.cat([evicted.places for evicted in out if evicted.places is not None])
    left = torch.cat([evicted.keys for evicted in out], dim=2)
    return left[:, :, places >= 0]


def decoded(c: Compile, q: Tensor, k: Tensor, v: Tensor, layout: Any, static: bool, impl: Any) -> Tensor:
    """A prompt of 250 tokens, then one by one; compiled steps only with a static cache."""
    cache = KVCache(
        LayerPlan(layout, layout), buffer=32, sinks=3, prefill="windowed", static=static,
        max_length=TOKENS if static else None,
    )  # fmt: skip

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.update(k, v, impl=impl)
        return cache.attend(q, impl=impl)

    one = c(step) if static else step
    out = [step(*(t[:, :, :250] for t in (q, k, v)))]
    out += [one(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(250, TOKENS)]
    return torch.cat(out, dim=2)


def windowed(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
    pruned = (unpack(pack(x, layout)) for x in (k, v))  # which have cases of their own
    return reference.windowed_attention(q, k, v, *pruned, buffer=32, sinks=3)


def layer(x: Tensor, weights: dict[str, Tensor]) -> SwanAttention:
    module = SwanAttention(D, HEADS, KV_HEADS, D).to(x.device, x.dtype)
    module.load_state_dict(weights)
    return module


def layer_alone(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return layer(x, weights)(x)


def swan_attention_module(c: Compile, x: Tensor, weights: dict[str, Tensor], cached: bool = False) -> Tensor:
    """Without a cache, or token by token on one that keeps everything: the same function."""
    module = layer(x, weights)
    if not cached:
        return c(module)(x)
    everything = TopK(D, D, bits=16)
    cache = KVCache(LayerPlan(everything, everything), buffer=8, sinks=1, static=True, max_length=x.shape[1])
    step = c(module)
    return torch.cat([module(x[:, :20], cache), *(step(t, cache) for t in x[:, 20:].split(1, dim=1))], dim=1)


if __name__ == "__main__":
    sys.exit(main())
