"""The command that starts a server with swan in it."""

import dataclasses
import json
from collections.abc import Sequence

from swan.integrations.vllm.settings import Settings

__all__ = ["serve_command"]


def serve_command(model: str, settings: Settings, arguments: Sequence[str] = ()) -> list[str]:
    """Return the words of `vllm serve` for a model.

    Args:
        model: a folder or a hub id.
        settings: those of swan.
        arguments: further ones for vLLM.

    Example:
        >>> serve_command("model", Settings("model.safetensors", 0.26))[:5]
        ['vllm', 'serve', 'model', '--attention-backend', 'CUSTOM']
    """
    entry = json.dumps({"swan": dataclasses.asdict(settings)})
    swan = ["--attention-backend", "CUSTOM", "--additional-config", entry]
    return ["vllm", "serve", model, *swan, *arguments]
