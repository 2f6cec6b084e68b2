"""Time of one decode step of attention: swan beside the strongest dense attention."""

import contextlib
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from swan.calibration.plan import Plan
from swan.calibration.progress import track
from swan.evaluation.machine import TooLong, at_most, last_level_cache, memory_bandwidth, peak_bytes, time_calls
from swan.functional.attention import dense_attention, swan_attention
from swan.packed import Graded, Packed, PlanLayer, TopK, pack, unpack

__all__ = ["add_speedups", "bench_decode", "break_even"]

FORMS = (("graded", 0.33), ("graded", 0.25), ("topk", 0.5), ("topk", 0.33), ("leading", 0.5))
FORM_NAMES = ("graded", "topk", "leading")
DENSE: dict[str, Callable[..., Tensor]] = {
    "sdpa": lambda q, k, v: dense_attention(q, k, v, impl="sdpa"),  # query groups as rows of their KV head
    "sdpa-gqa": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "flex": lambda q, k, v: dense_attention(q, k, v, impl="flex"),
}
IMPLS = (*DENSE, "eager", "compiled")
MOST_COPIES = 64
MEASURED = ("median_ms", "spread", "bytes", "bandwidth_fraction", "error", "speedup", "peak_bytes")
WRONG = 0.1  # relative error from which on a result is wrong, in any dtype


@torch.no_grad()
def bench_decode(
    lengths: Sequence[int],
    *,
    batch: int = 1,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    buffer: int = 128,
    dtypes: Sequence[torch.dtype] | None = None,
    forms: Sequence[tuple[str, float]] = FORMS,
    impls: Sequence[str] = IMPLS,
    device: torch.device | str | None = None,
    repeats: int = 50,
    seconds: float = 3.0,
    compile_seconds: float = 120.0,
    bandwidth: float | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    r"""Time the attention of one new token over a full cache of one layer, with random contents.

    A dense row attends to `lengths` tokens; a swan row to ``length - buffer`` packed and `buffer` dense
    ones. Rotations, packing and projections are not in it. Each result is first compared with float64
    attention over what its cache stores. Calls rotate over copies of the cache that do not fit the
    last-level cache together, so that a step reads memory, as it does between the other layers of a model.

    Args:
        lengths: tokens in the cache, each above `buffer`.
        batch: sequences.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: their dimension.
        buffer: recent tokens that swan keeps dense.
        dtypes: of the cache; by default bfloat16, on a CPU float32 too.
        forms: pairs (form, retention): ``"graded"`` as `Plan.for_retention` advises, ``"topk"`` with int8
            values and a bitmap, or ``"leading"``.
        impls: dense rivals ``"sdpa"``, ``"sdpa-gqa"``, ``"flex"``; for swan ``"eager"``, ``"compiled"``
            (torch.compile, fullgraph, static shapes) or any `impl` of `swan_attention`.
        device: where; CUDA if there is one, else the CPU.
        repeats: calls that are timed, at most.
        seconds: time for the calls of a row; fewer are timed where they are slow, but 3.
        compile_seconds: time for the first call of a row, which compiles.
        bandwidth: bytes per second that memory gives; measured by default (`memory_bandwidth`).
        progress: show a bar on a terminal.

    Returns:
        One dict per row: ``what``, ``impl``, ``form`` (``"dense"`` for rivals), ``retention``, ``length``,
        ``batch``, ``dtype``, ``median_ms``, ``spread`` (90th less 10th percentile, over the median),
        ``bytes`` (what one step must read), ``bandwidth_fraction`` (bytes over the median time, of the
        bandwidth), ``error`` (relative, in the 2-norm), ``speedup`` (over the fastest dense row of that length
        and batch) and ``peak_bytes`` (memory that a call takes for the time of its run, its result included).
        A row that could not run has the reason as text in ``error`` and None for what was not measured.

    Raises:
        ValueError: a length that is not above `buffer`, or an unknown form.

    Example:
        >>> rows = bench_decode([96], heads=4, kv_heads=2, head_dim=32, buffer=32, impls=["sdpa", "eager"], repeats=3)
        >>> sorted({row["form"] for row in rows})
        ['dense', 'graded', 'leading', 'topk']
    """
    if any(length <= buffer for length in lengths):
        raise ValueError(f"every length must be above the buffer ({buffer}), got {list(lengths)}")
    if any(form not in FORM_NAMES for form, _ in forms):
        raise ValueError(f"forms are ({' or '.join(map(repr, FORM_NAMES))}, retention), got {list(forms)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = dtypes or ([torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16])
    bandwidth = bandwidth or memory_bandwidth(device)
    cases = [
        (length, dtype, form, impl)
        for length, dtype, form in itertools.product(lengths, dtypes, [("dense", 1.0), *forms])
        for impl in impls
        if (impl in DENSE) == (form[0] == "dense")
    ]
    rows: list[dict[str, Any]] = []
    shown = itertools.groupby(track(cases, "timing", show=progress), key=lambda case: case[:3])
    for (length, dtype, (form, retention)), group in shown:
        step, failure = None, dict[str, Any]()  # frees the last step before the next is there
        with _reason_in(failure):
            layer = _plan_layer(form, retention, head_dim)
            step = _random_step(batch, heads, kv_heads, length, head_dim, buffer, dtype, device, layer)
        for *_, impl in group:
            row = {"what": "decode", "impl": impl, "form": form, "retention": retention, "length": length}
            row |= {"batch": batch, "dtype": str(dtype).removeprefix("torch.")} | dict.fromkeys(MEASURED) | failure
            if step is not None:
                with _reason_in(row):
                    row |= _measure(step, impl, bandwidth, repeats, seconds, compile_seconds)
            rows.append(row)
    add_speedups(rows)
    return rows


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Set ``speedup`` of rows of `bench_decode`, also of several calls together."""
    done = [row for row in rows if row["median_ms"] is not None]
    for row in done:
        same = [other for other in done if (other["length"], other["batch"]) == (row["length"], row["batch"])]
        dense = [other["median_ms"] for other in same if other["form"] == "dense"]
        row["speedup"] = min(dense) / row["median_ms"] if dense else None


def break_even(d: int, keep: int, buffer: int) -> float:
    r"""Tokens from which on a step takes fewer operations than dense: $L > d^2 / (d - k) + b$.

    Args:
        d: head dimension.
        keep: coordinates kept of each vector, below `d`.
        buffer: recent tokens kept dense.

    Returns:
        The length ``L`` at which the rotations of a step cost what pruning saves.

    Raises:
        ValueError: `keep` is not below `d`.

    Example:
        >>> break_even(d=128, keep=64, buffer=128)
        384.0

    Source: arXiv:2511.18936.
    """
    if not 0 < keep < d:
        raise ValueError(f"keep must be between 1 and d - 1 = {d - 1}, got {keep}")
    return d**2 / (d - keep) + buffer


@dataclass(frozen=True)
class _Step:
    """Inputs of one decode step, in as many copies as it takes to leave the last-level cache."""

    q: Tensor
    copies: list[tuple[Any, ...]]  # keys and values in turn: dense, or packed history and then dense buffer
    expected: Tensor  # float64


def _random_step(
    batch: int, heads: int, kv_heads: int, length: int, d: int, buffer: int, dtype: torch.dtype,
    device: torch.device, layer: PlanLayer | None,
) -> _Step:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((heads, 1), (kv_heads, length), (kv_heads, length))
    q, k, v = (torch.randn(batch, h, n, d, generator=generator, device=device, dtype=dtype) for h, n in sizes)
    stored: tuple[Any, ...] = (k, v)
    if layer is not None:
        history = pack(k[:, :, :-buffer], layer.keys), pack(v[:, :, :-buffer], layer.values)
        stored = (*history, k[:, :, -buffer:].clone(), v[:, :, -buffer:].clone())
    more = min(2 * last_level_cache(device) // _nbytes(stored), MOST_COPIES - 1)
    copies = [stored, *(pytree.tree_map_only(Tensor, torch.clone, stored) for _ in range(more))]
    return _Step(q, copies, _float64_attention(q, stored))


def _nbytes(stored: tuple[Any, ...]) -> int:
    return sum(part.nbytes for part in stored)


def _plan_layer(form: str, retention: float, d: int) -> PlanLayer | None:
    if form == "dense":
        return None
    if form == "leading":
        layout = Graded.leading(d, max(1, round(retention * d)))
        return PlanLayer(layout, layout)
    if form == "topk":
        layout = TopK(d, max(1, min(d, int(2 * d * retention) - 2 - -(-d // 8))))
        return PlanLayer(layout, layout)
    return Plan.for_retention(retention, dims=[(d, d)]).layers[0]


def _float64_attention(q: Tensor, stored: tuple[Any, ...]) -> Tensor:
    """The oracle over exactly what is stored, one KV head at a time."""
    out = torch.empty_like(q, dtype=torch.float64)
    kv_heads = stored[0].shape[1]
    for row, head in itertools.product(range(q.shape[0]), range(kv_heads)):
        parts = [_wide(part, row, head) for part in stored]
        keys, values = torch.cat(parts[0::2], dim=2), torch.cat(parts[1::2], dim=2)
        mine = slice(head * q.shape[1] // kv_heads, (head + 1) * q.shape[1] // kv_heads)
        out[row, mine] = dense_attention(q[row, mine][None].double(), keys, values, impl="reference")[0]
    return out


def _wide(part: Packed | Tensor, row: int, head: int) -> Tensor:
    one = slice(row, row + 1), slice(head, head + 1)
    if isinstance(part, Packed):  # scales are applied without rounding
        return unpack(dataclasses.replace(part.map(lambda t: t[one]), dtype=torch.float64)).double()
    return part[one].double()


def _measure(
    step: _Step, impl: str, bandwidth: float, repeats: int, seconds: float, compile_seconds: float
) -> dict[str, Any]:
    """The measured columns of a row; raises where the result is wrong."""
    if impl in ("flex", "compiled"):
        torch.compiler.reset()  # this shape gets a static compilation of its own
    attention, nbytes = _attention(impl), _nbytes(step.copies[0])
    with at_most(compile_seconds, "the first call, which compiles,"):
        out = attention(step.q, *step.copies[0]).double()
        error = ((out - step.expected).norm() / step.expected.norm()).item()
    if not error < WRONG:
        raise ArithmeticError(f"wrong result: relative error {error:.2g}")
    times = time_calls(lambda stored: attention(step.q, *stored), step.copies, step.q.device, repeats, seconds)
    median, tenths = statistics.median(times), statistics.quantiles(times, n=10, method="inclusive")
    return {
        "median_ms": 1e3 * median,
        "spread": (tenths[-1] - tenths[0]) / median,
        "bytes": nbytes,
        "bandwidth_fraction": nbytes / median / bandwidth,
        "error": error,
        "peak_bytes": peak_bytes(lambda: attention(step.q, *step.copies[0]), step.q.device),
    }


def _attention(impl: str) -> Callable[..., Tensor]:
    if impl == "compiled":
        return torch.compile(swan_attention, fullgraph=True, dynamic=False)
    name: Any = "auto" if impl == "eager" else impl
    return DENSE.get(impl) or functools.partial(swan_attention, impl=name)


@contextlib.contextmanager
def _reason_in(row: dict[str, Any]) -> Iterator[None]:
    """Note why something could not run, instead of raising."""
    try:
        yield
    except (Exception, TooLong) as error:
        lines = str(error).strip().splitlines()
        row["error"] = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
    torch.cuda.empty_cache()  # once the traceback, which held tensors, is gone
