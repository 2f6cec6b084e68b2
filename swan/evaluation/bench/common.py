"""The setup of all benchmarks, its random inputs, and the rows."""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from swan.calibration import Plan
from swan.evaluation.baselines import Float8
from swan.evaluation.bench.gpu import replayed
from swan.evaluation.dtypes import dtype_name
from swan.evaluation.machine import TooLong, at_most, default_device, last_level_cache, time_calls
from swan.kernels import cpu
from swan.storage import Graded, LayerPlan, TopK

__all__ = ["FORMS", "SHAPES", "Form", "Setup", "add_speedups", "check_forms", "forms_on", "reason_in"]

T = TypeVar("T")
Form = tuple[str, float]  # name and retention

FORMS: tuple[Form, ...] = (
    ("graded", 0.33), ("graded", 0.27), ("graded", 0.25), ("graded", 0.18), ("topk", 0.5), ("topk", 0.33),
    ("leading", 0.5),
)  # fmt: skip
FP8: Form = ("fp8", 0.5)
FORM_NAMES = ("graded", "topk", "leading", "fp8")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"heads": 32, "kv_heads": 8, "head_dim": 128},  # Llama-3.1-8B
    "smollm2": {"heads": 9, "kv_heads": 3, "head_dim": 64},  # SmolLM2-135M
}
COLUMNS = (
    "what", "impl", "form", "retention", "length", "batch", "dtype", "variant", "instruction_set", "median_ms",
    "spread", "bytes", "bandwidth_fraction", "error", "speedup", "peak_bytes",
)  # fmt: skip
CUDA_COLUMNS = ("card", "bound_ms", "launches", "host_us")
MOST_COPIES = 64
WRONG = 0.1  # relative error from which on a result is wrong, in any dtype


@dataclass(frozen=True)
class Setup:
    """One layer, and how its calls are timed. The defaults are the shape of Llama-3.1-8B.

    Args:
        batch: sequences.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: their dimension.
        buffer: recent tokens that swan keeps dense.
        dtype: of the cache and of the bases.
        device: where; CUDA if there is one, else the CPU.
        repeats: calls that are timed, at most.
        seconds: time for the calls of a row; fewer are timed where they are slow, but 3.
        compile_seconds: time for the first call of a row, which compiles.
        progress: show a bar on a terminal.

    Example:
        >>> Setup(**SHAPES["smollm2"], batch=4).head_dim
        64
    """

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    buffer: int = 128
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=default_device)
    repeats: int = 50
    seconds: float = 3.0
    compile_seconds: float = 120.0
    progress: bool = True

    def random(self, queries: int, tokens: int) -> list[Tensor]:
        """Draw queries, keys and values, the same at each call."""
        generator = torch.Generator(self.device).manual_seed(0)
        sizes = ((self.heads, queries), (self.kv_heads, tokens), (self.kv_heads, tokens))
        options: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": self.dtype}
        return [torch.randn(self.batch, heads, n, self.head_dim, **options) for heads, n in sizes]

    def plan_layer(self, form: str, retention: float) -> LayerPlan | None:
        """Return the layouts of a form; None for a dense cache."""
        d = self.head_dim
        match form:
            case "dense":
                return None
            case "fp8":
                return LayerPlan(Float8(d), Float8(d))
            case "leading":
                layout = Graded.leading(d, max(1, round(retention * d)))
                return LayerPlan(layout, layout)
            case "topk":
                layout = TopK(d, max(1, min(d, int(2 * d * retention) - 2 - -(-d // 8))))
                return LayerPlan(layout, layout)
        return Plan.for_retention(retention, dims=[(d, d)]).layers[0]

    def copies(self, nbytes: int) -> int:
        """Count the copies of so many bytes that together exceed twice the last-level cache, up to 64."""
        return 1 + min(2 * last_level_cache(self.device) // nbytes, MOST_COPIES - 1)

    def first(self, run: Callable[[], T]) -> T:
        """Make the first call, which compiles, within its time."""
        with at_most(self.compile_seconds, "the first call, which compiles,"):
            return run()

    def timed(self, run: Callable[[T], Any], inputs: Sequence[T]) -> dict[str, Any]:
        """Measure the columns ``median_ms`` and ``spread`` of calls with the inputs in turn."""
        return summary(time_calls(run, inputs, self.device, self.repeats, self.seconds))

    def replayed(self, run: Callable[[T], Any], inputs: Sequence[T]) -> dict[str, Any]:
        """Do as `timed`; on a GPU without the time of Python, by replay of a CUDA graph."""
        if self.device.type != "cuda":
            return self.timed(run, inputs)
        return summary(replayed(run, inputs, self.repeats, self.seconds))

    def bound(self, nbytes: int, median_ms: float, bandwidth: float) -> dict[str, Any]:
        """Return the columns of the bytes that a call must read, and of the time in which memory gives them."""
        least = 1e3 * nbytes / bandwidth
        columns: dict[str, Any] = {"bytes": nbytes, "bandwidth_fraction": least / median_ms}
        return columns | ({"bound_ms": least} if self.device.type == "cuda" else {})

    def row(self, what: str, impl: str, form: Form, length: int | None, **more: Any) -> dict[str, Any]:
        """Make a row in which nothing is measured yet."""
        about = {"what": what, "impl": impl, "form": form[0], "retention": form[1], "length": length}
        about |= {"batch": self.batch, "dtype": dtype_name(self.dtype), **instructions(self.device)}
        columns = dict[str, Any].fromkeys(COLUMNS)
        if self.device.type == "cuda":
            columns |= dict[str, Any].fromkeys(CUDA_COLUMNS) | {"card": torch.cuda.get_device_name(self.device)}
        return columns | about | more


def instructions(device: torch.device) -> dict[str, str | None]:
    """Name the variant of swan's CPU kernels, and the instruction set that torch uses, or the GPU's architecture."""
    if device.type == "cuda":
        return {"variant": None, "instruction_set": "sm_{}{}".format(*torch.cuda.get_device_capability(device))}
    return {"variant": cpu.variant(), "instruction_set": torch.backends.cpu.get_cpu_capability()}


def forms_on(device: torch.device) -> tuple[Form, ...]:
    """Return the forms of a benchmark if nobody chooses any."""
    return (*FORMS, FP8) if device.type == "cuda" else FORMS


def check_forms(forms: Sequence[Form]) -> None:
    """Raise a ValueError if a form is unknown."""
    if any(form not in FORM_NAMES for form, _ in forms):
        raise ValueError(f"forms are ({' or '.join(map(repr, FORM_NAMES))}, retention), got {list(forms)}")


def check_lengths(lengths: Sequence[int], setup: Setup) -> None:
    """Raise a ValueError if a length leaves nothing to pack."""
    if any(length <= setup.buffer for length in lengths):
        raise ValueError(f"every length must be above the buffer ({setup.buffer}), got {list(lengths)}")


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Compute median in ms and spread of times in seconds: 90th less 10th percentile, over the median."""
    median, tenths = statistics.median(times), statistics.quantiles(times, n=10, method="inclusive")
    return {"median_ms": 1e3 * median, "spread": (tenths[-1] - tenths[0]) / median}


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Compute the error in the 2-norm over the 2-norm of what was expected.

    Raises:
        ArithmeticError: it is so large that the result is wrong.
    """
    error = ((out.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error < WRONG:
        raise ArithmeticError(f"wrong result: relative error {error:.2g}")
    return error


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Set ``speedup`` over the fastest dense row of the same work, length and batch, also of several calls together."""
    done = [row for row in rows if row["median_ms"] is not None]
    for row in done:
        same = [other for other in done if all(other[c] == row[c] for c in ("what", "length", "batch"))]
        dense = [other["median_ms"] for other in same if other["form"] == "dense"]
        row["speedup"] = min(dense) / row["median_ms"] if dense else None


@contextlib.contextmanager
def reason_in(row: dict[str, Any]) -> Iterator[None]:
    """Note why something could not run, instead of raising."""
    try:
        yield
    except (Exception, TooLong) as error:
        lines = str(error).strip().splitlines()
        reason = lines[:1] or ["no message"]
        if reason[0].endswith(":"):  # the compiler's first line does not say it
            reason = lines[:2]
        row["error"] = f"{type(error).__name__}: {' '.join(reason)}"[:300]
    torch.cuda.empty_cache()  # once the traceback, which held tensors, is gone
