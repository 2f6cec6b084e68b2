"""Sizes in bytes, as people write them."""

import re

__all__ = ["byte_count"]

UNITS = (
    {"B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)}
    | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
)


def byte_count(size: int | str) -> int:
    """Read a size as a number of bytes.

    Raises:
        ValueError: it is no size, or below one byte.

    Example:
        >>> byte_count("1.5kB"), byte_count("64 MiB")
        (1500, 67108864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size) if isinstance(size, str) else None
    if match and match[2] in UNITS:
        count = int(float(match[1]) * UNITS[match[2]])
    elif isinstance(size, int) and not isinstance(size, bool):
        count = size
    else:
        raise ValueError(f"a budget is a number of bytes or text like '64MiB' in {', '.join(UNITS)}; got {size!r}")
    if count < 1:
        raise ValueError(f"a budget must be at least one byte, got {size!r}")
    return count
