"""The packed history and all that reads and writes it, over layouts, head dimensions and dtypes, against float64."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swan import Graded, KVCache, LayerPlan, Packed, Plan, pack, packed_attention, swan_attention
from swan.kernels import cpu
from swan.storage.codes import CLIPS, OCTAVE, PARTS, scale_of
from swan.storage.packed import unpack_mixed

from .oracle import Expected, Limits, Part, attention, history, limits, windowed
from .rows import Job, Row, guarded

HALF = "leading"
RETENTIONS = (0.504, 0.266, 0.195, 0.18)
BATCH, HEADS, KV_HEADS = 2, 8, 2
SHORT, LONG = 333, 5003  # tokens of a history: no multiples of anything
BUFFER, SINKS = 32, 3
PROMPT, STEPS = 250, 40
MOST_DIFFERENT = 1e-3  # share of bytes that stand at an edge


@dataclass(frozen=True)
class Setting:
    """What a kernel is compiled for, and where it runs."""

    layer: LayerPlan
    d: int
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        """The largest group of values that is stored mixed."""
        assert isinstance(self.layer.values, Graded)
        return max((size for size, bits in self.layer.values.groups if bits in PARTS), default=1)

    @property
    def kernel(self) -> str:
        return "cuda" if self.device.type == "cuda" else "cpp"

    @property
    def is_served(self) -> bool:
        """True where a kernel must serve, whatever tensor code could do."""
        return self.dtype != torch.float32 if self.device.type == "cuda" else cpu.built()

    def randn(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

    def tokens(self, seed: int, count: int) -> Tensor:
        return self.randn(seed, BATCH, KV_HEADS, count, self.d)

    def queries(self, count: int) -> Tensor:
        return self.randn(0, BATCH, HEADS, count, self.d)


def layer_of(name: str, d: int) -> LayerPlan:
    """Make the layouts that are advised at a retention, or those of the first half of the coordinates."""
    half = Graded.leading(d, d // 2)
    layer = LayerPlan(half, half) if name == HALF else Plan.for_retention(float(name), dims=[(d, d)]).layers[0]
    assert layer is not None
    return layer


def jobs(device: torch.device, quick: bool) -> list[Job]:
    """List the jobs: one for each dtype, head dimension and layout, then compiled ones."""
    dtypes, dims = (torch.bfloat16, torch.float16, torch.float32), (128, 64, 256)
    chosen = [
        (dtype, d, name) for dtype, d in itertools.product(dtypes, dims) for name in (*map(str, RETENTIONS), HALF)
    ]
    if quick:
        chosen = [(torch.bfloat16, 64, "0.266"), (torch.float32, 64, HALF)]
    found: list[Job] = []
    compiled: list[Job] = []
    for dtype, d, name in chosen:
        setting = Setting(layer_of(name, d), d, dtype, device)
        text = f"{name} d {d} {dtype}".replace("torch.", "")
        found.append((text, functools.partial(rows, setting)))
        if name == "0.266" and dtype != torch.float32:
            compiled.append((f"compiled {text}", functools.partial(compiled_rows, setting, quick)))
    return found + compiled


def rows(at: Setting) -> Iterator[Row]:
    """Check packing, attention and caches, each whatever became of the others."""
    yield from guarded("pack", packing(at))
    for tokens, queries in ((SHORT, 1), (LONG, 1), (SHORT, 3), (1, 1)):
        yield from guarded(f"attention, {tokens} tokens, {queries} queries", attending(at, tokens, queries))
    for static, padded in itertools.product((False, True), (False, True)):
        name = f"{'static' if static else 'dynamic'} KVCache{', padding' if padded else ''}"
        yield from guarded(name, decoding(at, name, static, padded))


# Packing ------------------------------------------------------------------------------------------


def packing(at: Setting) -> Iterator[Row]:
    """Check that groups are as near as may be, and that bytes are those of tensor code but at edges."""
    for side, layout in (("keys", at.layer.keys), ("values", at.layer.values)):
        assert isinstance(layout, Graded)
        x = at.randn(3, BATCH, 77, KV_HEADS, at.d).transpose(1, 2)
        packed = pack(x, layout)
        error, bound = steps_off(packed, x)
        yield row(f"pack {side}", error, bound)
        if at.is_served:
            same = pack(as_mixed_in(at.dtype, x, layout), layout, impl="compiled")
            yield row(f"pack {side}, bytes at edges", share_different(packed, same), MOST_DIFFERENT)


def steps_off(packed: Packed, x: Tensor) -> tuple[float, float]:
    """Return the largest error in steps of a group, and its bound: half of one, and roundings.

    From 4 bits on of a coordinate; of fewer of the length along the vector, in steps of scales.
    """
    layout = packed.format
    assert isinstance(layout, Graded)
    values = unpack_mixed(dataclasses.replace(packed, dtype=torch.float64)).double()
    matrix = layout.mix(x.dtype, x.device)
    mixed = x.double() if matrix is None else x.double() @ matrix.double()
    worst, scale, rounding = 0.0, 0, torch.finfo(packed.dtype).eps
    for start, stop, bits in layout.stored:
        number, group = values[..., start:stop], mixed[..., start:stop]
        error = (number - group).abs()
        if bits == 16:
            worst = max(worst, math.inf if error.any() else 0.0)
            continue
        assert packed.scales is not None
        largest = scale_of(packed.scales[..., scale : scale + 1]).double()
        if bits in CLIPS:
            steps = OCTAVE * ((number * group).sum(-1) / group.square().sum(-1)).log2().abs()
        else:
            steps = (error - 2 * rounding * largest) / (largest * 2.0 ** (1 - bits))
        worst = max(worst, float(steps.max()))
        scale += 1
    return worst, 0.5 + 1e-3


def as_mixed_in(dtype: torch.dtype, x: Tensor, layout: Graded) -> Tensor:
    """Return float32 vectors that tensor code mixes to what the matrix of a dtype, which is rounded, makes of these."""
    rounded, matrix = layout.mix(dtype, x.device), layout.mix(torch.float64, x.device)
    return x.float() if rounded is None or matrix is None else (x.double() @ rounded.double() @ matrix.mT).float()


def share_different(packed: Packed, same: Packed) -> float:
    """Return the share of bytes, or of 16-bit numbers, that differ."""
    different = total = 0
    for a, b in zip(packed.tensors, same.tensors, strict=True):
        different += int((a != b.to(a.dtype)).sum())
        total += a.numel()
    return different / total


# Attention ----------------------------------------------------------------------------------------


def attending(at: Setting, tokens: int, queries: int) -> Iterator[Row]:
    """Check attention to a history, alone and with recent tokens, with masks and without."""
    q, k, v = at.queries(queries), at.tokens(1, tokens), at.tokens(2, tokens)
    k_history, v_history = pack(k, at.layer.keys), pack(v, at.layer.values)
    recent = at.tokens(4, 131), at.tokens(5, 131)
    seen, recent_seen = (at.randn(n, BATCH, 1, queries, count) > -0.5 for n, count in ((6, tokens), (7, 131)))
    seen[0, 0, 0] = False  # a query that sees no token of the history
    plain = history(k_history, v_history)
    about = f"{tokens} tokens, {queries} queries"
    for mask, name in ((None, ""), (seen, ", mask")):
        out, lse = packed_attention(q, k_history, v_history, mask=mask, return_lse=True)
        yield from compared(f"packed_attention {about}{name}", at, q, (out, lse), plain._replace(seen=mask))
    for masks, name in (((None, None), ""), ((seen, recent_seen), ", masks")):
        out = swan_attention(q, k_history, v_history, *recent, history_mask=masks[0], buffer_mask=masks[1])
        parts = plain._replace(seen=masks[0]), Part(recent[0].double(), recent[1].double(), masks[1])
        yield from compared(f"swan_attention {about}{name}", at, q, (out,), *parts)
    named: Any = at.kernel
    if at.is_served:
        one, other = (packed_attention(q, k_history, v_history, impl=impl) for impl in ("auto", named))
        yield row(f"packed_attention {about}: auto is {at.kernel}", float((one != other).sum()), 0.0)


def compared(name: str, at: Setting, q: Tensor, found: tuple[Tensor, ...], *parts: Part) -> Iterator[Row]:
    """Compare an output, and its log-sum-exp if it is there, with float64."""
    expected = attention(q, *parts)
    limit = limits(q, expected, at.dtype, at.group, *parts)
    yield output_row(name, found[0], expected, limit)
    if len(found) > 1:
        lse, finite = found[1].double(), expected.lse.isfinite()
        wrong = not torch.equal(lse[~finite], expected.lse[~finite])
        error = (lse - expected.lse)[finite].abs().max() if finite.any() else torch.zeros(())
        yield row(f"{name}, log-sum-exp", math.inf if wrong else float(error), limit.lse)


def output_row(name: str, out: Tensor, expected: Expected, limit: Limits) -> Row:
    """Compare an output: as norms of rows, which is what a row shows, and number by number."""
    if out.shape != expected.out.shape:
        raise ValueError(f"shape {list(out.shape)}, expected {list(expected.out.shape)}")
    difference, size = out.double() - expected.out, expected.out.norm(dim=-1)
    error = difference.norm(dim=-1)
    relative = torch.where(error == 0, 0, error / size)  # a query that sees nothing has an output of 0, exactly
    excess = float((difference.abs() / limit.number.clamp(min=1e-300)).max())
    found = row(name, float(relative.max()), limit.norm)
    if found["result"] == "passed" and not excess <= 1:
        found |= {"result": "failed", "reason": f"a number is off by {excess:.3g} times its bound"}
    return found


def row(name: str, error: float, bound: float) -> Row:
    """Make a row; an error that is no number fails."""
    return {"case": name, "error": error, "bound": bound, "result": "passed" if error <= bound else "failed"}


# Caches -------------------------------------------------------------------------------------------


@dataclass
class Sequence:
    """Queries, keys and values of a sequence that a cache takes in, and the padding of its rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    padding: Tensor | None

    @classmethod
    def random(cls, at: Setting, padded: bool) -> "Sequence":
        count = PROMPT + STEPS
        padding = torch.tensor([0, 17], device=at.device) if padded else None
        return cls(at.queries(count), at.tokens(1, count), at.tokens(2, count), padding)

    def part(self, start: int, stop: int) -> list[Tensor]:
        return [t[:, :, start:stop] for t in (self.q, self.k, self.v)]


def decoding(at: Setting, name: str, static: bool, padded: bool) -> Iterator[Row]:
    """Check a cache: a prompt as if token by token, a chunk, and single tokens."""
    sequence = Sequence.random(at, padded)
    cache = new_cache(at, static)
    sizes = [PROMPT, 1, 1, 7, *[1] * (STEPS - 9)]
    out, start = [], 0
    for size in sizes:
        out.append(cache(*sequence.part(start, start + size), padding=sequence.padding))
        start += size
    yield compared_sequence(name, at, sequence, torch.cat(out, dim=2), 0)


def new_cache(at: Setting, static: bool) -> KVCache:
    settings: dict[str, Any] = {"static": True, "max_length": PROMPT + STEPS + 5} if static else {}
    return KVCache(at.layer, buffer=BUFFER, sinks=SINKS, prefill="windowed", **settings)


def compared_sequence(name: str, at: Setting, sequence: Sequence, out: Tensor, start: int) -> Row:
    """Compare the outputs from a column on with float64 over what a cache stores."""
    length = sequence.k.shape[2]
    columns = torch.arange(start, length, device=at.device)
    dense, packed = windowed(length, columns, BUFFER, SINKS, sequence.padding)
    pruned = history(pack(sequence.k, at.layer.keys), pack(sequence.v, at.layer.values), packed)
    parts = Part(sequence.k.double(), sequence.v.double(), dense), pruned
    q = sequence.q[:, :, start:]
    expected = attention(q, *parts)
    if sequence.padding is not None:  # the output at padding means nothing
        real = (columns >= sequence.padding[:, None])[:, None, :, None]
        out, expected = torch.where(real, out, 0), expected._replace(out=torch.where(real, expected.out, 0))
    return output_row(name, out, expected, limits(q, expected, at.dtype, at.group, *parts))


def compiled_rows(at: Setting, quick: bool) -> Iterator[Row]:
    """Check steps of a static cache in a graph of the compiler, and that it is captured as a CUDA graph."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    sequence, cache = Sequence.random(at, padded=False), new_cache(at, static=True)
    cache(*sequence.part(0, PROMPT))
    how: dict[str, Any] = {"backend": "aot_eager"} if quick else {"mode": "reduce-overhead"}
    step = torch.compile(lambda q, k, v: cache(q, k, v), fullgraph=True, dynamic=False, **how)
    out = []
    for i in range(PROMPT, PROMPT + STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        out.append(step(*(t.contiguous() for t in sequence.part(i, i + 1))).clone())
    yield compared_sequence("static KVCache, compiled steps", at, sequence, torch.cat(out, dim=2), PROMPT)
    counters = torch._dynamo.utils.counters
    yield row("compiled once", float(counters["stats"]["unique_graphs"] - 1), 0.0)
    if at.device.type == "cuda":
        yield row("CUDA graphs that the compiler skipped", float(counters["inductor"]["cudagraph_skips"]), 0.0)
