"""Tables in the terminal, and the numbers in them as people read them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from swan.cli.common import console

__all__ = ["Columns", "Row", "gibibytes", "mebibytes", "milliseconds", "number", "percent", "print_table", "ratio"]

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]  # by the title of a column, how it shows a row


def print_table(title: str, columns: Columns, rows: Sequence[Row]) -> None:
    """Print a table, numbers to the right."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(escape(cell(row)) for cell in columns.values()))
    console.print(table)


def number(
    value: float | None,
    digits: int,
    *,
    scale: float = 1,
    unit: str = "",
    signed: bool = False,
    error: float | None = None,
) -> str:
    """Write a number, with its standard error if there is one; a dash where nothing was measured.

    Args:
        value: the number.
        digits: after the point, of the error too.
        scale: factor from the number and its error to the unit.
        unit: follows the number.
        signed: show a plus.
        error: standard error of the number.

    Example:
        >>> number(0.0123, 2, scale=1000, signed=True, error=0.004)
        '+12.30 ± 4.00'
        >>> number(None, 2)
        '-'
    """
    if value is None:
        return "-"
    text = f"{scale * value:{'+' if signed else ''}.{digits}f}{unit}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"


def percent(
    fraction: float | None, digits: int = 1, *, unit: str = " %", signed: bool = False, error: float | None = None
) -> str:
    """Write a fraction in percent; without `unit` where the title of a column has it.

    Example:
        >>> percent(0.0123, 2, signed=True, error=0.001)
        '+1.23 % ± 0.10'
    """
    return number(fraction, digits, scale=100, unit=unit, signed=signed, error=error)


def mebibytes(count: int, *, unit: str = " MiB") -> str:
    """Write a count of bytes in MiB; without `unit` where the title of a column has it."""
    return number(count, 1, scale=2**-20, unit=unit)


def gibibytes(count: int) -> str:
    """Write a count of bytes in GiB."""
    return number(count, 0, scale=2**-30, unit=" GiB")


def milliseconds(row: Row) -> str:
    """Write the median time of a row and its spread.

    Example:
        >>> milliseconds({"median_ms": 1.5, "spread": 0.07})
        '1.500 (7 %)'
    """
    median = number(row["median_ms"], 3 if abs(row["median_ms"]) < 10 else 1)
    return median if row["spread"] is None else f"{median} ({percent(row['spread'], 0)})"


def ratio(value: float | None) -> str:
    """Write how many times as fast something is."""
    return number(value, 2, unit="x")
