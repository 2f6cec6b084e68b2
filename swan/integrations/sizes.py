"""Sizes in bytes, as people write them."""

import re

__all__ = ["byte_count", "token_count"]

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


def token_count(text: str) -> int:
    """Read a number of tokens, k for 1024 of them.

    Raises:
        ValueError: it is no such number, or below one.

    Example:
        >>> token_count("128k"), token_count("1000")
        (131072, 1000)
    """
    match = re.fullmatch(r"\s*(\d{1,12})\s*([kK]?)\s*", text)
    count = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if count < 1:
        raise ValueError(f"a number of tokens is such as 16384 or 16k, got {text!r}")
    return count
