"""Tables of the pages, generated from the library and from results."""

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import swan
from swan.evaluation.frontier import average_seeds, compared, label, mark_frontier
from swan.integrations.architectures import ARCHITECTURES


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """A Markdown table; `align` has a letter, l or r, for each column."""
    rules = [":---" if a == "l" else "---:" for a in align or "l" * len(columns)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rules, *rows))


def evaluation(path: str) -> str:
    """The rows of `swan evaluate --json`, or how to make them."""
    command = "swan evaluate smollm2-135m --json"
    if not Path(path).is_file():
        return (
            "!!! note\n    The measurements have not been made in this checkout. Make them with\n"
            f"    `{command} > {path}` (embedded model, 8 windows of 1024 tokens of research papers)."
        )
    result = json.loads(Path(path).read_text())
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
        f"is the dense one. Made by `{command}`."
    )
    return table(columns, [_evaluated(row) for row in result["rows"]], "lllrrrrr") + "\n\n" + note


def frontier(path: str) -> str:
    """The rows of `swan frontier`, seeds averaged, or how to make them."""
    result = _frontier_result(path)
    if result is None:
        model = Path(path).stem.removeprefix("frontier-")
        return f"!!! note\n    Not measured in this checkout: `swan frontier {model} --out {path}` does it."
    rows = average_seeds(result["rows"])
    mark_frontier(rows)
    columns = ("method", "retention", "whole cache", "perplexity", "KL, 1/1000 nats", "same token", "")
    cells = [_frontier_cells(row) for row in sorted(rows, key=lambda row: -row["retention"])]
    settings, head = result["settings"], result["rows"][0]
    texts, count = " and ".join(settings["texts"]), settings["windows"] * len(settings["texts"])
    note = (
        f"{head['model']}, layers {settings['layers']}, on {texts}: {count} windows of {settings['length']} tokens, "
        f"{settings['dtype']}, buffer {settings['buffer']}, sinks {settings['sinks']}. ±: standard error over windows "
        "(and seeds of a random rotation), of the perplexity paired. Whole cache: with buffer and sinks, in bf16. "
        f"★: nothing else has less KL in as many bytes. Made by `{result['command']}`."
    )
    return table(columns, cells, "lrrrrrl") + "\n\n" + note


def rivals(path: str) -> str:
    """Each rival beside the default plan in as many bytes or fewer."""
    result = _frontier_result(path)
    if result is None:
        return ""
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
    columns = ("rival", "its retention", "its KL, 1/1000", "swan's retention", "KL", "ratio", "swan as good from")
    return table(columns, rows, "lrrrrrr")


def needles(path: str) -> str:
    """Needles found, by depth and length."""
    result = _frontier_result(path)
    if result is None or not result["needles"]:
        return ""
    lengths = [f"{part['length']} tokens" for part in result["needles"][0]["by_length"]]
    depths = [f"depth {part['depth']:.1f}" for part in result["needles"][0]["by_depth"]]
    rows = [
        [
            "dense" if row["form"] == "dense" else f"{row['retention']:.2f}",
            f"{row['found']} of {row['cases']}",
            *(f"{part['found']} of {part['cases']}" for part in (*row["by_length"], *row["by_depth"])),
            f"{row['nll']:.3f}",
        ]
        for row in result["needles"]
    ]
    columns = ("retention", "found", *lengths, *depths, "nats per answer token")
    return table(columns, rows, "l" + "r" * (len(columns) - 1))


def decode(path: str) -> str:
    """Attention of one decode step, by kernels and dense rivals."""
    result = json.loads(Path(path).read_text())
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
    measured = ("MB read", "ms", "spread", "speed-up", "of bandwidth", "error", "peak MB")
    columns = ("cache, retention", "impl", "dtype", *measured)
    note = (
        f"{settings['heads']} query and {settings['kv_heads']} KV heads of {settings['head_dim']}, "
        f"{settings['lengths'][0]} tokens, {result['machine']['cpu']}, "
        f"{settings['threads']} threads, {settings['bandwidth'] / 1e9:.0f} GB/s. Speed-up: over the fastest dense row. "
        "Peak: what torch's allocator gives a call. "
        f"Made by `{result['command']}`."
    )
    return table(columns, cells, "lll" + "r" * len(measured)) + "\n\n" + note


def _stored(row: dict[str, Any]) -> str:
    return "dense" if row["form"] == "dense" else f"{row['form']}, {row['retention']:.2f}"


def model(path: str) -> str:
    """Tokens per second of a whole model."""
    result = json.loads(Path(path).read_text())
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
    columns = ("cache", "impl", "tokens/s", "ms", "spread", "prompt, s", "MiB", "growth", "counted", "same token")
    note = (
        f"{settings['model']}, {settings['tokens']} tokens after {settings['prompt']}, {settings['dtype']}, "
        f"{settings['threads']} threads. Growth: of the memory of the process, in KiB per token, beside "
        "what the bytes of the cache grew by; swan's caches had room. Same token: as the first row would choose. "
        f"Compiled rows of transformers have its static cache. Made by `{result['command']}`."
    )
    return table(columns, cells, "ll" + "r" * 8) + "\n\n" + note


def capacity(path: str) -> str:
    """Tokens per second where the smaller cache admits a larger batch."""
    result = json.loads(Path(path).read_text())
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
    return table(columns, cells, "rl" + "r" * 4) + f"\n\nOne layer. Made by `{result['command']}`."


def prefill(path: str) -> str:
    """Taking in a prompt."""
    result = json.loads(Path(path).read_text())
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
    return table(columns, cells, "rlrrr") + f"\n\nOne layer. Made by `{result['command']}`."


def after_prompt(*paths: str) -> str:
    """Token eviction and swan, of a prompt that is compressed once."""
    rows = []
    for path in paths:
        for row in json.loads(Path(path).read_text())["rows"]:
            swan = "press" not in row
            name = f"**swan, {row['retention']:.3f}**" if swan else f"{row['press']}, {row['kept']:.2f}"
            at_prompt, at_end = (row["share_at_prompt"], row["share_at_end"]) if swan else _evicted_shares(row["kept"])
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
    columns = ("method", "bytes after the prompt", "at the end", "KL, 1/1000", "perplexity", "agreement")
    return table(columns, rows, "lrrrrr")


def harness(path: str) -> str:
    """Scores of lm-evaluation-harness."""
    result = json.loads(Path(path).read_text())
    tasks = list(result["rows"][0]["scores"])
    cells = [
        [
            "dense" if row["retention"] is None else f"{row['retention']:.2f}",
            *(f"{row['scores'][t]:.2f}" for t in tasks),
        ]
        for row in result["rows"]
    ]
    note = f"{result['samples']} samples of {result['length']} tokens for each task. Made by `{result['command']}`."
    return table(("retention", *tasks), cells, "l" + "r" * len(tasks)) + "\n\n" + note


def architectures() -> str:
    """What is known of architectures of transformers."""
    words = {True: "yes", False: "no"}
    rows = [[f"`{name}`", words[a.supported], words[a.fold], a.note] for name, a in ARCHITECTURES.items()]
    return table(("architecture", "supported", "`fold=True`", "note"), rows, "llll")


def _evicted_shares(kept: float) -> tuple[float, float]:
    """What eviction holds of a prompt, and with as many tokens after it."""
    return kept, (kept + 1) / 2


def _frontier_result(path: str) -> dict[str, Any] | None:
    return json.loads(Path(path).read_text()) if Path(path).is_file() else None


def _frontier_cells(row: dict[str, Any]) -> list[str]:
    seeds = "" if row["seeds"] == 1 else f", {row['seeds']} seeds"
    name = f"**{label(row)}**" if row["form"] == "swan" else label(row)
    errors = ["" if row[e] is None else row[e] for e in ("standard_error", "kl_error")]
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
        return "graded " + " + ".join(f"{size} at {bits} bit" for size, bits in layout["groups"])
    index = ", index list" if layout["positions"] == "index" else ""
    return f"top {layout['keep']} of {layout['d']}, {layout['bits']} bit{index}"


def commands() -> str:
    """The commands of the command line."""
    import typer

    from swan.cli.app import app

    return table(
        ("command", "what it does"),
        [[f"`{name}`", about] for name, about in _commands(typer.main.get_command(app), "swan")],
    )


def _commands(command: Any, name: str) -> list[tuple[str, str]]:
    children = getattr(command, "commands", None)
    if not children:
        return [(f"{name} {_arguments(command)}".strip(), command.help.splitlines()[0])]
    return [row for child, below in children.items() for row in _commands(below, f"{name} {child}")]


def _arguments(command: Any) -> str:
    return " ".join(p.name.upper() for p in command.params if p.param_type_name == "argument")


GROUPS = {
    "Functional": (
        *("rotate", "inverse_rotate", "random_rotation", "fold_value_rotation", "topk_prune", "graded_prune"),
        *("dense_attention", "packed_attention", "merge_attention", "swan_attention"),
    ),
    "Storage": ("TopK", "Graded", "PlanLayer", "Packed", "pack", "unpack"),
    "Modules": ("OrthoRotation", "StructuredPruner", "DenseBuffer", "KVCache", "SwanAttention"),
    "Calibration and plans": ("calibrate", "Calibration", "Plan"),
    "Hugging Face": ("attach", "detach", "SwanCache", "save_pretrained", "from_pretrained", "supported"),
}


def public_names(group: str) -> str:
    """A list of the public names of a group; each name of swan must be in one group."""
    grouped = [name for names in GROUPS.values() for name in names]
    public = [
        n for n, x in inspect.getmembers(swan) if n[0] != "_" and str(getattr(x, "__module__", "")).startswith("swan")
    ]
    if sorted(grouped) != public:
        raise ValueError(f"docs/tables.py groups {sorted(set(grouped) ^ set(public))} otherwise than swan has them")
    return "\n".join(f"- [`{name}`][swan.{name}]: {_summary(getattr(swan, name))}" for name in GROUPS[group])


def _summary(thing: Any) -> str:
    first = re.split(r"\n\s*\n", inspect.getdoc(thing) or "")[0]
    return " ".join(first.split())
