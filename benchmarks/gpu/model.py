"""A whole model of random weights in the shape of Llama-3.2-1B: time of a step, bytes of the cache, tokens per second.

Histories are random tokens, stored as the cache stores any; what a step reads and computes does not depend on them.
Prefill is timed with true prompts. Each job first makes its model and cache and compiles, and is timed only when all
processes have done so.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import swan
from swan import SwanCache
from swan.evaluation.bench import Setup
from swan.evaluation.bench.common import summary
from swan.evaluation.bench.gpu import host_us, launches
from swan.evaluation.bench.model import cache_nbytes
from swan.evaluation.machine import synchronize
from swan.integrations.transformers import cache_keyword

from .rows import Job, Row

PREPARES = True  # worker.py: all jobs are made ready, then timed one by one
SIZES: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY: dict[str, Any] = SIZES | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97,
}  # fmt: skip
WARM_UP, STEPS = 4, 20
ROOM = WARM_UP + 2 * STEPS + 16  # tokens beside the context, for steps and counts
PROMPT = 8192  # context whose prefill is timed


@dataclass(frozen=True)
class Kind:
    """A cache to time; retention 1 is transformers' own."""

    context: int
    batch: int
    retention: float = 1.0
    impl: str = "compiled"

    def __str__(self) -> str:
        form = "dense" if self.retention == 1 else f"swan {self.retention}"
        return f"model {self.context} x {self.batch}, {form}, {self.impl}"


# Eight processes take the columns of this table: each is all dense or all swan's, so that it holds one model.
# 32 sequences of swan at 0.26 take the memory of 8 dense ones.
KINDS = [
    Kind(32768, 8), Kind(32768, 8, 0.26), Kind(32768, 8, 0.15), Kind(32768, 1),
    Kind(32768, 1, 0.26), Kind(8192, 1), Kind(8192, 1, 0.26), Kind(8192, 1, impl="eager"),
    Kind(8192, 8), Kind(8192, 8, 0.26), Kind(32768, 1, 0.15), Kind(32768, 1, impl="eager"),
    Kind(32768, 8, 0.5), Kind(32768, 8, impl="eager"), Kind(8192, 1, 0.15), Kind(8192, 8, impl="eager"),
    None, Kind(32768, 32, 0.26), Kind(8192, 8, 0.15), None,
    Kind(32768, 1, 0.5), None, Kind(8192, 1, 0.5), None,
]  # fmt: skip
QUICK = [Kind(150, 1, impl="eager"), Kind(150, 2, 0.5)]


def jobs(device: torch.device, quick: bool) -> list[Job | None]:
    return [kind and (str(kind), functools.partial(rows, kind, device, quick)) for kind in (QUICK if quick else KINDS)]


@functools.cache
def network(device: torch.device, quick: bool, attached: bool) -> Any:
    """Make the model, for swan's caches with random bases."""
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if quick else torch.bfloat16
        model = AutoModelForCausalLM.from_config(LlamaConfig(**(TINY if quick else SIZES)), dtype=dtype).eval()
    if attached:
        ids = torch.randint(model.config.vocab_size, (1, 64), device=device)
        swan.attach(model, swan.calibrate(model, [ids], "random", effects=False, progress=False))
    return model


def rows(kind: Kind, device: torch.device, quick: bool) -> Iterator[Row]:
    """Prepare a cache and its step, then time it."""
    model = network(device, quick, attached=kind.retention < 1)
    cache = filled(kind, model)
    step = steps(kind, model, cache, quick)
    for _ in range(WARM_UP):
        step(None)
    synchronize(device)
    yield {}
    setup = Setup(batch=kind.batch, heads=model.config.num_attention_heads, dtype=model.dtype, device=device,
                  kv_heads=model.config.num_key_value_heads, head_dim=model.config.head_dim)  # fmt: skip
    form = ("dense", 1.0) if kind.retention == 1 else ("graded", kind.retention)
    sizes = {"heads": setup.heads, "kv_heads": setup.kv_heads, "head_dim": setup.head_dim}
    with torch._dynamo.config.patch(error_on_recompile=True):
        times = [timed(step, device) for _ in range(STEPS)]
    columns = summary(times) | {"bytes": cache_nbytes(cache)} | sizes
    columns |= {"tokens_per_second": kind.batch * STEPS / sum(times)}
    if device.type == "cuda" and kind.impl == "eager":
        columns |= {"host_us": host_us(step, [None], device), "launches": launches(step, [None], device)}
    yield setup.row("model", kind.impl, form, kind.context) | columns
    if kind.batch == 1 and kind.context in (PROMPT, QUICK[0].context):
        del cache, step
        seconds = [prefill_seconds(kind, model, device) for _ in range(2)][-1]
        row = setup.row("prefill", "dynamic" if kind.impl == "eager" else "static", form, kind.context) | sizes
        yield row | {"median_ms": 1e3 * seconds, "tokens_per_second": kind.context / seconds}


def new_cache(kind: Kind, model: Any) -> Any:
    limit = kind.context + ROOM
    if kind.retention < 1:
        return SwanCache(model, retention=kind.retention, static=True, max_length=limit)
    if kind.impl == "eager":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=limit)


def filled(kind: Kind, model: Any) -> Any:
    """Make a cache and store random keys and values in each layer of it."""
    cache, config = new_cache(kind, model), model.config
    shape = kind.batch, config.num_key_value_heads, kind.context, config.head_dim
    for index in range(config.num_hidden_layers):
        k, v = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        if kind.retention == 1:
            cache.update(k, v, index)
        else:
            layer = cache.layers[index]
            layer.lazy_initialization(k, v)
            layer.kv.update(k, v)
    return cache


def steps(kind: Kind, model: Any, cache: Any, quick: bool) -> Any:
    """Return a function that makes a step; a compiled one is captured as a CUDA graph."""
    token = torch.zeros(kind.batch, 1, dtype=torch.long, device=model.device)
    forward = model.forward
    if kind.impl == "compiled":
        how: dict[str, Any] = {"backend": "eager"} if quick else {"mode": "reduce-overhead"}
        forward = torch.compile(forward, fullgraph=True, dynamic=False, **how)
    keyword = {cache_keyword(model): cache}

    def step(_: None) -> Tensor:
        if kind.impl == "compiled":
            torch.compiler.cudagraph_mark_step_begin()
        return forward(token, use_cache=True, **keyword).logits

    if not step(None).isfinite().all():
        raise ArithmeticError("wrong result: the logits are not finite")
    return step


def timed(step: Any, device: torch.device) -> float:
    """Measure the seconds of a step until its logits are there."""
    start = time.perf_counter()
    step(None)
    synchronize(device)
    return time.perf_counter() - start


def prefill_seconds(kind: Kind, model: Any, device: torch.device) -> float:
    """Measure the seconds of taking in a prompt."""
    ids = torch.randint(model.config.vocab_size, (kind.batch, kind.context), device=device)
    cache = new_cache(kind, model)
    synchronize(device)
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    synchronize(device)
    return time.perf_counter() - start
