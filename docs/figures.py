"""Figures of the pages: matplotlib, as inline SVG in the text colour of the page."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#4c6ef5", "#e8590c", "#0ca678", "#868e96"  # seen on white and on black
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
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
)


def panels(count: int, height: float = 3.3, **kwargs: Any) -> tuple[Figure, Sequence[Any]]:
    """A figure as wide as the text, with a row of axes."""
    figure = Figure(figsize=(8.2, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, count, **kwargs))


def svg(figure: Figure, alt: str) -> str:
    """A figure as HTML, with a text for those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace(INK, "currentColor")
    drawing = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", drawing)
    label = html.escape(alt, quote=True)
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f'<figure class="plot" data-search-exclude>{drawing}</figure>'


def toy(points: Any, basis: Any, plain: Any, turned: Any) -> str:
    """Points in the plane and where they go when one of two coordinates is kept."""
    figure, axes = panels(2, height=3.6, sharex=True, sharey=True)
    points, basis, plain, turned = map(np.asarray, (points, basis, plain, turned))
    settings = (("keep 1 of 2 given coordinates", np.eye(2), plain), ("keep 1 of 2 rotated coordinates", basis, turned))
    for axis, (title, directions, kept) in zip(axes, settings, strict=True):
        for direction in directions.T:
            axis.axline((0, 0), direction, color=GREY, linewidth=1)
        pairs = np.stack([points, kept], axis=1)
        axis.plot(*np.transpose(pairs, (2, 1, 0)), color=ORANGE, linewidth=1, alpha=0.7)
        axis.scatter(*np.transpose(points), s=14, color=INK, zorder=3, label="vector")
        axis.scatter(*np.transpose(kept), s=14, color=BLUE, zorder=3, label="what is kept of it")
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0].legend(loc="upper left", fontsize=10, handletextpad=0.2)
    return svg(
        figure,
        "Two panels with the same elongated cloud of points. On the left each point moves to the nearer of the two "
        "given axes, often far. On the right the axes follow the cloud, and the points hardly move.",
    )


def curves(
    data: Mapping[str, Mapping[str, Any]], x: Any, *, xlabel: str, ylabel: str, alt: str, **settings: Any
) -> str:
    """A panel for each title in `data`, a logarithmic curve for each basis in it."""
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
    """Which keys each query sees dense, packed or not at all, by form of the prefill and its chunks."""
    query, key = np.arange(tokens)[:, None], np.arange(tokens)[None]
    figure, axes = panels(3, height=3.2, sharey=True)
    for axis, title, chunk in zip(
        axes,
        ("dense: 8 tokens, then 1 by 1", "dense: 4 and 4, then 1 by 1", "windowed: however it is cut"),
        (8, 4, 1),
        strict=True,
    ):
        begin = np.where(query < 8, query // chunk * chunk, query)  # the first query that came with this one
        dense = (key > begin - buffer) | (key < sinks)
        for colour, label, cells in ((BLUE, "dense", dense), (ORANGE, "packed", ~dense)):
            queries, keys = np.nonzero(cells & (key <= query))
            axis.scatter(keys, queries, s=150, marker="s", color=colour, label=label)
        axis.set(xlabel="key", xticks=range(0, tokens, 2), yticks=range(0, tokens, 2), aspect="equal")
        axis.set(xlim=(-0.5, tokens - 0.5), ylim=(tokens - 0.5, -0.5))
        axis.set_title(title, fontsize=10)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("query")
    axes[0].legend(loc="upper right", fontsize=10, handletextpad=0.2, markerscale=0.5)
    return svg(
        figure,
        f"Three attention masks of {tokens} tokens with a buffer of {buffer} and {sinks} sink. Dense form, a prompt of "
        "8 at once: prompt tokens see each other dense, later tokens see all but the newest 2 and the sink packed. "
        "Dense form in two chunks of 4: the second chunk sees keys 1 and 2 packed. Windowed form: every query sees "
        "the newest 2 and the sink dense and the rest packed.",
    )
