"""Figures of the pages: matplotlib, as inline SVG in the text colour of the page."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREEN, GREY = (
    "#4c6ef5",
    "#e8590c",
    "#0ca678",
    "#868e96",
)  # seen on white and on black
INK = "#010203"  # becomes the text colour of the page
STYLES = {
    "identity": {"color": ORANGE, "linestyle": "-."},
    "random": {"color": GREY, "linestyle": ":"},
    "pca": {"color": GREEN, "linestyle": "--"},
    "joint": {"color": BLUE, "linestyle": "-"},
}

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "swan",
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "lines.linewidth": 2,
        **dict.fromkeys(
            (
                "text.color",
                "axes.edgecolor",
                "axes.labelcolor",
                "xtick.color",
                "ytick.color",
            ),
            INK,
        ),
    }
)


def panels(
    count: int, height: float = 3.3, **kwargs: Any
) -> tuple[Figure, Sequence[Any]]:
    """Make a figure as wide as the text, with a row of axes."""
    figure = Figure(figsize=(8.2, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, count, **kwargs))


def svg(figure: Figure, alt: str) -> str:
    """Write a figure as HTML, with a text for those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace(INK, "currentColor")
    drawing = re.sub(
        r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", drawing
    )
    label = html.escape(alt, quote=True)
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f'<figure class="plot" data-search-exclude>{drawing}</figure>'


def toy(points: Any, basis: Any, plain: Any, turned: Any) -> str:
    """Plot points in the plane and where they go when one of two coordinates is kept."""
    figure, axes = panels(2, height=3.6, sharex=True, sharey=True)
    points, basis, plain, turned = map(np.asarray, (points, basis, plain, turned))
    settings = (
        ("keep 1 of 2 given coordinates", np.eye(2), plain),
        ("keep 1 of 2 rotated coordinates", basis, turned),
    )
    for axis, (title, directions, kept) in zip(axes, settings, strict=True):
        for direction in directions.T:
            axis.axline((0, 0), direction, color=GREY, linewidth=1)
        pairs = np.stack([points, kept], axis=1)
        axis.plot(
            *np.transpose(pairs, (2, 1, 0)), color=ORANGE, linewidth=1, alpha=0.7
        )
        axis.scatter(
            *np.transpose(points), s=14, color=INK, zorder=3, label="vector"
        )
        axis.scatter(
            *np.transpose(kept),
            s=14,
            color=BLUE,
            zorder=3,
            label="what is kept of it",
        )
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0].legend(loc="upper left", fontsize=10, handletextpad=0.2)
    return svg(
        figure,
        "Two panels with the same elongated cloud of points. On the left each point moves to the nearer of the two "
        "given axes, often far. On the right the axes follow the cloud, and the points hardly move.",
    )


def curves(
    data: Mapping[str, Mapping[str, Any]],
    x: Any,
    *,
    xlabel: str,
    ylabel: str,
    alt: str,
    **settings: Any,
) -> str:
    """Plot a panel for each title in `data`, a logarithmic curve for each basis in it."""
    figure, axes = panels(len(data), sharey=True)
    for axis, (title, lines) in zip(axes, data.items(), strict=True):
        for basis, y in lines.items():
            axis.plot(x, y, label=basis, **STYLES[basis])
        axis.set(title=title, xlabel=xlabel, yscale="log", **settings)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(ylabel)
    axes[0].legend()
    return svg(figure, alt)


def prefill_forms(tokens: int = 12, buffer: int = 2, sinks: int = 1) -> str:
    """Plot which keys each query sees dense, packed or not at all, by form of the prefill and its chunks."""
    query, key = np.arange(tokens)[:, None], np.arange(tokens)[None]
    figure, axes = panels(3, height=3.2, sharey=True)
    for axis, title, chunk in zip(
        axes,
        (
            "dense: 8 tokens, then 1 by 1",
            "dense: 4 and 4, then 1 by 1",
            "windowed: however it is cut",
        ),
        (8, 4, 1),
        strict=True,
    ):
        begin = np.where(
            query < 8, query // chunk * chunk, query
        )  # the first query that came with this one
        dense = (key > begin - buffer) | (key < sinks)
        for colour, label, cells in (
            (BLUE, "dense", dense),
            (ORANGE, "packed", ~dense),
        ):
            queries, keys = np.nonzero(cells & (key <= query))
            axis.scatter(
                keys, queries, s=150, marker="s", color=colour, label=label
            )
        axis.set(
            xlabel="key",
            xticks=range(0, tokens, 2),
            yticks=range(0, tokens, 2),
            aspect="equal",
        )
        axis.set(xlim=(-0.5, tokens - 0.5), ylim=(tokens - 0.5, -0.5))
        axis.set_title(title, fontsize=10)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("query")
    axes[0].legend(
        loc="upper right", fontsize=10, handletextpad=0.2, markerscale=0.5
    )
    return svg(
        figure,
        f"Three attention masks of {tokens} tokens with a buffer of {buffer} and {sinks} sink. Dense form, a prompt of "
        "8 at once: prompt tokens see each other dense, later tokens see all but the newest 2 and the sink packed. "
        "Dense form in two chunks of 4: the second chunk sees keys 1 and 2 packed. Windowed form: every query sees "
        "the newest 2 and the sink dense and the rest packed.",
    )


def kept_coordinates(vectors: Any, panels_of_kept: Mapping[str, Any]) -> str:
    """Plot vectors as rows of squares as large as their coordinates; those that are kept in colour."""
    vectors = np.asarray(vectors)
    rows, columns = np.indices(vectors.shape)
    size = 110 * np.abs(vectors) / np.abs(vectors).max()
    figure, axes = panels(len(panels_of_kept), height=2.6, sharey=True)
    for axis, (title, kept) in zip(axes, panels_of_kept.items(), strict=True):
        remains = np.asarray(kept) != 0
        for colour, label, cells in (
            (BLUE, "kept", remains),
            (GREY, "pruned", ~remains),
        ):
            alpha = 1 if colour == BLUE else 0.45
            axis.scatter(
                columns[cells],
                rows[cells],
                s=size[cells],
                marker="s",
                color=colour,
                alpha=alpha,
                label=label,
            )
        axis.set(
            xlabel="coordinate", xticks=range(0, vectors.shape[1], 4), yticks=[]
        )
        axis.set(
            xlim=(-0.7, vectors.shape[1] - 0.3), ylim=(vectors.shape[0] - 0.3, -0.7)
        )
        axis.set_title(title, fontsize=10)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("vector")
    return svg(
        figure,
        f"{len(panels_of_kept)} panels with the same {len(vectors)} vectors, whose coordinates are larger towards the "
        "left; squares are as large as the coordinates, those that are kept in blue. With top-k each vector keeps "
        "others, with a graded layout all keep the same.",
    )


def staircase(values: Any, rounded: Mapping[int, Any]) -> str:
    """Plot values against what is stored of them, a panel for each number of bits."""
    values = np.asarray(values)
    figure, axes = panels(len(rounded), height=2.9, sharey=True)
    for axis, (bits, stored) in zip(axes, rounded.items(), strict=True):
        axis.plot(values, values, color=GREY, linewidth=1)
        axis.plot(values, np.asarray(stored), color=BLUE)
        axis.set(title=f"{bits} bits", xlabel="mixed coordinate")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("stored")
    steps = ", ".join(f"{2**bits} steps with {bits} bits" for bits in rounded)
    return svg(
        figure,
        f"Stored against given value, from -1 to 1: staircases about the diagonal, {steps}.",
    )


def ring(slots: Sequence[Sequence[int]], sinks: int) -> str:
    """Plot which token each slot of a buffer holds, a row for each step; negative where it holds nothing."""
    table = np.asarray(slots)
    steps, width = table.shape
    figure, axes = panels(1, height=0.36 * steps + 0.7)
    axis = axes[0]
    for row, column in np.ndindex(steps, width):
        token = table[row, column]
        new = token == row
        colour = ORANGE if new else GREEN if column < sinks else BLUE
        x = column + 0.6 * (column >= sinks)
        if token >= 0:
            axis.text(x, row, str(token), ha="center", va="center", color="white")
        face = colour if token >= 0 else "none"
        axis.add_patch(
            Rectangle(
                (x - 0.45, row - 0.45),
                0.9,
                0.9,
                facecolor=face,
                edgecolor=GREY,
                linewidth=0.8,
            )
        )
    axis.set(
        xlim=(-0.6, width + 0.2),
        ylim=(steps - 0.4, -0.6),
        aspect="equal",
        xlabel="slot",
        ylabel="after token",
    )
    axis.set(
        xticks=[c + 0.6 * (c >= sinks) for c in range(width)], yticks=range(steps)
    )
    axis.set_xticklabels(
        [f"sink {c}" if c < sinks else f"{c - sinks}" for c in range(width)]
    )
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    size = width - sinks
    return svg(
        figure,
        f"A table of the tokens in each slot after each of {steps} tokens. The ring of {size} slots fills; from "
        f"then on each new token takes the place of the one that came {size} before it; the sink keeps the first.",
    )


def layers_of(plans: Mapping[str, Sequence[float]]) -> str:
    """Plot the retention of each layer, a line for each plan."""
    figure, axes = panels(1, height=2.9)
    axis = axes[0]
    styles = zip((BLUE, GREEN, ORANGE), ("-", "--", "-."), strict=True)
    for (label, retentions), (colour, line) in zip(
        plans.items(), styles, strict=False
    ):
        layers = range(len(retentions))
        axis.plot(
            layers,
            retentions,
            color=colour,
            linestyle=line,
            marker="o",
            markersize=4,
            label=label,
        )
    axis.set(
        xlabel="layer",
        ylabel="retention of the layer",
        xticks=layers[:: 1 + len(layers) // 12],
        ylim=(0, None),
    )
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), title="plan")
    return svg(
        figure,
        f"Retention of {len(layers)} layers in plans of {', '.join(plans)}: layers differ, and every layer has at "
        "least as many bytes in a plan of more bytes as in one of fewer.",
    )


def growth(
    tokens: Sequence[int],
    caches: Mapping[str, Sequence[float]],
    alt: str,
    *,
    xlabel: str = "tokens in the cache",
) -> str:
    """Plot bytes of caches against tokens, the first in grey."""
    figure, axes = panels(1, height=3)
    axis = axes[0]
    size, unit = (
        (2**20, "MiB") if max(map(max, caches.values())) > 2**21 else (2**10, "KiB")
    )
    styles = zip((GREY, BLUE, ORANGE), ("-", "--", "-."), strict=True)
    for (label, sizes), (colour, line) in zip(caches.items(), styles, strict=False):
        axis.plot(
            tokens,
            np.asarray(sizes) / size,
            color=colour,
            linestyle=line,
            label=label,
        )
    axis.set(xlabel=xlabel, ylabel=f"{unit} held", xlim=(0, None), ylim=(0, None))
    axis.grid(alpha=0.25)
    axis.legend()
    return svg(figure, alt)
