"""Every figure and table of the site that was measured, from benchmarks/results/*.json.

``python docs/results.py`` draws those that the README shows as image files.
"""

import json
from pathlib import Path
from typing import Any

from swan.evaluation.bench import plot_decode
from swan.evaluation.figures import save
from swan.evaluation.frontier import (
    average_seeds,
    compared,
    label,
    mark_frontier,
    plot_frontier,
)

import figures
from tables import table

FOLDER = Path("benchmarks/results")


def load(name: str) -> dict[str, Any]:
    """A result: command, date, versions, machine, settings, rows."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def made(result: dict[str, Any]) -> str:
    """By which command, when, on what and with what a result was made."""
    machine, versions = result["machine"], dict(result["versions"])
    where = (
        f"{machine.get('cpu') or machine.get('machine')}, {machine['cores']} cores"
    )
    if machine.get("gpu"):
        where = machine["gpu"]
    used = ", ".join(
        f"{name} {version}" for name, version in versions.items() if name != "swan"
    )
    parts = result["settings"].get("runs", [])
    runs = (
        f" Runs: {'; '.join([parts] if isinstance(parts, str) else parts)}."
        if parts
        else ""
    )
    return (
        f"Made by `{result['command']}` on {result['date']}; {where}; {used}.{runs}"
    )


def runs() -> str:
    """All results, with what made them."""
    cells = []
    for path in sorted(FOLDER.glob("*.json")):
        result = load(path.stem)
        machine, versions = result["machine"], result["versions"]
        cells.append(
            [
                f"`{path.name}`",
                result["date"],
                machine.get("gpu")
                or f"{machine.get('cpu') or machine.get('machine')}, {machine['cores']} cores",
                f"{versions['torch']}, {versions['transformers']}",
                f"`{result['command']}`",
            ]
        )
    return table(
        ("file", "date", "machine", "torch, transformers", "command"), cells
    )


def default(model: str, retention: float) -> dict[str, Any]:
    """The default plan measured nearest to a retention."""
    rows = [
        row for row in load(f"frontier-{model}")["rows"] if row["form"] == "swan"
    ]
    return min(rows, key=lambda row: abs(row["retention"] - retention))


def step(form: str, retention: float, impl: str = "cpp") -> dict[str, Any]:
    """One decode step of attention over 32k tokens, in bfloat16."""
    rows = [
        row
        for row in load("decode-cpu")["rows"]
        if row["dtype"] == "bfloat16" and row["median_ms"] is not None
    ]
    found = [row for row in rows if (row["form"], row["impl"]) == (form, impl)]
    return min(found, key=lambda row: abs(row["retention"] - retention))


def cost(model: str, retention: float) -> str:
    """What a default plan costs, in words."""
    row = default(model, retention)
    return (
        f"perplexity {100 * row['perplexity_increase']:+.2f}&nbsp;%&nbsp;±&nbsp;{100 * row['standard_error']:.2f}, "
        f"KL {row['kl']:.5f}, same next token {100 * row['agreement']:.1f}&nbsp;%"
    )


def found(model: str, retention: float) -> str:
    """Needles found at a retention, of those of the dense cache."""
    needles = load(f"frontier-{model}")["needles"]
    at = min(needles, key=lambda row: abs(row["retention"] - retention))
    return f"{at['found']} of {at['cases']} needles (dense {needles[0]['found']})"


def choose() -> str:
    """Which form and retention to use, with the figures behind each row."""
    smol, gemma = "smollm2-135m", "gemma3-270m"
    fast, top = step("graded", 0.27), step("topk", 0.5)
    rows = [
        (
            "to halve the cache, and nobody may notice",
            "`retention=0.5`",
            cost(smol, 0.5),
        ),
        (
            "a third of the bytes: **begin here**",
            "`retention=0.33`",
            cost(smol, 0.33),
        ),
        (
            "a quarter, after a test on your task",
            "`retention=0.26`",
            f"{cost(smol, 0.26)}; {found(smol, 0.26)}; Gemma 3 270M: {cost(gemma, 0.26)}, {found(gemma, 0.26)}",
        ),
        (
            "a fifth or less, where some loss is fine",
            "`retention=0.2`",
            cost(smol, 0.2),
        ),
        ("as small as it gets", "`retention=0.15`", cost(smol, 0.15)),
        (
            "a fixed amount of memory",
            '`budget="64MiB"`',
            "dense until it is full, then the highest level that fits ([tutorial](tutorials/04-budget/))",
        ),
        (
            "long contexts to decode faster on a CPU",
            "`retention=0.27`, `static=True` and `torch.compile`",
            f"attention over 32k tokens: {fast['median_ms']:.1f} ms, {fast['speedup']:.1f} times as fast as the "
            f"fastest "
            "dense way ([speed](results/speed/))",
        ),
        (
            "the paper's form, or to compare with it",
            "a `Plan` of `TopK`",
            f"{_topk_cost()}; {top['speedup']:.2f} times the speed of dense at half of the bytes",
        ),
    ]
    return table(("you want", "use", "measured"), rows, "lll")


def limits() -> str:
    """When not to use swan, with the figures behind each row."""
    fp8 = next(
        row for row in load("frontier-smollm2-135m")["rows"] if row["form"] == "fp8"
    )
    models = {
        (row["form"], row["impl"], row["retention"]): row
        for row in load("model-cpu")["rows"]
    }
    whole, quarter = (
        models["graded", "compiled", 1.0],
        models["graded", "compiled", 0.26],
    )
    top = step("topk", 0.5)
    prefills = {
        (row["form"], row["length"]): row["median_ms"]
        for row in load("prefill-cpu")["rows"]
    }
    dearer = [
        100 * (prefills["graded", n] / prefills["dense", n] - 1)
        for n in (2048, 8192)
    ]
    pressed, eighth = _pressed(), default("smollm2-135m", 0.15)
    rows = [
        (
            "Contexts of a few hundred tokens",
            "buffer and sinks, 132 tokens, are dense and allocated whole: 256 tokens at 0.26 take 0.64 of a dense "
            "cache; "
            f"a compiled step of a layer over 512 tokens takes {1 / _part(512, 'step')['speedup']:.1f} times as long "
            f"as a "
            "dense one",
        ),
        (
            "For speed on a GPU, in this version",
            "nothing has been timed there; what you gain for certain is memory",
        ),
        (
            "Where half of the bytes is small enough",
            f"an fp8 cache of a server costs KL {fp8['kl']:.5f} and no time; swan at 0.5 costs "
            f"{default('smollm2-135m', 0.5)['kl']:.5f}, and is for going further",
        ),
        (
            "A small model on a CPU, for speed by fewer bytes",
            f"SmolLM2 after 7500 tokens: {quarter['median_ms']:.1f} ms a token at 0.26, {whole['median_ms']:.1f} at "
            f"1. What is "
            f"gained over transformers ({models['dense', 'eager', 1.0]['median_ms']:.0f} ms) is gained at 1 already",
        ),
        (
            "`topk` for speed on a CPU",
            f"{top['speedup']:.2f} times as fast as dense at half of the bytes: reading a bitmap costs what fewer "
            f"bytes save",
        ),
        (
            "Long prompts, short answers",
            f"taking in a prompt is {dearer[1]:.0f} to {dearer[0]:.0f}&nbsp;% dearer than dense; each answer is "
            f"cheaper",
        ),
        (
            "Less than a sixth of the bytes",
            f"at {eighth['retention']:.2f} perplexity is {100 * eighth['perplexity_increase']:+.2f}&nbsp;%, and "
            f"going on with a text, "
            f"dropping tokens of the prompt is better ({pressed})",
        ),
        (
            "Where nothing may change",
            f"a retention below 1 changes logits: at 0.33 "
            f"{100 * (1 - default('smollm2-135m', 0.33)['agreement']):.1f}&nbsp;% of "
            "the likeliest next tokens are others. `swan.detach` gives the model back bit for bit",
        ),
    ]
    return table(("when", "why"), rows, "ll")


def _pressed() -> str:
    """KL of the best press and of swan in the fewest bytes of a prompt."""
    presses = load("kvpress-smollm2-135m")["rows"]
    swans = load("after-prompt-smollm2-135m")["rows"]
    least = min(swans, key=lambda row: row["retention"])
    near = [
        row for row in presses if row["kept"] <= least["share_at_prompt"] + 0.02
    ]
    best = min(near, key=lambda row: row["kl"])
    return (
        f"KL {best['kl']:.4f} by {best['press']} in {best['kept']:.2f} of the prompt, {least['kl']:.4f} by swan in "
        f"{least['share_at_prompt']:.2f}"
    )


def _part(length: int, what: str, impl: str = "compiled") -> dict[str, Any]:
    return next(
        r
        for r in load("step-cpu")["rows"]
        if (r["length"], r["what"], r["impl"]) == (length, what, impl)
    )


def steps() -> str:
    """A whole decode step of attention, by its parts."""
    result = load("step-cpu")
    cells = []
    for row in result["rows"]:
        if row["what"] == "step" and row["impl"] == "sdpa":
            cells.append(
                [
                    f"{row['length']}",
                    "dense",
                    f"{row['median_ms']:.2f}",
                    "",
                    "",
                    "1.00",
                ]
            )
        if row["what"] == "step" and row["impl"] == "compiled":
            around, attend = (
                _part(row["length"], what)["median_ms"]
                for what in ("rotate+update", "attend")
            )
            times = [f"{t:.2f}" for t in (row["median_ms"], around, attend)]
            cells.append(
                [f"{row['length']}", _stored(row), *times, f"{row['speedup']:.2f}"]
            )
    columns = (
        "tokens",
        "cache, retention",
        "step, ms",
        "rotate and pack",
        "attend",
        "speed-up",
    )
    ends = next(
        row
        for row in result["rows"]
        if row["what"] == "break-even" and row["impl"] == "compiled"
    )
    note = (
        f"One layer, compiled, bfloat16. From {ends['length']:.0f} tokens on a step takes less time than a dense "
        f"one; by multiply-adds alone it would be {ends['formula']:.0f}. {made(result)}"
    )
    return (
        table(columns, sorted(cells, key=lambda row: int(row[0])), "rlrrrr")
        + "\n\n"
        + note
    )


def bases() -> str:
    """Top-k in each basis."""
    rows = [
        row
        for row in load("evaluate-smollm2")["rows"]
        if row["form"] == "topk"
        and row["settings"]["keys"]["keep"] == 32
        and row["settings"]["sinks"] == 4
    ]
    cells = [
        [
            f"`{row['settings']['basis']}`",
            f"{100 * row['perplexity_increase']:+.2f}&nbsp;%&nbsp;±&nbsp;{100 * row['standard_error']:.2f}",
            f"{row['kl']:.4f}",
            f"{100 * row['agreement']:.1f}&nbsp;%",
        ]
        for row in sorted(rows, key=lambda row: row["kl"])
    ]
    note = f"Top 32 of 64 in 8 bits, keys and values, 8 windows of 1024 tokens. {made(load('evaluate-smollm2'))}"
    return (
        table(("basis", "perplexity", "KL", "same token"), cells, "lrrr")
        + "\n\n"
        + note
    )


def forms() -> str:
    """Each form beside the others, at a few retentions, in the joint basis."""
    rows = [
        row
        for row in load("evaluate-smollm2")["rows"]
        if row["settings"].get("basis") == "joint"
        and row["settings"]["sinks"] == 4
        and 0.2 < row["retention"] < 0.51
    ]
    cells = [
        [
            f"{row['retention']:.3f}",
            _evaluated(row)[0],
            f"{100 * row['perplexity_increase']:+.2f}&nbsp;%&nbsp;±&nbsp;{100 * row['standard_error']:.2f}",
            f"{row['kl']:.4f}",
        ]
        for row in sorted(rows, key=lambda row: -row["retention"])
    ]
    return (
        table(("retention", "stored", "perplexity", "KL"), cells, "rlrr")
        + "\n\n"
        + made(load("evaluate-smollm2"))
    )


def _topk_cost() -> str:
    row = next(
        row
        for row in load("frontier-smollm2-135m")["rows"]
        if row["form"] == "swan topk"
    )
    return (
        f"32 of 64 coordinates ({row['retention']:.2f}): perplexity {100 * row['perplexity_increase']:+.2f}&nbsp;%, "
        f"KL {row['kl']:.5f}"
    )


def claims() -> str:
    """The paper's claims beside what was measured here."""
    evaluated = load("evaluate-smollm2")["rows"]
    paper = next(
        row
        for row in evaluated
        if row["form"] == "topk"
        and row["settings"]["keys"]["positions"] == "index"
        and row["retention"] < 0.51
    )
    half, fifth, third = (default("smollm2-135m", r) for r in (0.5, 0.2, 0.33))
    nothing, sinks = (row for row in evaluated if row["form"] == "window")
    ends = next(
        r
        for r in load("step-cpu")["rows"]
        if r["what"] == "break-even" and r["impl"] == "compiled"
    )
    rows = [
        (
            "Close to the uncompressed model with 50 to 60&nbsp;% of memory saved per token",
            f"its form, top 31 of 64 in 8 bits with index lists ({paper['retention']:.2f} of the bytes): perplexity "
            f"{100 * paper['perplexity_increase']:+.2f}&nbsp;%. `graded`: "
            f"{100 * half['perplexity_increase']:+.2f}&nbsp;% at "
            f"{half['retention']:.2f}, {100 * third['perplexity_increase']:+.2f}&nbsp;% at {third['retention']:.2f}, "
            f"{100 * fifth['perplexity_increase']:+.2f}&nbsp;% at {fifth['retention']:.2f}",
        ),
        (
            "Attention directly on the pruned cache, which is never rebuilt",
            "held by a test of every allocation; tiles of 1024 tokens at most",
        ),
        (
            "A small dense buffer keeps quality",
            f"without any history {64} recent tokens alone cost {100 * nothing['perplexity_increase']:+.0f}&nbsp;%, "
            f"with 4 sinks "
            f"{100 * sinks['perplexity_increase']:+.0f}&nbsp;%: the history is what counts; the buffer makes a lossy "
            f"one good enough "
            "(top-k without any buffer cost +17&nbsp;% in an early trial on two windows)",
        ),
        (
            "One matrix for queries and keys, one for values and output, from an SVD",
            "the basis `joint`; best of four in KL, though close to PCA ([bases](../concepts/bases/))",
        ),
        (
            "Rotating values costs nothing once folded",
            "`fold=True`; logits stay, by test. By default nothing is folded",
        ),
        (
            "Cheaper than dense from \\(L > d^2/(d-k) + b\\) tokens on, in multiply-adds",
            f"{ends['formula']:.0f} by that formula in the shape of an 8B model's layer at 0.27; in time "
            f"{ends['length']:.0f}, compiled on a CPU",
        ),
        (
            "The level is set at run time",
            "`cache.retention = r`; in a static cache without recompiling",
        ),
    ]
    return table(("the paper", "here"), rows, "ll")


def answers() -> str:
    """The questions of the paper's reviewers, answered."""
    fast, flex, gqa, dense = (
        step("graded", 0.27),
        step("dense", 1, "flex"),
        step("dense", 1, "sdpa-gqa"),
        step("dense", 1, "sdpa"),
    )
    leading, top = step("leading", 0.5), step("topk", 0.5)
    models = {
        (row["form"], row["impl"], row["retention"]): row
        for row in load("model-cpu")["rows"]
    }
    quarter = models["graded", "compiled", 0.26]
    held = {
        (row["form"], row["length"], round(row["retention"], 2)): row
        for row in load("capacity-cpu")["rows"]
    }
    prefills = {
        (row["form"], row["length"]): row for row in load("prefill-cpu")["rows"]
    }
    compared_with = [
        row
        for row in compared(average_seeds(load("frontier-smollm2-135m")["rows"]))
        if row["ratio"] is not None
    ]
    gemma = [
        row
        for row in compared(average_seeds(load("frontier-gemma3-270m")["rows"]))
        if row["ratio"] is not None
    ]
    ratios = sorted(row["ratio"] for row in compared_with)
    around, attend = (
        _part(8192, what)["median_ms"] for what in ("rotate+update", "attend")
    )
    longest = {
        what: _part(32768, what)["median_ms"]
        for what in ("rotate+update", "attend")
    }
    harness = load("lm-eval-smollm2-135m")["rows"]
    single = ", ".join(f"{row['scores']['niah_single_1']:.2f}" for row in harness)
    return f"""
## The reviewers' questions

### 1. How fast is it, prefill and decode apart?

Decode: one step of attention over 32k tokens takes {fast["median_ms"]:.1f} ms at 0.27 where the fastest dense way
takes {dense["median_ms"]:.1f} (FlexAttention {flex["median_ms"]:.0f}, SDPA as called by default
{gqa["median_ms"]:.0f}): {fast["speedup"]:.1f} times, on two cores. A whole SmolLM2 after 7500 tokens makes
{quarter["tokens_per_second"]:.1f} tokens a second at 0.26, compiled, where transformers' own caches make
{models["dense", "eager", 1.0]["tokens_per_second"]:.1f}; but
{models["graded", "compiled", 1.0]["tokens_per_second"]:.1f} at retention 1, so this is the kernel's gain, not that of
fewer bytes. In 1 GiB at 32k tokens: {held["graded", 32768, 0.27]["tokens_per_second"]:.0f} tokens a second against
{held["dense", 32768, 1.0]["tokens_per_second"]:.0f}. Prefill of 8192 tokens:
{prefills["graded", 8192]["median_ms"]:.0f} ms against {prefills["dense", 8192]["median_ms"]:.0f} for a layer. [All of
it](speed/). On a GPU: **not measured**, none was at hand.

### 2. Against which baselines?

Dense SDPA and FlexAttention in time; in quality a sliding window, fp8, KIVI, random rotation with Lloyd-Max codes
(TurboQuant), top-k without rotation (Mustafar), low rank, both quantized caches of transformers, and token eviction
by kvpress. In as many bytes or fewer swan's default plan has {ratios[0]:.2f} to {ratios[-1]:.2f} of the KL divergence
of each of {len(ratios)} rivals on SmolLM2, and at most {max(row["ratio"] for row in gemma):.2f} on Gemma 3.
[Tables](quality/). Channel pruning (ThinK) frees no memory in kvpress, and KVQuant and Palu were not run.

### 3. How does the ratio count indices and buffer?

Indices, scales and codes count in *retention*; buffer, sinks and slack too in `cache.compression`. The paper's lists
of indices take a byte for each kept value; a bitmap takes \\(d/8\\); `graded` needs none.
[Formulas](../concepts/forms/).

### 4. What do rotation and top-k cost at each step?

Rotating q, k, v and the output, and packing the token that leaves: {around:.2f} ms beside {attend:.2f} ms of
attention at 8k tokens ({100 * around / attend:.0f}&nbsp;%),
{100 * longest["rotate+update"] / longest["attend"]:.0f}&nbsp;% at 32k, compiled, for 32 query and 8 KV heads of 128.
It does not grow with the length.

### 5. What happens in prefill?

[Two forms](../concepts/prefill/): dense within a chunk, or windowed, which is decoding in parallel. In both a tile
of 1024 tokens at a time is packed. A prompt of 8192 tokens peaks at
{prefills["graded", 8192]["peak_bytes"] / 1e6:.0f} MB for a layer (dense
{prefills["dense", 8192]["peak_bytes"] / 1e6:.0f}), since rotated copies of that layer's q, k and v exist beside the
model's.

### 6. How is irregular sparsity read fast?

It is not: top-k at half of the bytes is {top["speedup"]:.2f} times as fast as dense on a CPU, since a bitmap has to
be expanded. That is why `graded` exists: the same layout for every token, read in order ({leading["speedup"]:.1f}
times for 16-bit leading coordinates at 0.5, {fast["speedup"]:.1f} for few bits at 0.27).

### 7. What of retrieval in long contexts?

Needles in research papers of 1024 and 2048 tokens, at 0.26: SmolLM2 {found("smollm2-135m", 0.26)}, Gemma 3
{found("gemma3-270m", 0.26)}. RULER `niah_single_1` at 2048 tokens, dense and at 0.33, 0.26 and 0.2: {single}. Tasks
with many look-alike needles are beyond models of this size, dense or not, and contexts past 8k were not tried. 
"""


def evaluation() -> str:
    """Forms, bases and bits, by `swan evaluate`."""
    result = load("evaluate-smollm2")
    head, settings = result["rows"][0], result["settings"]
    columns = (
        "stored form of the history",
        "basis",
        "buffer + sinks",
        "retention",
        "perplexity",
        "increase",
        "KL",
        "same token",
    )
    note = (
        f"{head['model']} on {head['text']}, {settings['windows']} windows of {settings['length']} tokens, "
        f"{settings['dtype']}, compression active as in decoding. Increase: over the dense cache, with the paired "
        "standard error over windows. KL: in nats per token. Same token: share of positions whose likeliest next token "
        f"is the dense one. {made(result)}"
    )
    return (
        table(columns, [_evaluated(row) for row in result["rows"]], "lllrrrrr")
        + "\n\n"
        + note
    )


def frontier(model: str) -> str:
    """The rows of `swan frontier`, seeds averaged."""
    result = load(f"frontier-{model}")
    rows = average_seeds(result["rows"])
    mark_frontier(rows)
    columns = (
        "method",
        "retention",
        "whole cache",
        "perplexity",
        "KL, 1/1000 nats",
        "same token",
        "",
    )
    cells = [
        _frontier_cells(row)
        for row in sorted(rows, key=lambda row: -row["retention"])
    ]
    settings, head = result["settings"], result["rows"][0]
    texts, count = (
        " and ".join(settings["texts"]),
        settings["windows"] * len(settings["texts"]),
    )
    note = (
        f"{head['model']}, layers {settings['layers']}, on {texts}: {count} windows of {settings['length']} tokens, "
        f"{settings['dtype']}, buffer {settings['buffer']}, sinks {settings['sinks']}. ±: standard error over windows "
        "(and seeds of a random rotation), of the perplexity paired. Whole cache: with buffer and sinks, in bf16. "
        f"★: nothing else has less KL in as many bytes. {made(result)}"
    )
    return table(columns, cells, "lrrrrrl") + "\n\n" + note


def frontier_figure(model: str) -> str:
    """KL against retention, swan beside its rivals."""
    result = load(f"frontier-{model}")
    rows = average_seeds(result["rows"])
    mark_frontier(rows)
    return figures.svg(
        plot_frontier(rows, model),
        f"KL divergence from the dense predictions against retention, both of {model}, KL logarithmic. The line of "
        f"swan's "
        "default plans lies below the points of every rival at equal bytes.",
    )


def rivals(model: str) -> str:
    """Each rival beside the default plan in as many bytes or fewer."""
    result = load(f"frontier-{model}")
    rows = []
    for row in compared(average_seeds(result["rows"])):
        found = row["ratio"] is not None
        rows.append(
            [
                row["rival"],
                f"{row['rival_retention']:.3f}",
                f"{1000 * row['rival_kl']:.3f}",
                f"{row['retention']:.3f}" if found else "-",
                f"{1000 * row['kl']:.3f}" if found else "-",
                f"{row['ratio']:.2f}" if found else "-",
                "-" if row["enough"] is None else f"{row['enough']:.3f}",
            ]
        )
    columns = (
        "rival",
        "its retention",
        "its KL, 1/1000",
        "swan's retention",
        "KL",
        "ratio",
        "swan as good from",
    )
    return table(columns, rows, "lrrrrrr")


def needles(model: str) -> str:
    """Needles found, by depth and length."""
    result = load(f"frontier-{model}")
    lengths = [
        f"{part['length']} tokens" for part in result["needles"][0]["by_length"]
    ]
    depths = [
        f"depth {part['depth']:.1f}" for part in result["needles"][0]["by_depth"]
    ]
    rows = [
        [
            "dense" if row["form"] == "dense" else f"{row['retention']:.2f}",
            f"{row['found']} of {row['cases']}",
            *(
                f"{part['found']} of {part['cases']}"
                for part in (*row["by_length"], *row["by_depth"])
            ),
            f"{row['nll']:.3f}",
        ]
        for row in result["needles"]
    ]
    columns = ("retention", "found", *lengths, *depths, "nats per answer token")
    return table(columns, rows, "l" + "r" * (len(columns) - 1))


def decode() -> str:
    """Attention of one decode step, by kernels and dense rivals."""
    result = load("decode-cpu")
    settings, rows = result["settings"], result["rows"]
    cells = [
        [
            _stored(row),
            row["impl"],
            row["dtype"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['median_ms']:.2f}",
            f"{100 * row['spread']:.0f}&nbsp;%",
            f"{row['speedup']:.2f}",
            f"{row['bandwidth_fraction']:.2f}",
            f"{row['error']:.0e}",
            f"{row['peak_bytes'] / 1e6:.2f}",
        ]
        for row in sorted(rows, key=lambda row: row["dtype"])
        if row["median_ms"] is not None and row["impl"] != "tiles"
    ]
    measured = (
        "MB read",
        "ms",
        "spread",
        "speed-up",
        "of bandwidth",
        "error",
        "peak MB",
    )
    columns = ("cache, retention", "impl", "dtype", *measured)
    note = (
        f"{settings['heads']} query and {settings['kv_heads']} KV heads of {settings['head_dim']}, "
        f"{settings['lengths'][0]} tokens, {result['machine']['cpu']}, "
        f"{settings['threads']} threads, {settings['bandwidth'] / 1e9:.0f} GB/s. Speed-up: over the fastest dense row. "
        f"Peak: what torch's allocator gives a call. {made(result)}"
    )
    return table(columns, cells, "lll" + "r" * len(measured)) + "\n\n" + note


def decode_figure() -> str:
    """Time of a step by length, and speed-up by retention."""
    result = load("decode-lengths-cpu")
    drawing = figures.svg(
        plot_decode(result["rows"], "one layer, 32 query and 8 KV heads of 128"),
        "On the left the time of a step against the tokens in the cache, both logarithmic: from some thousand tokens "
        "on the lines of graded layouts lie below the dense one. On the right the speed-up over the fastest dense "
        "attention at the greatest length, which falls as retention grows.",
    )
    return f"{drawing}\n<p><small>{made(result).replace('`', '')}</small></p>"


def _stored(row: dict[str, Any]) -> str:
    return (
        "dense"
        if row["form"] == "dense"
        else f"{row['form']}, {row['retention']:.2f}"
    )


def model() -> str:
    """Tokens per second of a whole model."""
    result = load("model-cpu")
    settings = result["settings"]
    names = {"dense": "transformers, dense", "quanto": "transformers, quantized"}
    cells = [
        [
            names.get(row["form"], f"swan, {row['retention']:.2f}"),
            row["impl"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['median_ms']:.1f}",
            f"{100 * row['spread']:.0f}&nbsp;%",
            f"{row['prefill_seconds']:.0f}",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['growth'] / 1024:.1f}",
            f"{row['growth_counted'] / 1024:.1f}",
            f"{100 * row['agreement']:.1f}&nbsp;%",
        ]
        for row in result["rows"]
    ]
    columns = (
        "cache",
        "impl",
        "tokens/s",
        "ms",
        "spread",
        "prompt, s",
        "MiB",
        "growth",
        "counted",
        "same token",
    )
    note = (
        f"{settings['model']}, {settings['tokens']} tokens after {settings['prompt']}, {settings['dtype']}, "
        f"{settings['threads']} threads. Growth: of the memory of the process, in KiB per token, beside "
        "what the bytes of the cache grew by; swan's caches had room. Same token: as the first row would choose. "
        f"Compiled rows of transformers have its static cache. {made(result)}"
    )
    return table(columns, cells, "ll" + "r" * 8) + "\n\n" + note


def capacity() -> str:
    """Tokens per second where the smaller cache admits a larger batch."""
    result = load("capacity-cpu")
    cells = [
        [
            f"{row['length']}",
            _stored(row),
            f"{row['batch']}",
            f"{row['median_ms']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}",
        ]
        for row in result["rows"]
    ]
    columns = ("tokens", "cache, retention", "batch", "ms", "tokens/s", "speed-up")
    return table(columns, cells, "rl" + "r" * 4) + f"\n\nOne layer. {made(result)}"


def prefill() -> str:
    """Taking in a prompt."""
    result = load("prefill-cpu")
    cells = [
        [
            f"{row['length']}",
            _stored(row),
            f"{row['median_ms']:.0f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in result["rows"]
    ]
    columns = ("tokens", "cache, retention", "ms", "cache, MB", "peak MB")
    return table(columns, cells, "rlrrr") + f"\n\nOne layer. {made(result)}"


def after_prompt() -> str:
    """Token eviction and swan, of a prompt that is compressed once."""
    rows, notes = [], []
    for name in ("kvpress-smollm2-135m", "after-prompt-smollm2-135m"):
        result = load(name)
        notes.append(made(result))
        for row in result["rows"]:
            swan = "press" not in row
            name = (
                f"**swan, {row['retention']:.3f}**"
                if swan
                else f"{row['press']}, {row['kept']:.2f}"
            )
            at_prompt, at_end = (
                (row["share_at_prompt"], row["share_at_end"])
                if swan
                else _evicted_shares(row["kept"])
            )
            rows.append(
                [
                    name,
                    f"{at_prompt:.3f}",
                    f"{at_end:.3f}",
                    f"{1000 * row['kl']:.2f}&nbsp;±&nbsp;{1000 * row['kl_error']:.2f}",
                    f"{100 * row['perplexity_increase']:+.2f}&nbsp;%",
                    f"{100 * row['agreement']:.1f}&nbsp;%",
                ]
            )
    rows.sort(key=lambda row: float(row[1]), reverse=True)
    columns = (
        "method",
        "bytes after the prompt",
        "at the end",
        "KL, 1/1000",
        "perplexity",
        "agreement",
    )
    return table(columns, rows, "lrrrrr") + "\n\n" + " ".join(notes)


def harness() -> str:
    """Scores of lm-evaluation-harness."""
    result = load("lm-eval-smollm2-135m")
    tasks = list(result["rows"][0]["scores"])
    cells = [
        [
            "dense" if row["retention"] is None else f"{row['retention']:.2f}",
            *(f"{row['scores'][t]:.2f}" for t in tasks),
        ]
        for row in result["rows"]
    ]
    note = f"{result['samples']} samples of {result['length']} tokens for each task. {made(result)}"
    return (
        table(("retention", *tasks), cells, "l" + "r" * len(tasks)) + "\n\n" + note
    )


def _evicted_shares(kept: float) -> tuple[float, float]:
    """What eviction holds of a prompt, and with as many tokens after it."""
    return kept, (kept + 1) / 2


def _frontier_cells(row: dict[str, Any]) -> list[str]:
    seeds = "" if row["seeds"] == 1 else f", {row['seeds']} seeds"
    name = f"**{label(row)}**" if row["form"] == "swan" else label(row)
    errors = [
        "" if row[e] is None else row[e] for e in ("standard_error", "kl_error")
    ]
    increase = f"{100 * row['perplexity_increase']:+.2f}&nbsp;%"
    kl = f"{1000 * row['kl']:.3f}"
    if row["form"] != "dense":
        increase += "" if errors[0] == "" else f"&nbsp;±&nbsp;{100 * errors[0]:.2f}"
        kl += "" if errors[1] == "" else f"&nbsp;±&nbsp;{1000 * errors[1]:.3f}"
    return [
        name + seeds,
        f"{row['retention']:.3f}",
        f"{row['compression_bf16']:.3f}",
        f"{row['perplexity']:.2f}" if row["form"] == "dense" else increase,
        kl,
        f"{100 * row['agreement']:.1f}&nbsp;%",
        "★" if row["frontier"] and row["form"] != "dense" else "",
    ]


def _evaluated(row: dict[str, Any]) -> list[str]:
    about, error = row["settings"], row["standard_error"]
    increase = f"{100 * row['perplexity_increase']:+.2f}&nbsp;%"
    if row["form"] == "dense":
        form, increase = "dense cache", "-"
    elif "keys" not in about:
        form = "nothing (window only)"
    elif about["keys"] == about["values"]:
        form = _layout(about["keys"])
    else:
        form = f"K {_layout(about['keys'])}; V {_layout(about['values'])}"
    if increase != "-" and error is not None:
        increase += f"&nbsp;±&nbsp;{100 * error:.2f}"
    return [
        form,
        about.get("basis", "-") if "keys" in about else "-",
        f"{about['buffer']}&nbsp;+&nbsp;{about['sinks']}" if about else "-",
        f"{row['retention']:.2f}",
        f"{row['perplexity']:.2f}",
        increase,
        f"{row['kl']:.3f}",
        f"{100 * row['agreement']:.1f}&nbsp;%",
    ]


def _layout(layout: dict[str, Any]) -> str:
    if layout["form"] == "graded":
        return "graded " + " + ".join(
            f"{size} at {bits} bit" for size, bits in layout["groups"]
        )
    index = ", index list" if layout["positions"] == "index" else ""
    return f"top {layout['keep']} of {layout['d']}, {layout['bits']} bit{index}"


if __name__ == "__main__":
    smollm2 = average_seeds(load("frontier-smollm2-135m")["rows"])
    mark_frontier(smollm2)
    save(
        plot_frontier(smollm2, "SmolLM2-135M, 16k tokens"),
        Path("docs/assets/frontier-smollm2-135m.png"),
    )
