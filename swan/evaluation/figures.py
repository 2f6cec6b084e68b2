"""The look of plots of results, and writing them."""

from pathlib import Path
from typing import TYPE_CHECKING

from swan.calibration.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_format", "finish", "save"]


def finish(figure: "Figure") -> "Figure":
    """Draw the legends of a figure, and no frames."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure to a file, whole or not at all; its folder need not be there."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    return path


def check_format(path: Path) -> None:
    """Raise a ValueError if matplotlib draws no files of this suffix."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise ValueError(f"{path} is no image file; name one that ends in .{', .'.join(formats)}")
