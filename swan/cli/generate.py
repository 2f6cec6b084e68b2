"""`swan generate`: text from a model on a winnowed cache."""

import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from swan.cli.common import (
    BasisOption,
    CalibrationOption,
    Dtype,
    DtypeOption,
    JsonOption,
    KeepOption,
    ModelArgument,
    check_retention,
    check_size,
    load,
    messages,
    print_json,
)
from swan.cli.tables import mebibytes, number
from swan.evaluation.calibrations import calibration_of
from swan.evaluation.dtypes import dtype_name
from swan.evaluation.texts import utf8
from swan.integrations import attach

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


class OnFull(StrEnum):
    """What a full budget does."""

    RAISE = "raise"
    EVICT = "evict"


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The prompt, or - to read it from standard input.")],
    retention: Annotated[
        float, typer.Option(callback=check_retention, help="Bytes kept of each history token; 1 keeps all.")
    ] = 0.33,
    budget: Annotated[
        str | None,
        typer.Option(callback=check_size, help="Most bytes of the cache, such as 64MiB, instead of a retention."),
    ] = None,
    on_full: Annotated[
        OnFull | None, typer.Option(help="What a full budget does: raise an error, or evict the oldest tokens.")
    ] = None,
    keep: KeepOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 200,
    buffer: Annotated[int, typer.Option(min=1, help="Recent tokens kept dense.")] = 128,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens kept dense.")] = 4,
    dense: Annotated[bool, typer.Option("--dense", help="Use the model's own dense cache.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of a random basis.")] = 0,
    basis: BasisOption = None,
    calibration_file: CalibrationOption = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Generate text on a winnowed cache and say what the cache held."""
    if on_full is not None and budget is None:
        raise typer.BadParameter("--on-full goes with a --budget")
    prompt = _read(prompt)  # before a model is loaded
    network, tokenizer = load(model, dtype)
    inputs = encode(tokenizer, prompt, raw=raw).to(network.device)
    if dense:
        from transformers import DynamicCache

        cache: Cache = DynamicCache(config=network.config)
        used = None
    else:
        from swan.integrations.transformers import SwanCache

        calibration = calibration_of(
            model, network, tokenizer, path=calibration_file, basis=None if basis is None else basis.value, seed=seed
        )
        used = calibration.basis
        attach(network, calibration)
        level: dict[str, Any] = {"retention": retention} if budget is None else {"budget": budget}
        level |= {} if on_full is None else {"on_full": on_full.value}
        cache = SwanCache(network, **level, keep=keep, buffer=buffer, sinks=sinks)
    torch.manual_seed(seed)
    row = stream(network, tokenizer, inputs, cache, tokens, sample=sample, show=not json)
    row["retention"] = getattr(cache, "retention", 1.0)
    if json:
        settings = {"model": model, "retention": retention, "budget": budget, "on_full": on_full, "keep": keep}
        settings |= {"buffer": buffer, "sinks": sinks}
        return print_json(settings | {"basis": used, "dtype": dtype_name(network.dtype), "dense": dense}, [row])
    messages.print(
        f"[dim]{row['new_tokens']} tokens at {number(row['tokens_per_second'], 1)}/s "
        f"after a prompt of {row['prompt_tokens']} ({number(row['prefill_seconds'], 1)} s); "
        f"cache {mebibytes(row['nbytes'])}, {number(row['compression'], 2)} of dense, "
        f"retention {number(row['retention'], 2)}[/]"
    )


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: str, *, raw: bool = False) -> "Tensor":
    """Encode a prompt as token ids ``[1, tokens]``, in the chat template where there is one.

    Raises:
        ValueError: the prompt has no tokens.
    """
    if raw or not tokenizer.chat_template:
        ids: Any = tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise ValueError("the prompt is empty; give some text to go on from")
        return ids
    chat = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return encoded["input_ids"]  # type: ignore[index, return-value]


def _read(prompt: str) -> str:
    """Return a prompt, from standard input where it is ``-``.

    Raises:
        ValueError: its bytes are not UTF-8.
    """
    content = sys.stdin.buffer.read() if prompt == "-" else prompt.encode(errors="surrogateescape")
    return utf8(content, "the prompt")


def stream(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: "Tensor",
    cache: "Cache",
    tokens: int,
    *,
    sample: bool = False,
    show: bool = True,
) -> dict[str, Any]:
    """Generate on a cache, printing the text as it comes; return the text and what it took."""
    from transformers import TextStreamer
    from transformers.generation.streamers import BaseStreamer

    from swan.integrations.transformers import cache_keyword

    class Clock(BaseStreamer):
        """Note when tokens come; the first call brings the prompt, the second the first token."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None

        def put(self, value: "Tensor") -> None:
            self.times.append(time.perf_counter())
            if self.text is not None:
                self.text.put(value)

        def end(self) -> None:
            if self.text is not None:
                self.text.end()

    clock = Clock()
    start = time.perf_counter()
    run: Any = model.generate
    out = run(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        do_sample=sample,
        streamer=clock,
        **{cache_keyword(model): cache},
    )
    assert isinstance(out, torch.Tensor)
    new = out[0, inputs.shape[1] :]
    first, last = clock.times[1], clock.times[-1]
    nbytes, dense_nbytes = cache_bytes(model, cache)
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new.tolist(),
        "prompt_tokens": inputs.shape[1],
        "new_tokens": len(new),
        "prefill_seconds": first - start,
        "tokens_per_second": (len(new) - 1) / (last - first) if len(new) > 1 else 0.0,
        "nbytes": nbytes,
        "compression": nbytes / dense_nbytes,
    }


def cache_bytes(model: "PreTrainedModel", cache: "Cache") -> tuple[int, int]:
    """Count the bytes that a cache holds, and those of a dense cache of the same tokens."""
    from swan.integrations.transformers import SwanCache

    if isinstance(cache, SwanCache):
        return cache.nbytes, round(cache.nbytes / cache.compression)
    layers = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]
    nbytes = sum(t.numel() * t.element_size() for pair in layers for t in pair if t is not None)
    return nbytes, nbytes
