"""The look of plots of results, and writing them."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["finish", "save"]


def finish(figure: "Figure") -> "Figure":
    """Draw the legends of a figure, and no frames."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure to a file, whose folder need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
