"""Dtypes that a device multiplies natively, and the one that a model runs in."""

import torch

__all__ = ["dtype_name", "native_dtypes", "native_or_float32"]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def native_dtypes(device: torch.device | str) -> tuple[torch.dtype, ...]:
    """List the floating-point types for whose matrix products a device has instructions, float32 first.

    Other types work everywhere, but on a CPU with AVX2 only a product takes 7 to 14 times as long as in float32. A CPU
    that ATEN_CPU_CAPABILITY limits counts as what it is limited to.

    Example:
        >>> native_dtypes("cpu")[0]
        torch.float32
    """
    device = torch.device(device)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.float32, torch.float16, *([torch.bfloat16] if has_bfloat16 else []))
    if device.type == "mps":
        return torch.float32, torch.float16, torch.bfloat16
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return (torch.float32,)
    has = torch.cpu.get_capabilities()
    needs = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    return (torch.float32, *(dtype for dtype, names in needs.items() if any(has.get(name) for name in names)))


def native_or_float32(
    dtype: torch.dtype, device: torch.device | str, whose: str = "the model's"
) -> tuple[torch.dtype, str]:
    """Choose the dtype for a model on a device: its own where that is native there, else float32.

    Args:
        dtype: dtype of the model.
        device: where it will run.
        whose: of whom the sentence speaks.

    Returns:
        The dtype, and a sentence that says why.

    Example:
        >>> native_or_float32(torch.float32, "cpu")
        (torch.float32, "float32, the model's own")
    """
    device = torch.device(device)
    if dtype == torch.float32:
        return dtype, f"float32, {whose} own"
    if dtype in native_dtypes(device):
        return dtype, f"{dtype_name(dtype)}, {whose} own: native on this {device.type.upper()}"
    needs = {torch.bfloat16: "AVX512-BF16 or AMX", torch.float16: "AVX512-FP16 or AMX"}.get(dtype)
    lacks = f"it lacks {needs}" if device.type == "cpu" and needs else "it lacks the instructions"
    reason = f"float32, as this {device.type.upper()} would multiply {whose} {dtype_name(dtype)} slowly ({lacks})"
    return torch.float32, reason
