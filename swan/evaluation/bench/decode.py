"""Time of one decode step of attention: swan beside the strongest dense attention."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from swan.calibration.progress import track
from swan.evaluation.baselines import Float8
from swan.evaluation.bench.common import (
    Form,
    Setup,
    add_speedups,
    check_forms,
    check_lengths,
    forms_on,
    reason_in,
    relative_error,
)
from swan.evaluation.figures import finish
from swan.evaluation.machine import memory_bandwidth, peak_bytes
from swan.functional.attention import dense_attention, swan_attention
from swan.functional.dense import flex
from swan.functional.packing import pack
from swan.storage import LayerPlan, Packed, unpack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DENSE", "IMPLS", "bench_decode", "dense_on", "fused_on", "kernel_on", "plot_decode"]


def _sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    """Attend by torch's fused kernel of a backend, or of its own choice."""
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


DENSE: dict[str, Callable[..., Tensor]] = {
    "sdpa": lambda q, k, v: dense_attention(q, k, v, impl="sdpa"),  # query groups as rows of their KV head
    "sdpa-gqa": _sdpa_gqa,
    "flash": functools.partial(_sdpa_gqa, backend=SDPBackend.FLASH_ATTENTION),
    "cudnn": functools.partial(_sdpa_gqa, backend=SDPBackend.CUDNN_ATTENTION),
    "flex": lambda q, k, v: flex(q, k, v, None, float(q.shape[-1]) ** -0.5, return_lse=False)[0],
}
KERNELS = ("cpp", "cuda")
IMPLS = (*DENSE, *KERNELS, "tiles", "compiled")
MOST_UNROLLED = 8192  # tokens up to which the tiles of a compiled row are unrolled if nobody asks
CHECKED_ROWS = 4


@torch.no_grad()
def bench_decode(
    lengths: Sequence[int],
    setup: Setup | None = None,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    forms: Sequence[Form] | None = None,
    impls: Sequence[str] | None = None,
    bandwidth: float | None = None,
) -> list[dict[str, Any]]:
    r"""Time the attention of one new token over a full cache of one layer, with random contents.

    A dense row attends to `lengths` tokens; a swan row to ``length - buffer`` packed and ``buffer`` dense
    ones. Rotations, packing and projections are not in it (`bench_step`), so top-k without a rotation takes the
    time of top-k. Each result is first compared with float64 attention over what its cache stores. Calls rotate
    over copies of the cache that do not fit the last-level cache together, so that a step reads memory, as it
    does between the other layers of a model. On a GPU they are replayed from a CUDA graph, without the time of Python.

    Args:
        lengths: tokens in the cache, each above the buffer.
        setup: the layer, and how it is timed.
        dtypes: of the cache; by default that of `setup`, on a CPU float32 too.
        forms: pairs (form, retention): ``"graded"`` as `Plan.for_retention` advises, ``"topk"`` with int8
            values and a bitmap, ``"leading"``, or ``"fp8"``, a rival: 8-bit floats, on a CPU cast a tile at a time, on
            a GPU read by FlexAttention (the kernels of servers, such as FlashAttention 3, need more packages than
            torch). By default `FORMS`, on CUDA fp8 too.
        impls: dense rivals on CPUs ``"sdpa"`` (query groups as rows of their KV head) and ``"sdpa-gqa"``
            (``enable_gqa=True``), on GPUs the latter as ``"flash"`` and ``"cudnn"``, and ``"flex"``; for swan
            ``"cpp"`` (the CPU kernel), ``"cuda"`` (the CUDA kernel), ``"tiles"`` (tensor code, unpacked a tile at a
            time), ``"compiled"`` (torch.compile of that, fullgraph, static shapes) or any other `impl` of
            `swan_attention`. By default all that the device has; compiled, which unrolls the tiles, up to 8192
            tokens.
        bandwidth: bytes per second that memory gives; measured by default (`memory_bandwidth`).

    Returns:
        One dict per row: ``what``, ``impl``, ``form`` (``"dense"`` for rivals), ``retention``, ``length``,
        ``batch``, ``dtype``, ``variant`` (of swan's CPU kernels), ``instruction_set`` (that torch uses, or the
        architecture of the GPU), ``median_ms``, ``spread`` (90th less 10th percentile, over the median),
        ``bytes`` (what one step must read), ``bandwidth_fraction`` (bytes over the median time, of the
        bandwidth), ``error`` (relative, in the 2-norm), ``speedup`` (over the fastest dense row of that length
        and batch, in any dtype) and ``peak_bytes`` (memory that a call takes for the time of its run, its result
        included). On a GPU also ``card`` (its name) and ``bound_ms`` (the time in which memory gives the bytes).
        A row that could not run has the reason as text in ``error`` and None for what was not measured.

    Raises:
        ValueError: a length that is not above the buffer, or an unknown form.

    Example:
        >>> setup = Setup(heads=4, kv_heads=2, head_dim=32, buffer=32, repeats=3)
        >>> rows = bench_decode([96], setup, impls=["sdpa", "tiles"])
        >>> sorted({row["form"] for row in rows})
        ['dense', 'graded', 'leading', 'topk']
    """
    setup = setup or Setup()
    forms = forms_on(setup.device) if forms is None else forms
    check_forms(forms)
    check_lengths(lengths, setup)
    dtypes = dtypes or ([setup.dtype] if setup.device.type == "cuda" else [torch.float32, setup.dtype])
    bandwidth = bandwidth or memory_bandwidth(setup.device)
    cases = [
        (length, dtype, form, impl)
        for length, dtype, form in itertools.product(lengths, dict.fromkeys(dtypes), [("dense", 1.0), *forms])
        for impl in (impls or _impls_for(length, setup.device))
        if _fits(impl, form[0], setup.device)
    ]
    rows: list[dict[str, Any]] = []
    shown = itertools.groupby(track(cases, "timing", show=setup.progress), key=lambda case: case[:3])
    for (length, dtype, form), group in shown:
        here = dataclasses.replace(setup, dtype=dtype)
        step, failure = None, dict[str, Any]()  # frees the last step before the next is there
        with reason_in(failure):
            step = random_step(here, length, here.plan_layer(*form))
        for *_, impl in group:
            row = here.row("decode", impl, form, length) | failure
            if step is not None:
                with reason_in(row):
                    row |= measure(here, step, impl, bandwidth)
            rows.append(row)
    add_speedups(rows)
    return rows


def plot_decode(rows: Sequence[dict[str, Any]], title: str) -> "Figure":
    """Draw the time of a step against the tokens in the cache, and speed-up against retention at the longest.

    Of each cache the fastest impl and dtype is shown.

    Args:
        rows: of `bench_decode`.
        title: of the plot.

    Raises:
        ValueError: no row was timed.

    Example:
        >>> setup = Setup(heads=4, kv_heads=2, head_dim=32, buffer=32, repeats=3)
        >>> rows = bench_decode([96, 128], setup, impls=["sdpa", "tiles"])
        >>> plot_decode(rows, "tiny").savefig("decode.png")  # doctest: +SKIP
    """
    import matplotlib
    from matplotlib.figure import Figure

    ink = matplotlib.rcParams["axes.edgecolor"]
    fastest: dict[tuple[str, float, int], dict[str, Any]] = {}
    for row in sorted((row for row in rows if row["median_ms"] is not None), key=lambda row: -row["median_ms"]):
        fastest[row["form"], row["retention"], row["length"]] = row
    if not fastest:
        raise ValueError("there is nothing to draw: no row was timed, and the error of each says why")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    times, speedups = figure.subplots(1, 2)
    for form, retention in dict.fromkeys(key[:2] for key in sorted(fastest)):
        points = sorted((key[2], row["median_ms"]) for key, row in fastest.items() if key[:2] == (form, retention))
        style: Any = {"label": "dense", "color": ink} if form == "dense" else {"label": f"{form}, {retention:.2f}"}
        times.plot(*zip(*points, strict=True), marker="o", markersize=4, **style)
    times.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ms for a step of a layer", title=title)
    longest = max(length for *_, length in fastest)
    for form in dict.fromkeys(key[0] for key in sorted(fastest) if key[0] != "dense"):
        points = sorted((key[1], row["speedup"]) for key, row in fastest.items() if key[::2] == (form, longest))
        speedups.plot(*zip(*points, strict=True), marker="o", markersize=4, label=form)
    speedups.axhline(1, color=ink, linewidth=0.8)
    speedups.set(xlabel="retention", ylabel="speed-up over the fastest dense", title=f"{longest} tokens")
    speedups.set_ylim(bottom=0)
    return finish(figure)


def kernel_on(device: torch.device) -> str:
    """Name the kernel of a device over packed planes."""
    return "cuda" if device.type == "cuda" else "cpp"


def fused_on(device: torch.device) -> list[str]:
    """Name torch's kernels for dense attention on a device, one of which is the fastest."""
    return ["cudnn", "flash"] if device.type == "cuda" else ["sdpa"]


def dense_on(device: torch.device) -> list[str]:
    """Name all dense rivals of a device."""
    return [*fused_on(device), *([] if device.type == "cuda" else ["sdpa-gqa"]), "flex"]


def _impls_for(length: int, device: torch.device) -> list[str]:
    return [*dense_on(device), kernel_on(device), "tiles", *(["compiled"] if length <= MOST_UNROLLED else [])]


def _fits(impl: str, form: str, device: torch.device) -> bool:
    """Tell if a row makes sense: dense code for dense caches, kernels of ours for what they read."""
    if form == "fp8" and device.type == "cuda":
        return impl == "flex"
    if (form == "fp8" and impl in KERNELS) or (form, impl) == ("topk", "cuda"):
        return False
    return (impl in DENSE) == (form == "dense")


@dataclass(frozen=True)
class DecodeStep:
    """Inputs of one decode step, in as many copies as it takes to leave the last-level cache."""

    q: Tensor
    copies: list[tuple[Any, ...]]  # keys and values in turn: dense, or packed history and then dense buffer
    expected: Tensor  # of the first rows, float64
    nbytes: int  # of a copy


def random_step(setup: Setup, length: int, layer: LayerPlan | None) -> DecodeStep:
    """Make a decode step over a cache with random contents."""
    q, k, v = setup.random(1, length)
    stored: tuple[Any, ...] = (k, v)
    if layer is not None and isinstance(layer.keys, Float8) and setup.device.type == "cuda":
        stored = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)  # as servers have it, without recent tokens
    elif layer is not None:
        old, recent = slice(length - setup.buffer), slice(length - setup.buffer, length)
        history = pack(k[:, :, old], layer.keys), pack(v[:, :, old], layer.values)
        stored = (*history, k[:, :, recent].clone(), v[:, :, recent].clone())
    nbytes = sum(part.nbytes for part in stored)
    copies = [stored]
    copies += (pytree.tree_map_only(Tensor, torch.clone, stored) for _ in range(setup.copies(nbytes) - 1))
    return DecodeStep(q, copies, float64_attention(q[:CHECKED_ROWS], stored), nbytes)


def float64_attention(q: Tensor, stored: tuple[Any, ...]) -> Tensor:
    """Attend in float64 to exactly what is stored, one KV head at a time: the oracle."""
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


def measure(setup: Setup, step: DecodeStep, impl: str, bandwidth: float) -> dict[str, Any]:
    """Measure the columns of a row; raise where the result is wrong."""
    if impl in ("flex", "compiled"):
        torch.compiler.reset()  # this shape gets a static compilation of its own
    attention = _attention(impl, setup.device)
    out = setup.first(lambda: attention(step.q, *step.copies[0]))
    error = relative_error(out[:CHECKED_ROWS], step.expected)
    times = setup.replayed(lambda stored: attention(step.q, *stored), step.copies)
    peak = peak_bytes(lambda: attention(step.q, *step.copies[0]), setup.device)
    bound = setup.bound(step.nbytes, times["median_ms"], bandwidth)
    return times | bound | {"error": error, "peak_bytes": peak}


def _attention(impl: str, device: torch.device) -> Callable[..., Tensor]:
    if impl in DENSE:
        return DENSE[impl]
    name: Any = {"tiles": "sdpa" if device.type == "cpu" else "compiled"}.get(impl, impl)
    attention = functools.partial(swan_attention, impl=name)
    return torch.compile(attention, fullgraph=True, dynamic=False) if impl == "compiled" else attention
