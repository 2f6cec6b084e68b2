"""Files that are replaced whole or not at all, and readers that believe nothing of a file before they checked it."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if sys.platform != "win32":
    import fcntl

__all__ = [
    "check_place", "parse_json", "read_json", "read_tensors", "reason_of", "replacing", "scratch_folder", "write_json",
    "write_tensors",
]  # fmt: skip

MOST_BYTES = 2**24  # of JSON text and of the header of a safetensors file: those of swan have some thousands
SUFFIX = ".swan-tmp"


def check_place(path: str | Path) -> None:
    """Raise a ValueError or an OSError if no file can be written to `path`, before much is computed for it."""
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no plain file"
        raise ValueError(f"{path} is {kind}, so nothing can be written to it; name a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} is no folder that this user may write to")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yield the name of a new file that takes the place of `path` if nothing is raised; folders are made.

    What a process that is killed leaves behind, the next one that writes to `path` removes. A symbolic link
    is replaced, and not the file that it names.

    Raises:
        ValueError: `path` is a folder, a device or the like.
        OSError: it cannot be written; then it is as it was.
    """
    path = Path(path)
    check_place(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder, as safetensors writes a temporary file of its own beside.
        with scratch_folder(path.parent, f".{path.name[:64]}.") as scratch:
            temporary = str(scratch / "new")
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.umask(umask := os.umask(0))
            os.chmod(temporary, 0o666 & ~umask)  # safetensors lets only the owner read
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written, and is as it was ({reason}); make room or name another") from error


@contextlib.contextmanager
def scratch_folder(folder: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in another one, and remove it at the end; if the process is killed, the next call does."""
    _remove_strays(folder, prefix)
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=prefix, suffix=SUFFIX, dir=folder))
        handle = _locked(scratch, wait=True)
        if scratch.exists():
            break
        _close(handle)  # another process took it for a stray before it was locked
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _close(handle)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors as one safetensors file, with JSON values and a checksum of everything in its metadata."""
    text = json.dumps(metadata, allow_nan=False, sort_keys=True)
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={"swan": text, "sha256": _checksum(text, tensors)})
        except SafetensorError as error:  # a full disk, for instance
            raise OSError(str(error)) from error
        _read_header(temporary)


def read_tensors(
    path: str | Path, versions: Sequence[str], name: str, advice: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of `write_tensors`; return its metadata and its tensors, which share memory with the file.

    Args:
        path: the file.
        versions: values of ``"format"`` in its metadata that are read; only those before the last have no checksum.
        name: a noun for its content, for errors.
        advice: the way to make another file, for errors.

    Raises:
        ValueError: the file is not whole, or of another format.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, and no file of a {name}")
    try:
        header = _read_header(path)
        texts = header.get("__metadata__") or {}
        metadata = parse_json(texts.get("swan", "{}"))
        is_ours = isinstance(metadata, dict) and metadata.get("format") in versions
        tensors = {}
        if is_ours:  # of another file nothing is read
            with safe_open(str(path), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in header if key != "__metadata__"}
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({reason_of(error)}); {advice}") from error
    if not is_ours:
        raise ValueError(f"{path} is not a {name} of this version of swan; {advice}")
    is_newest = metadata["format"] == versions[-1]
    if (is_newest or "sha256" in texts) and _checksum(texts["swan"], tensors) != texts.get("sha256"):
        raise ValueError(f"{path} is damaged: its content is not what was written to it; {advice}")
    return metadata, tensors


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON value to a file, whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> str:
    """Read the text of a JSON file, not more of it than any of swan's has.

    Raises:
        ValueError: it is no plain file, longer than that, or not UTF-8.
    """
    _check_plain(path)
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES} bytes")
    return content.decode("utf-8")


def parse_json(text: str) -> Any:
    """Parse JSON in which no key comes twice in an object and all numbers are finite.

    Raises:
        ValueError: the text is something else.

    Example:
        >>> parse_json('{"bits": 4, "bits": 8}')
        Traceback (most recent call last):
        ValueError: the key 'bits' comes twice
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for key, value in pairs:
            if key in named:
                raise ValueError(f"the key {key[:40]!r} comes twice")
            named[key] = value
        return named

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number[:40]} is no finite number")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def reason_of(error: Exception) -> str:
    """Return the message of an error on one line of bounded length, for another error."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(text[:1000].split())[:300]


def _remove_strays(folder: Path, prefix: str) -> None:
    """Remove the scratch folders of processes that were killed: those that nobody has locked."""
    stray = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}" + re.escape(SUFFIX))
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries if stray.fullmatch(entry.name) and not entry.is_symlink()]
    for path in paths:
        with contextlib.suppress(OSError):
            handle = _locked(path, wait=False)
            if handle is not None:
                shutil.rmtree(path, ignore_errors=True)
                _close(handle)


def _locked(folder: Path, *, wait: bool) -> int | None:
    """Open a folder and lock it until it is closed, by the end of the process too; None where that cannot be."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another process has it, or the file system has no locks
        os.close(handle)
        return None
    return handle


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _check_plain(path: str | Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise ValueError(f"{path} is a folder, a device or a pipe")


def _read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a safetensors file: what safetensors checks, and that no key comes twice.

    Raises:
        ValueError: it is none.
    """
    _check_plain(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MOST_BYTES, os.fstat(file.fileno()).st_size):
            raise ValueError(f"its header would have {size} bytes")
        header = parse_json(file.read(size).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    texts = header.get("__metadata__")
    if texts is not None and not (isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())):
        raise ValueError("its metadata are not texts")
    return header


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash JSON text, apart from its formatting, and the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
