"""`Settings`: what a server is told about swan, and the calibration and plan that follow from it."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swan.calibration import Calibration, Plan
from swan.integrations.vllm.layer import layers_of
from swan.integrations.vllm.pages import PAGE

__all__ = ["VERSIONS", "Settings", "check_version", "load"]

VERSIONS = ((0, 29), (0, 34))  # of vllm: from the first to before the second; as in pyproject.toml
EXAMPLE = """--additional-config '{"swan": {"calibration": "PATH", "retention": 0.26}}'"""


@dataclass(frozen=True)
class Settings:
    """The entry `swan` of vLLM's `additional_config`.

    Args:
        calibration: file of the calibration of the model.
        retention: bytes per history token over those of bfloat16, as in `swan.SwanCache`.
        buffer: newest tokens that each query sees dense.
        sinks: first tokens of each sequence that all queries see dense. Every page has room for so many.

    Raises:
        ValueError: `retention` is not above 0 and at most 1, `buffer` is below 1, or there are too many `sinks`.
        TypeError: something is of another type.

    Example:
        >>> Settings.of({"swan": {"calibration": "a.safetensors", "retention": 0.26}})
        Settings(calibration='a.safetensors', retention=0.26, buffer=128, sinks=1)
    """

    calibration: str
    retention: float
    buffer: int = 128
    sinks: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.calibration, str) or not self.calibration:
            raise TypeError(
                f"calibration must be the path of a file that swan calibrate wrote, got {self.calibration!r}"
            )
        if isinstance(self.retention, bool) or not isinstance(self.retention, int | float):
            raise TypeError(f"retention must be a number such as 0.26, got {self.retention!r}")
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention must be above 0 and at most 1, got {self.retention}")
        if type(self.buffer) is not int or type(self.sinks) is not int:
            raise TypeError(f"buffer and sinks are numbers of tokens, got {self.buffer!r} and {self.sinks!r}")
        if self.buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {self.buffer}")
        if not 0 <= self.sinks <= PAGE:
            raise ValueError(f"a server keeps up to {PAGE} sinks, got {self.sinks}")

    @classmethod
    def of(cls, additional_config: Any) -> "Settings":
        """Read the settings of a server.

        Raises:
            ValueError: there are none, or one is missing, unknown or out of range; or a TypeError.
        """
        entry = additional_config.get("swan") if isinstance(additional_config, Mapping) else None
        if not isinstance(entry, Mapping):
            raise ValueError(f"swan serves this model, but its settings are missing: {EXAMPLE}")
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in entry if name not in names]:
            raise ValueError(f"unknown settings of swan: {', '.join(map(str, unknown))}; there are {', '.join(names)}")
        if missing := [name for name in ("calibration", "retention") if name not in entry]:
            raise ValueError(f"settings of swan lack {' and '.join(missing)}: {EXAMPLE}")
        return cls(**entry)


@functools.lru_cache(maxsize=4)
def load(settings: Settings) -> tuple[Calibration, Plan]:
    """Return the calibration and the plan of a server, read once.

    Raises:
        ValueError: the file is no calibration, the retention is too small for any plan, or the plan has layers without
            a history; or an OSError.
    """
    calibration = Calibration.load(settings.calibration)
    # All heads of a page are alike.
    plan = Plan.for_retention(
        settings.retention, calibration, buffer=settings.buffer, sinks=settings.sinks, by_head=False
    )
    layers_of(plan)
    return calibration, plan


def check_version(version: str) -> None:
    """Raise an ImportError if this is no version of vLLM that the plugin was written for.

    Example:
        >>> check_version("0.32.0+cpu")
        >>> check_version("0.34.1")
        Traceback (most recent call last):
        ImportError: swan's plugin is for vllm>=0.29,<0.34, this is 0.34.1; the hooks that it uses change between ...
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    first, end = VERSIONS
    if match is None or not first <= (int(match[1]), int(match[2])) < end:
        allowed = ",".join(f"{sign}{major}.{minor}" for sign, (major, minor) in ((">=", first), ("<", end)))
        raise ImportError(
            f"swan's plugin is for vllm{allowed}, this is {version}; the hooks that it uses change between versions: "
            f"pip install 'vllm{allowed}'"
        )
