"""Tokens per second of generation with a whole model: swan's caches beside those of transformers."""

import contextlib
import ctypes
import inspect
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from swan.calibration import Calibration
from swan.calibration.batches import check_ids
from swan.calibration.capture import device_of
from swan.calibration.progress import track
from swan.evaluation.baselines import TransformersQuantized
from swan.evaluation.bench.common import Setup, add_speedups, reason_in, relative_error, summary
from swan.evaluation.machine import at_most, synchronize
from swan.integrations import attached

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["MODEL_IMPLS", "bench_model"]

RETENTIONS = (0.5, 0.26)
MODEL_IMPLS = ("eager", "compiled")
WARM_UP = 4  # steps; the first one compiles
EXTRA = ("prefill_seconds", "tokens_per_second", "agreement", "growth", "growth_counted")
STATM = Path("/proc/self/statm")


@torch.no_grad()
def bench_model(
    model: "PreTrainedModel",
    prompt: Tensor,
    calibration: Calibration,
    *,
    tokens: int = 200,
    retentions: Sequence[float] = RETENTIONS,
    impls: Sequence[str] = MODEL_IMPLS,
    quantized: bool = True,
    buffer: int = 128,
    compile_seconds: float = 600.0,
    after_row: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time greedy decoding after a prompt, a token at a time, on each kind of cache.

    The first row is transformers' dense cache in eager mode; all others are given its tokens, so that each does the
    same work, and what they would have chosen is counted. A prompt is taken in once for each row, in eager mode; 4
    steps are made before the clock starts. Compiled steps are ``torch.compile(model.forward, fullgraph=True)`` on a
    static cache, on CUDA with ``mode="reduce-overhead"``; a recompilation while the clock runs is an error.

    Args:
        model: a transformers model that is not attached, with its SDPA attention.
        prompt: token ids ``[batch, tokens]``.
        calibration: of the model.
        tokens: steps to time.
        retentions: of the swan caches, beside 1.
        impls: ``"eager"`` (dynamic caches), ``"compiled"`` (static ones).
        quantized: also transformers' quantized cache (quanto, 4 bits), where quanto is installed.
        buffer: recent tokens that swan keeps dense.
        compile_seconds: time for the first step of a row, which compiles.
        after_row: called with the rows so far after each one; a row takes minutes.
        progress: show a bar on a terminal.

    Returns:
        Rows as of `bench_decode`: ``form`` is ``"dense"``, ``"quanto"`` or ``"graded"`` (swan), ``length`` the tokens
        of the prompt, ``median_ms`` and ``spread`` are of a step, ``bytes`` what the cache holds at the end,
        ``error`` that of the last logits over those of the first row; a dense cache, or one of retention 1, whose
        logits differ is a failure. And ``prefill_seconds``, ``tokens_per_second`` (of all steps together),
        ``agreement`` (share of steps with the token of the first row), ``growth`` (of the memory of the process,
        on CUDA of what is allocated there, in bytes per step and sequence; None where the system does not tell) and
        ``growth_counted`` (the same of ``bytes``).

    Raises:
        TypeError: the prompt is no tensor.
        ValueError: an unknown impl, or the prompt is not token ids of the model ``[batch, tokens]``.

    Example:
        ```python
        model, tokenizer = load_model("smollm2-135m", dtype="auto")
        prompt = token_windows(evaluation_text("qasper"), tokenizer, 1, 7500)
        rows = bench_model(model, prompt, Calibration.load("smollm2.safetensors"))
        ```
    """
    check_ids(prompt, model)
    if not set(impls) <= set(MODEL_IMPLS):
        raise ValueError(f"expected impls of {', '.join(MODEL_IMPLS)}, got {list(impls)}")
    generation = _Generation(model, prompt.to(device_of(model)), tokens, compile_seconds)
    setup = Setup(batch=prompt.shape[0], dtype=model.dtype, device=device_of(model))
    rows: list[dict[str, Any]] = []
    reference: tuple[Tensor, Tensor] | None = None
    for rival in track(_rivals(retentions, impls, quantized, buffer), "decoding", show=progress):
        row = setup.row("model", rival.impl, (rival.form, rival.retention), prompt.shape[1], **dict.fromkeys(EXTRA))
        with reason_in(row), attached(model, calibration if rival.form == "graded" else None):
            forced = None if reference is None else reference[0]
            measured, chosen, logits = generation.run(rival, forced)
            reference = reference or (chosen, logits)
            row["agreement"] = (chosen == reference[0])[:, 1:].float().mean().item()
            row["error"] = _error(logits, reference[1], exact=rival.retention == 1)
            row |= measured
        rows.append(row)
        add_speedups(rows)
        after_row(rows)
    return rows


@dataclass(frozen=True)
class _Rival:
    """A kind of cache; `make` builds one for a model and so many tokens."""

    form: str
    retention: float
    impl: str
    make: "Callable[[PreTrainedModel, int], Cache]"


def _rivals(retentions: Sequence[float], impls: Sequence[str], quantized: bool, buffer: int) -> list[_Rival]:
    """List the caches to time; the dense one in eager mode always comes first."""
    import transformers
    from transformers.utils.import_utils import is_optimum_quanto_available

    def swan_cache(retention: float, static: bool) -> "Callable[[PreTrainedModel, int], Cache]":
        from swan.integrations.transformers import SwanCache

        def make(model: "PreTrainedModel", length: int) -> "Cache":
            limits: dict[str, Any] = {"static": True, "max_length": length} if static else {}
            return SwanCache(model, retention=retention, buffer=buffer, **limits)

        return make

    quanto = TransformersQuantized("quanto", 4)
    rivals = [_Rival("dense", 1.0, "eager", lambda model, _: transformers.DynamicCache(config=model.config))]
    if "compiled" in impls:
        rivals.append(
            _Rival("dense", 1.0, "compiled", lambda m, n: transformers.StaticCache(config=m.config, max_cache_len=n))
        )
    if "eager" in impls and quantized and is_optimum_quanto_available():
        rivals.append(_Rival(quanto.form, quanto.retention, "eager", lambda model, _: quanto.cache(model)))
    return rivals + [
        _Rival("graded", retention, impl, swan_cache(retention, impl == "compiled"))
        for impl, retention in itertools.product(impls, dict.fromkeys([1.0, *retentions]))
    ]


@dataclass(frozen=True)
class _Generation:
    model: "PreTrainedModel"
    prompt: Tensor
    tokens: int
    compile_seconds: float

    def run(self, rival: _Rival, forced: Tensor | None) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Return the measured columns, the tokens ``[batch, steps + 1]`` and the last logits ``[batch, vocabulary]``.

        Args:
            rival: its cache is built here, and freed.
            forced: tokens to go on with instead of the chosen ones.
        """
        from swan.integrations.transformers import cache_keyword

        model, steps = self.model, WARM_UP + self.tokens
        cache = rival.make(model, self.prompt.shape[1] + steps)
        keyword = {cache_keyword(model): cache}
        last: dict[str, Any] = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        start = time.perf_counter()
        logits = model(self.prompt, use_cache=True, **keyword, **last).logits[:, -1]
        chosen = [logits.argmax(-1)]
        synchronize(device_of(model))
        prefill_seconds = time.perf_counter() - start
        forward: Any = model.forward
        graphs: dict[str, Any] = {"mode": "reduce-overhead"} if device_of(model).type == "cuda" else {}
        if rival.impl == "compiled":
            torch.compiler.reset()
            forward = torch.compile(forward, fullgraph=True, **graphs)

        def step(i: int) -> float:
            nonlocal logits
            start = time.perf_counter()
            token = chosen[i] if forced is None else forced[:, i]
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            logits = forward(token[:, None], use_cache=True, **keyword).logits[:, -1]
            chosen.append(logits.argmax(-1))
            synchronize(device_of(model))
            return time.perf_counter() - start

        with at_most(self.compile_seconds, "the first step, which compiles,"):
            step(0)
        for i in range(1, WARM_UP):
            step(i)
        memory, counted = _memory(device_of(model)), cache_nbytes(cache)
        with torch._dynamo.config.patch(error_on_recompile=True):
            times = [step(i) for i in range(WARM_UP, steps)]
        count, nbytes = len(self.prompt) * self.tokens, cache_nbytes(cache)
        measured = summary(times) | {"bytes": nbytes, "prefill_seconds": prefill_seconds}
        measured |= {"tokens_per_second": count / sum(times), "growth_counted": (nbytes - counted) / count}
        if memory is not None:
            measured["growth"] = ((_memory(device_of(model)) or memory) - memory) / count
        return measured, torch.stack(chosen, dim=1), logits.clone()


def _error(logits: Tensor, expected: Tensor, exact: bool) -> float:
    if not torch.isfinite(logits).all():
        raise ArithmeticError("wrong result: the logits are not finite")
    if exact:
        return relative_error(logits, expected)
    return ((logits.double() - expected.double()).norm() / expected.double().norm()).item()


def cache_nbytes(cache: "Cache") -> int:
    """Count the bytes of every storage that the layers of a cache hold.

    Example:
        ```python
        cache_nbytes(transformers.DynamicCache(config=model.config))
        ```
    """
    nbytes = getattr(cache, "nbytes", None)
    if nbytes is not None:
        return nbytes
    values = itertools.chain.from_iterable(vars(layer).values() for layer in cache.layers)
    tensors = itertools.chain.from_iterable(_plain(t) for t in values if isinstance(t, Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _plain(t: Tensor) -> list[Tensor]:
    """List the tensors that a tensor is made of."""
    if not is_traceable_wrapper_subclass(t):
        return [t]
    names, _ = t.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(t, name))]


def _memory(device: torch.device) -> int | None:
    """Count the bytes that this process holds, or has allocated on a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not STATM.is_file():
        return None
    with contextlib.suppress(OSError, AttributeError):  # of other libraries than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed, of the prompt say, would hide what is added
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
