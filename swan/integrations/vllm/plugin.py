"""The entry point that vLLM calls."""

import logging
import os

from swan.integrations.vllm.settings import check_version

__all__ = ["CPU", "register"]

CPU = "SWAN_VLLM_CPU"  # environment variable: serve on a CPU, whose platform knows no CUSTOM backend; for tests
BACKEND = "swan.integrations.vllm.backend.SwanBackend"


def register() -> None:
    """Make swan's attention the backend that vLLM calls CUSTOM; vLLM calls this in each of its processes.

    It does so whether the server asks for that backend or not: with a version that swan was not written for this logs a
    sentence, and leaves vLLM as it is.
    """
    import vllm

    try:
        check_version(vllm.__version__)
    except ImportError as error:
        logging.getLogger("vllm.swan").warning("%s. Until then there is no backend CUSTOM of swan.", error)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if os.environ.get(CPU):
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
