"""Needle retrieval: numbers hidden in a long text and asked for after it has left the buffer of a cache."""

import copy
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from swan.calibration.capture import device_of
from swan.calibration.progress import track
from swan.evaluation.perplexity import CHUNK
from swan.evaluation.texts import token_windows

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NeedleCase", "evaluate_needles", "needle_cases", "summarize_needles"]

# A plain text for chat and base models alike. Question and answer begin with what no token joins to the text before.
NEEDLE = "\nThe magic number of {key} is {number}.\n"
QUESTION = "\n\nQuestion: What is the magic number of {key}?\nAnswer: The magic number of {key} is"
ANSWER = " {number}"
WORDS = (
    "anchor apple arrow balloon basket bottle bridge butter candle carpet castle chimney circus coffee cotton desert "
    "dolphin dragon engine falcon feather forest fountain garden ginger guitar hammer harbor helmet honey island "
    "jacket jungle kettle kitchen ladder lantern lemon magnet mirror mountain nickel ocean orange oyster pencil "
    "pepper piano pillow planet pocket rabbit ribbon river saddle sailor spider temple tiger tunnel umbrella violin "
    "walnut window"
)
KEYS = WORDS.split()


@dataclass(frozen=True)
class NeedleCase:
    """A question about a number in a context, as token ids.

    Attributes:
        context: of exactly `length` tokens, the bos token of the tokenizer included where it puts one.
        question: follows the context; cases with equal contexts share a prefill.
        answer: the number.
        length: tokens of the context.
        depth: where the needle is, as a share of the context.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    length: int
    depth: float


def needle_cases(
    tokenizer: "PreTrainedTokenizerBase",
    haystack: str,
    *,
    lengths: Sequence[int] = (1024, 2048),
    depths: int = 5,
    cases: int = 60,
    needles: int = 2,
    seed: int = 0,
) -> list[NeedleCase]:
    r"""Hide sentences with numbers of seven digits in stretches of a text.

    The depths are $(i + 1/2) / \text{depths}$: with five from 0.1 to 0.9. Between a needle and its question
    lie about $(1 - \text{depth}) \cdot \text{length}$ tokens (some 100 at 0.9 of 1024): a cache is tested only
    where its buffer is smaller. Each length has as many cases at each depth.

    Each context holds `needles` sentences about different words, and is read once for all its questions. More
    needles cost less and confuse more: in trials of this text with the dense cache in float32, at about 1024
    and 2048 tokens, SmolLM2-135M-Instruct found 20 of 20 alone in their context, 66 of 68 in pairs and
    45 of 50 in fives, Gemma-3-270M 15 of 15, 49 of 50 and 35 of 40.

    Args:
        tokenizer: a tokenizer of transformers.
        haystack: the text, such as ``evaluation_text("qasper")``; each context is another stretch of it.
        lengths: of the contexts in tokens.
        depths: how many depths.
        cases: how many cases in all, a multiple of ``len(lengths) * depths``.
        needles: sentences in a context, at most `depths`.
        seed: of the words, numbers and stretches.

    Returns:
        The cases, by length and context.

    Raises:
        TypeError: the haystack is no string.
        ValueError: counts that do not fit together, or a haystack or length that is too short.

    Example:
        >>> model, tokenizer = load_model("smollm2-135m")  # doctest: +SKIP
        >>> cases = needle_cases(tokenizer, evaluation_text(), cases=20)  # doctest: +SKIP
        >>> tokenizer.decode(cases[0].question + cases[0].answer)  # doctest: +SKIP
        '\n\nQuestion: What is the magic number of planet?\nAnswer: The magic number of planet is 9208870'
    """
    if not isinstance(haystack, str):
        raise TypeError(f"a haystack is a text, got {type(haystack).__name__}")
    if not 1 <= needles <= depths <= len(KEYS):
        raise ValueError(f"expected 1 <= needles <= depths <= {len(KEYS)}, got needles={needles} and depths={depths}")
    if not lengths or cases < 1 or cases % (len(lengths) * depths):
        raise ValueError(
            f"expected cases to be a multiple of lengths x depths = {len(lengths)} x {depths}, got {cases}; "
            "each length has as many cases at each depth"
        )
    rng = random.Random(seed)
    keys = rng.sample(KEYS, len(KEYS))
    per_length = cases // len(lengths)
    starts = [(length, first) for length in lengths for first in range(0, per_length, needles)]
    share = len(haystack) // len(starts)
    made: list[NeedleCase] = []
    for i, (length, first) in enumerate(starts):
        begin = i * share + rng.randrange(max(share // 2, 1))
        numbers = range(first, min(first + needles, per_length))
        facts = {
            (n % depths + 0.5) / depths: (keys[(len(made) + j) % len(keys)], rng.randrange(10**6, 10**7))
            for j, n in enumerate(numbers)
        }
        made += _cases_of_context(tokenizer, haystack[begin : (i + 1) * share], length, facts)
    return made


@torch.no_grad()
def evaluate_needles(
    model: "PreTrainedModel",
    cases: Sequence[NeedleCase],
    make_cache: Callable[[], "Cache"],
    *,
    chunk: int = CHUNK,
    progress: bool = True,
) -> list[dict[str, Any]]:
    r"""Ask for each needle after its context has gone through a cache.

    The context is read in chunks, in whatever form the cache treats a prefill, then question and answer in
    one forward (for a `SwanCache` with ``prefill="windowed"`` the same as token by token). The answer counts
    as found if each token $a_t$ is the most likely one after those before it, that is if greedy decoding
    gives it; ``nll`` is $-\frac{1}{n} \sum_t \ln p(a_t \mid \text{context}, \text{question}, a_{<t})$ in
    nats per token, a finer measure.

    Args:
        model: a causal language model of transformers, attached if the caches need it.
        cases: of `needle_cases`.
        make_cache: makes an empty cache for each context. Where a context has several questions, all but the
            last are asked on a `copy.deepcopy` of the filled cache.
        chunk: tokens of the context in a forward; a cache that compresses once, after the prompt, needs
            the longest context here.
        progress: show a progress bar.

    Returns:
        A row for each case, in their order: ``length``, ``depth``, ``found``, ``nll``.

    Raises:
        ValueError: `chunk` is below 1.

    Example:
        ```python
        swan.attach(model, calibration)
        cases = needle_cases(tokenizer, evaluation_text())
        rows = evaluate_needles(model, cases, lambda: swan.SwanCache(model, retention=0.25, buffer=64))
        summarize_needles(rows)["found"]
        ```
    """
    from swan.integrations.transformers import cache_keyword

    if chunk < 1:
        raise ValueError(f"expected chunk >= 1, got {chunk}")
    keyword = cache_keyword(model)
    contexts = [(context, list(group)) for context, group in groupby(cases, key=lambda case: case.context)]
    rows: list[dict[str, Any]] = []
    for context, group in track(contexts, "looking for needles", show=progress):
        cache = make_cache()
        tokens = torch.tensor([context], device=device_of(model))
        for part in tokens.split(chunk, dim=1):
            model(input_ids=part, use_cache=True, logits_to_keep=1, **{keyword: cache})
        for i, case in enumerate(group, start=1):
            copied = cache if i == len(group) else copy.deepcopy(cache)
            rows.append({"length": case.length, "depth": case.depth, **_ask(model, case, {keyword: copied})})
    return rows


def summarize_needles(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count what was found, in all, by length and by depth.

    Args:
        rows: of `evaluate_needles`.

    Returns:
        ``cases``, ``found`` (how many) and ``nll`` (mean, nats per token); the same for each length and each
        depth in the lists ``by_length`` and ``by_depth``.

    Raises:
        ValueError: there are no rows.

    Example:
        >>> row = {"length": 1024, "depth": 0.5, "found": True, "nll": 0.1}
        >>> summarize_needles([row])["by_length"]
        [{'length': 1024, 'cases': 1, 'found': 1, 'nll': 0.1}]
    """
    if not rows:
        raise ValueError("expected at least one row of evaluate_needles, got none")

    def by(name: str) -> list[dict[str, Any]]:
        return [
            {name: x} | _count([row for row in rows if row[name] == x]) for x in sorted({row[name] for row in rows})
        ]

    return _count(rows) | {"by_length": by("length"), "by_depth": by("depth")}


def _cases_of_context(
    tokenizer: "PreTrainedTokenizerBase", text: str, length: int, facts: dict[float, tuple[str, int]]
) -> list[NeedleCase]:
    """Make the cases of one context; `facts` are key and number by depth."""

    def encode(template: str, key: str, number: int) -> tuple[int, ...]:
        return tuple(tokenizer(template.format(key=key, number=number), add_special_tokens=False)["input_ids"])

    needles = {depth: encode(NEEDLE, *facts[depth]) for depth in sorted(facts)}
    room = length - sum(map(len, needles.values()))
    try:
        filler = token_windows(text, tokenizer, 1, room)[0].tolist()
    except ValueError as error:
        raise ValueError(
            f"no context of {length} tokens with {len(facts)} needles can be made of {len(text)} characters, the "
            "share of each context in the haystack: pass a longer haystack, or ask for other lengths or fewer cases"
        ) from error
    context: list[int] = []
    used = 0
    for depth, needle in needles.items():
        place = round(depth * room)
        context += [*filler[used:place], *needle]
        used = place
    whole = (*context, *filler[used:])
    return [
        NeedleCase(whole, encode(QUESTION, *fact), encode(ANSWER, *fact), length, depth)
        for depth, fact in facts.items()
    ]


def _ask(model: "PreTrainedModel", case: NeedleCase, cache: dict[str, Any]) -> dict[str, Any]:
    tokens = torch.tensor([case.question + case.answer], device=device_of(model))
    answer = tokens[0, len(case.question) :]
    # The logits after a token are about the next one; those after the last token of the answer are not needed.
    logits = model(input_ids=tokens[:, :-1], use_cache=True, logits_to_keep=len(answer), **cache).logits[0]
    nll = torch.nn.functional.cross_entropy(logits.float(), answer)
    return {"found": bool((logits.argmax(-1) == answer).all()), "nll": nll.item()}


def _count(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    correct = sum(row["found"] for row in rows)
    return {"cases": len(rows), "found": correct, "nll": statistics.fmean(row["nll"] for row in rows)}
