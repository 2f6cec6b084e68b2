"""A model folder that says how its cache is winnowed: `save_pretrained` and `from_pretrained`."""

import os
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from swan.calibration import Calibration, Plan
from swan.calibration.capture import unwrapped
from swan.calibration.checks import check_calibration
from swan.calibration.files import read_json, reason_of, replacing, scratch_folder
from swan.integrations.transformers.attach import attach
from swan.integrations.transformers.attachment import attachment_of

__all__ = ["attach_saved", "from_pretrained", "save_pretrained", "saved_calibration"]

CALIBRATION, PLAN = "swan_calibration.safetensors", "swan_plan.json"


def save_pretrained(model: PreTrainedModel, directory: str | Path, plan: Plan | None = None) -> None:
    """Write the calibration of an attached model, and a plan, into its folder; the model too if it is not there.

    Args:
        model: an attached model.
        directory: the folder of the model; it is made if it is missing.
        plan: the plan of a ``SwanCache(model)`` that is given no other.

    Raises:
        TypeError: the plan is none.
        ValueError: the model is not attached, the folder or the plan is that of another, or the model would have to be
            written with folded values or an adapter; nothing is written then.

    Example:
        >>> import tempfile, torch, swan
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
        >>> calibration = swan.calibrate(model, [torch.randint(97, (1, 100))], progress=False)
        >>> swan.attach(model, calibration)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder, plan=swan.Plan.for_retention(0.33, calibration))
        ...     sorted(file.name for file in Path(folder).glob("swan*"))
        ['swan_calibration.safetensors', 'swan_plan.json']
    """
    folder, attachment = Path(directory), attachment_of(model)
    if not isinstance(plan, Plan | None):
        raise TypeError(f"save_pretrained takes a Plan, got {type(plan).__name__}; make one by Plan.for_retention")
    if plan is not None:
        plan.check_dims(attachment.calibration.dims)
    if (folder / "config.json").is_file():
        attachment.calibration.check_config(AutoConfig.from_pretrained(folder))
    else:
        if unwrapped(model) is not model:
            raise ValueError(
                "a PeftModel writes its adapter alone; save into the folder of its base model, or merge_and_unload() it"
            )
        if attachment.folded:
            raise ValueError(
                "the weights of this model hold folded values; detach it, attach it with fold=False, and save it then"
            )
    check_calibration(attachment.calibration)
    text = None if plan is None else plan.to_json() + "\n"
    if not (folder / "config.json").is_file():
        _save_model(model, folder)
    attachment.calibration.save(folder / CALIBRATION)
    if text is None:
        return (folder / PLAN).unlink(missing_ok=True)
    with replacing(folder / PLAN) as temporary:
        Path(temporary).write_text(text)


def from_pretrained(directory: str | Path, *, fold: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a model with its calibration, attached: transformers' ``from_pretrained`` and `swan.attach` in one.

    Args:
        directory: a folder that `save_pretrained` wrote to.
        fold: as in `swan.attach`.
        **kwargs: of transformers' ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Returns:
        The model in evaluation mode; ``SwanCache(model)`` follows the saved plan, if there is one.

    Raises:
        ValueError: the folder holds no calibration, or one of another model.

    Example:
        >>> import tempfile, torch, swan
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
        >>> calibration = swan.calibrate(model, [torch.randint(97, (1, 100))], progress=False)
        >>> swan.attach(model, calibration)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder, plan=swan.Plan.for_retention(0.33, calibration))
        ...     again = from_pretrained(folder)  # attached
        >>> swan.SwanCache(again).plan == swan.Plan.for_retention(0.33, calibration)
        True
    """
    folder = Path(directory)
    if saved_calibration(folder) is None:
        raise ValueError(
            f"{folder} holds no {CALIBRATION}; load the model with transformers, swan.attach it to a calibration, and "
            "write that with swan.save_pretrained"
        )
    calibration, plan = _read(folder)
    config = AutoConfig.from_pretrained(folder)
    calibration.check_config(config)  # before the weights are read
    architecture = (config.architectures or [""])[0]
    model_class: Any = getattr(transformers, architecture, AutoModelForCausalLM)  # some read images too
    model = model_class.from_pretrained(folder, **kwargs).eval()
    attach(model, calibration, fold=fold)
    attachment_of(model).plan = plan
    return model


def attach_saved(model: PreTrainedModel, directory: str | Path, *, fold: bool = False) -> None:
    """Attach a model that is loaded already to the calibration and the plan in its folder."""
    calibration, plan = _read(Path(directory))
    attach(model, calibration, fold=fold)
    attachment_of(model).plan = plan


def saved_calibration(directory: str | Path) -> Path | None:
    """Return the file of the calibration in a folder that `save_pretrained` wrote to; None in any other."""
    file = Path(directory) / CALIBRATION
    return file if file.is_file() else None


def _read(folder: Path) -> tuple[Calibration, Plan | None]:
    """Read the calibration and the plan in a folder."""
    calibration = Calibration.load(folder / CALIBRATION)
    if not (folder / PLAN).exists():
        return calibration, None
    try:
        plan = Plan.from_json(read_json(folder / PLAN))
        plan.check_dims(calibration.dims)
    except ValueError as error:
        raise ValueError(f"{folder / PLAN}: {reason_of(error)}; remove it or save the folder again") from error
    return calibration, plan


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model; its config.json comes last, so that a folder with one has all of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder, f".{CALIBRATION}.") as scratch:
        try:
            model.save_pretrained(scratch)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the model could not be written to {folder} ({reason_of(error)}); make room there"
            ) from error
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
