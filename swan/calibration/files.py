"""Files that are replaced whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["read_tensors", "replacing", "write_tensors"]


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yield the name of a new file that takes the place of `path` if nothing is raised; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        yield temporary
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for their owner only
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors as one safetensors file, with JSON values in its metadata."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"swan": json.dumps(metadata)})


def read_tensors(path: str | Path, version: str, name: str, advice: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of `write_tensors`; return its metadata and its tensors.

    Args:
        path: the file.
        version: the ``"format"`` that its metadata must have.
        name: a noun for its content, for errors.
        advice: the way to make another file, for errors.

    Raises:
        ValueError: the file is not whole, or of another format.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, and no file of a {name}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("swan", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); {advice}") from error
    if metadata.get("format") != version:
        raise ValueError(f"{path} is not a {name} of this version of swan; {advice}")
    return metadata, tensors
