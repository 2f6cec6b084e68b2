"""The matrix of architectures and uses: `make matrix` prints it, tests/integrations/test_matrix.py holds it.

A use is a function of a model and of how a cache is made, and returns tokens; its cell is what a `SwanCache` that keeps
everything does against transformers' own dense cache: the same tokens, or a refusal with its reason. Another
architecture is an entry of `ARCHITECTURES` in tests/tiny.py, another use a function here.
"""

import copy
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache, TextStreamer

from swan import SwanCache, detach
from swan.calibration.capture import hides
from swan.integrations.transformers import cache_keyword
from tests.tiny import ARCHITECTURES, attached, everything, generated, left_padded, tiny, tokens

NewCache = Callable[[], Cache]
Use = Callable[[PreTrainedModel, NewCache], list[Tensor]]
USES: dict[str, Use] = {}
CACHES = {"dynamic": {}, "static": {"static": True, "max_length": 128}}

# What `calibrate` or `attach` says of architectures that they refuse.
REFUSED = {
    "mistral-sliding": "every layer attends to a sliding window only",
    "gemma2": "computes its attention with softcap",
    "gpt-oss": "computes its attention with s_aux",
    "deepseek": r"makes keys and values from a latent vector \(MLA\)",
    "doge": r"computes its attention with a mask of torch\.float32",
    "jetmoe": "it computes with keys and values between its cache and its attention",
    "falcon-h1": "2 caches with LinearAttentionAndFullAttentionLayer among them",
    "bloom": "has no attention that swan knows",
    "mamba": "has no attention that swan knows",
    "gemma3n": "2 layers that use the keys and values of earlier ones",
    "gemma4-e": "2 layers that use the keys and values of earlier ones",
    "mllama": r"attends to images in layers \[1\]",
    "bart": "has an encoder and a decoder",
}

TOO = "refused by transformers with its own cache too"
WRONG_TOO = "other tokens, those that transformers' own static cache gives too"
OWN = ("gemma3", "lfm2", "qwen3-next")  # some of their layers are transformers' own, and cannot do everything
SILENT = ("gpt2", "opt", "stablelm")  # do not tell their attention that weights are asked for


def expected(architecture: str, name: str) -> str:
    """The pattern of what a cell says."""
    reason = refusal(architecture, name)
    theirs = architecture in OWN or (architecture, name) == ("opt", "compiled")  # in old versions
    if reason:
        return f"refused: .*{reason}"
    lossy = "|refused: .* cannot forget tokens: " if name == "crop" else ""  # where theirs forgets too much in silence
    return f"exact|{TOO}|{WRONG_TOO}{lossy}" if theirs else "exact"


def refusal(architecture: str, name: str) -> str | None:
    """Return the words of the error in a cell; None where it is exact, or refused by transformers' own caches."""
    if name == "output attentions" and architecture not in SILENT:
        return "does not support output_attentions"
    return REFUSED.get(architecture)


def use(function: Use) -> Use:
    """Register a use under its name."""
    USES[function.__name__.replace("_", " ")] = function
    return function


def cell(architecture: str, name: str, kind: str = "dynamic") -> str:
    """``"exact"``, or ``"refused"`` and the reason; raises AssertionError where tokens differ that need not."""
    try:
        model = attached(architecture)
    except (ValueError, TypeError) as error:
        return f"refused: {error}"
    try:
        found = _run(name, model, lambda: everything(model, **CACHES[kind]))
    except AssertionError:
        raise
    except Exception as error:
        if (theirs := _error_of(name, model, kind)) is not None:
            return f"{TOO}: {theirs}"
        if not isinstance(error, ValueError | TypeError | NotImplementedError):
            raise
        return f"refused: {error}"
    expected = _run(name, model, lambda: DynamicCache(config=model.config))
    if _same(found, expected):
        return "exact"
    as_theirs = kind == "static" and _same(found, _run(name, model, lambda: _theirs(model, kind)))
    assert as_theirs, f"{architecture}, {name}, {kind}: other tokens than with a dense cache"
    return WRONG_TOO


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _theirs(model: PreTrainedModel, kind: str) -> Cache:
    """transformers' own cache of a kind."""
    return StaticCache(model.config, max_cache_len=128) if kind == "static" else DynamicCache(config=model.config)


def _error_of(name: str, model: PreTrainedModel, kind: str) -> str | None:
    """Return the error of transformers' own cache of a kind for a use that it does not serve."""
    try:
        _run(name, model, lambda: _theirs(model, kind))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _run(name: str, model: PreTrainedModel, new_cache: NewCache) -> list[Tensor]:
    torch.manual_seed(7)
    return USES[name](model, new_cache)


# Inputs -------------------------------------------------------------------------------------------

SINGLE = {"input_ids": tokens(1, 40)}
PADDED = {name: t for name, t in left_padded(40, 3, 21).items() if name != "position_ids"}


@torch.no_grad()
def forward(model: PreTrainedModel, cache: Cache | None, ids: Tensor, **more: object) -> Tensor:
    given = {} if cache is None else {cache_keyword(model): cache}
    return model(ids, **given, **more).logits.argmax(-1)


# generate -----------------------------------------------------------------------------------------


@use
def greedy(model, new_cache):
    return [generated(model, new_cache(), **SINGLE)]


@use
def short(model, new_cache):
    """Prompts shorter than the buffer."""
    return [generated(model, new_cache(), input_ids=tokens(2, 3))]


@use
def left_padding(model, new_cache):
    return [generated(model, new_cache(), **PADDED)]


@use
def right_padding(model, new_cache):
    """In one forward, as loss and log-likelihoods are computed."""
    mask = PADDED["attention_mask"].flip(-1)
    found = forward(model, new_cache(), tokens(3, 40), attention_mask=mask)
    return [found[mask.bool()]]


@use
def sampling(model, new_cache):
    return [generated(model, new_cache(), **PADDED, do_sample=True, num_return_sequences=3)]


@use
def beams(model, new_cache):
    return [generated(model, new_cache(), **PADDED, num_beams=3)]


@use
def beams_returned(model, new_cache):
    return [generated(model, new_cache(), **SINGLE, num_beams=4, num_return_sequences=4)]


@use
def beam_sampling(model, new_cache):
    return [generated(model, new_cache(), **PADDED, do_sample=True, num_beams=2, num_return_sequences=2)]


@use
def prefill_in_chunks(model, new_cache):
    return [generated(model, new_cache(), **inputs, prefill_chunk_size=11) for inputs in (SINGLE, PADDED)]


@use
def prompt_lookup(model, new_cache):
    # No token ends the text: None for that is more than the lookup of older versions can take.
    ids = tokens(1, 12).repeat(1, 3)
    return [generated(model, new_cache(), input_ids=ids, prompt_lookup_num_tokens=4, eos_token_id=-1)]


@use
def assistant(model, new_cache):
    return [generated(model, new_cache(), **SINGLE, assistant_model=tiny(seed=1))]


@use
def conversation(model, new_cache):
    """Three turns in one cache, of one row and of rows that are padded."""
    found = []
    for inputs in (SINGLE, PADDED):
        cache, ids = new_cache(), inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        for turn in range(3):
            ids = torch.cat([ids, tokens(ids.shape[0], 5, seed=turn)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            ids = generated(model, cache, input_ids=ids, attention_mask=mask, max_new_tokens=4)
        found.append(ids)
    return found


@use
def streamer(model, new_cache):
    class Words:
        """A tokenizer, as far as a streamer asks for one."""

        def decode(self, ids, **_):
            return "".join(f"{i} " for i in ids)

    class Quiet(TextStreamer):
        text = io.StringIO()

        def on_finalized_text(self, text, stream_end=False):
            self.text.write(text)

    stream = Quiet(Words(), skip_prompt=True)
    stream.text = io.StringIO()
    generated(model, new_cache(), **SINGLE, streamer=stream)
    return [torch.tensor([int(word) for word in stream.text.getvalue().split()])]


@use
def inputs_embeds(model, new_cache):
    return [generated(model, new_cache(), inputs_embeds=model.get_input_embeddings()(SINGLE["input_ids"]).detach())]


@use
def no_cache(model, new_cache):
    """A model that is told to use no cache is the one before `attach`, and a cache that it had begun goes on after."""
    cache = _filled(model, new_cache)
    plain = model
    if not isinstance(cache, SwanCache):
        plain = copy.deepcopy(model)
        detach(plain)
    found = [generated(plain, **SINGLE, use_cache=False), forward(plain, None, tokens(2, 20), use_cache=False)]
    return [*found, _next(model, cache, 2)]


@use
def autocast(model, new_cache):
    """Tokens that float32 prefers by far more than bfloat16 may move a logit: compared here, so none are returned."""
    text = torch.cat([PADDED["input_ids"], tokens(3, 12, seed=2)], dim=1)

    def logits(cache=None, **given):
        """Make `generate` write this text, and return the logits of each step."""
        forced = {"prefix_allowed_tokens_fn": lambda row, ids: [int(text[row, len(ids)])]}
        kept = {"output_logits": True, "return_dict_in_generate": True}
        return torch.stack(generated(model, cache, **PADDED, **forced, **kept, **given).logits, dim=1).float()

    exact = logits(use_cache=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, found = logits(use_cache=False), logits(new_cache())
    best, second = exact.topk(2).values.unbind(-1)
    clear = best - second > 8 * (rounded - exact).abs().amax(-1).median()
    agree = (found.argmax(-1) == exact.argmax(-1))[clear]
    # Rounding may send a token to another expert, and then any of its logits is another.
    mixture = any("experts" in name for name in model.config.to_dict())
    assert len(agree) >= 8
    assert agree.float().mean() >= (0.75 if mixture else 1), f"other tokens in {(~agree).sum()} of {len(agree)} steps"
    return []


# forward ------------------------------------------------------------------------------------------


@use
def mask_4d(model, new_cache):
    """A tree of drafts: two continuations of one prompt that do not see each other."""
    cache, ids = new_cache(), tokens(1, 26)
    if isinstance(cache, SwanCache) and cache.static:
        cache = everything(model, static=True, max_length=26)  # as many columns as the mask has
    start = forward(model, cache, ids[:, :20])
    mask = torch.ones(6, 26, dtype=torch.bool).tril(20)
    mask[3:, 20:23] = False
    positions, given = torch.tensor([[20, 21, 22, 20, 21, 22]]), mask[None, None]
    if hides(getattr(model.config, "sliding_window", None), model.config):
        kept = model.config.sliding_window - 1 + 6
        given = {"full_attention": given, "sliding_attention": given[..., -kept:]}
    return [start, forward(model, cache, ids[:, 20:], attention_mask=given, position_ids=positions)]


@use
def output_attentions(model, new_cache):
    return [forward(model, new_cache(), tokens(1, 20), output_attentions=True)]


def _filled(model: PreTrainedModel, new_cache: NewCache) -> Cache:
    cache = new_cache()
    forward(model, cache, tokens(2, 40))
    return cache


def _next(model: PreTrainedModel, cache: Cache, rows: int, seed: int = 3) -> Tensor:
    return torch.cat([forward(model, cache, t) for t in tokens(rows, 5, seed).split(1, dim=1)], dim=1)


@use
def token_by_token(model, new_cache):
    cache = _filled(model, new_cache)
    return [_next(model, cache, 2)]


@use
def crop(model, new_cache):
    cache = new_cache()
    if hasattr(cache, "activate_past_recording"):  # sliding layers cannot be cropped without
        cache.activate_past_recording()
    forward(model, cache, tokens(2, 40))
    cache.crop(-3)
    return [_next(model, cache, 2)]


@use
def reorder(model, new_cache):
    cache = _filled(model, new_cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    return [_next(model, cache, 2)]


@use
def repeat_rows(model, new_cache):
    cache = _filled(model, new_cache)
    cache.batch_repeat_interleave(3)
    return [_next(model, cache, 6)]


@use
def select_rows(model, new_cache):
    cache = _filled(model, new_cache)
    cache.batch_select_indices(torch.tensor([1]))
    return [_next(model, cache, 1)]


@use
def reset(model, new_cache):
    """Reset a cache and go on with any number of rows; a static cache keeps its rows."""
    found = []
    for rows in (2, 3):
        cache = _filled(model, new_cache)
        if isinstance(cache, SwanCache) and not (cache.static and rows == 3):
            cache.reset()
        else:
            cache = new_cache()
        found += [forward(model, cache, tokens(rows, 11, seed=5)), _next(model, cache, rows)]
    return found


@use
def deep_copy(model, new_cache):
    cache = _filled(model, new_cache)
    twin = copy.deepcopy(cache)
    return [_next(model, cache, 2, seed=4), _next(model, twin, 2)]


@use
def pickled(model, new_cache):
    cache = pickle.loads(pickle.dumps(_filled(model, new_cache)))
    return [_next(model, cache, 2)]


@use
def saved(model, new_cache):
    """Written to a file and read back, as often as one likes."""
    cache = _filled(model, new_cache)
    if not isinstance(cache, SwanCache):
        return [_next(model, copy.deepcopy(cache), 2, seed) for seed in (3, 4)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.safetensors"
        cache.save(path)
        return [_next(model, SwanCache.load(path, model), 2, seed) for seed in (3, 4)]


@use
def offloaded(model, new_cache):
    cache = _filled(model, new_cache)
    if isinstance(cache, SwanCache):
        cache.offload()
    return [_next(model, cache, 2)]


@use
def excluded_layer(model, new_cache):
    """A layer of full attention that stays dense, if there are two."""
    cache = new_cache()
    if isinstance(cache, SwanCache) and len(cache.winnowed) > 1:
        settings = {"static": True, "max_length": 128} if cache.static else {}
        cache = everything(model, exclude=[min(cache.winnowed)], **settings)
    return [generated(model, cache, **PADDED)]


@use
def compiled(model, new_cache):
    """One graph for all steps of a static cache; a dynamic one is not compiled, as transformers' own is not."""
    cache = _filled(model, new_cache)
    step = model
    if cache.is_compileable:
        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = [
        forward(step, cache, t, position_ids=torch.full((2, 1), 40 + i))
        for i, t in enumerate(tokens(2, 5, 3).split(1, dim=1))
    ]
    return [torch.cat(found, dim=1)]


# The table ----------------------------------------------------------------------------------------


def cells() -> Iterator[tuple[str, str, str]]:
    """Architectures, uses and kinds of caches; of architectures that are refused one cell."""
    for architecture in ARCHITECTURES:
        if architecture in REFUSED:
            yield architecture, "greedy", "dynamic"
            continue
        for name in USES:
            for kind in CACHES:
                yield architecture, name, kind


def model_type(architecture: str) -> str:
    import transformers

    _, config, settings = ARCHITECTURES[architecture]
    return getattr(transformers, config)(**settings).model_type


def main() -> None:
    """Print the matrix."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    torch.set_num_threads(1)
    found = {key: cell(*key) for key in track(list(cells()), "matrix")}
    columns = [architecture for architecture in ARCHITECTURES if architecture not in REFUSED]
    reasons: dict[str, str] = {}

    def shown(key: tuple[str, str, str]) -> str:
        if found[key] == "exact":
            return "="
        return reasons.setdefault(found[key], f"({len(reasons) + 1})")

    console = Console(width=220)
    table = Table(
        "use", *columns, title="SwanCache that keeps everything, and a dense cache, in float32: dynamic static"
    )
    for name in USES:
        table.add_row(name, *(" ".join(shown((column, name, kind)) for kind in CACHES) for column in columns))
    console.print(table)
    for reason, mark in reasons.items():
        console.print(mark, reason)
    for architecture in REFUSED:
        console.print(f"{architecture}: {found[architecture, 'greedy', 'dynamic']}")
    exact = sum(result == "exact" for result in found.values())
    console.print(f"=: the same tokens, {exact} of {len(found)} cells; none is left out")


if __name__ == "__main__":
    main()
