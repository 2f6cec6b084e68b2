"""The entry point that vLLM calls."""

import os

from swan.integrations.vllm.settings import check_version

__all__ = ["CPU", "register"]

CPU = "SWAN_VLLM_CPU"  # environment variable: serve on a CPU, whose platform knows no CUSTOM backend; for tests
BACKEND = "swan.integrations.vllm.backend.SwanBackend"


def register() -> None:
    """Make swan's attention the backend that vLLM calls CUSTOM; vLLM calls this in each of its processes.

    Raises:
        ImportError: vllm is not of a version that this plugin was written for.
    """
    import vllm
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_version(vllm.__version__)
    if not hasattr(AttentionBackend, "customize_spec"):
        raise ImportError(f"vllm {vllm.__version__} has no AttentionBackend.customize_spec, by which pages shrink")
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if os.environ.get(CPU):
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
