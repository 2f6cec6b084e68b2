"""Architectures of transformers that are known to work, and reasons why others do not."""

from typing import Any, NamedTuple

__all__ = ["ARCHITECTURES", "Support", "supported"]


class Support(NamedTuple):
    """The support of one architecture.

    Attributes:
        supported: True if `swan.attach` accepts it.
        fold: True if ``fold=True`` works.
        note: a remark, or the reason why it is refused.
    """

    supported: bool
    fold: bool = False
    note: str = ""


FUSED = "projections in one module, so fold=False"
SLIDING = "sliding layers keep transformers' own cache"

# By `config.model_type`; every line has its test (tests/matrix.py).
ARCHITECTURES: dict[str, Support] = {
    "llama": Support(True, True, "also SmolLM2 and many others of its kind"),
    "mistral": Support(True, True, "refused where every layer has a sliding window"),
    "mixtral": Support(True, True, "mixture of experts"),
    "qwen2": Support(True, True, "biases"),
    "qwen3": Support(True, True, "norms of queries and keys"),
    "qwen3_moe": Support(True, True, "norms of queries and keys, mixture of experts"),
    "olmo2": Support(True, True, "norms of queries and keys"),
    "olmoe": Support(True, True, "mixture of experts"),
    "gemma3_text": Support(True, True, SLIDING),
    "granite": Support(True, True, "a scale of its own"),
    "smollm3": Support(True, True, "some layers without RoPE"),
    "glm4": Support(True, True, "partial RoPE"),
    "cohere": Support(True, True),
    "starcoder2": Support(True, True, "biases"),
    "stablelm": Support(True, True, "partial RoPE"),
    "opt": Support(True, True, "no RoPE"),
    "phi3": Support(True, False, FUSED),
    "gpt_neox": Support(True, False, f"{FUSED}; partial RoPE"),
    "gpt2": Support(True, False, f"{FUSED}; no RoPE"),
    "lfm2": Support(True, True, "convolution layers keep transformers' own cache"),
    "qwen3_next": Support(True, False, "linear-attention layers keep transformers' own cache; gated queries"),
    "gemma2": Support(False, note="scores are capped (softcap)"),
    "gpt_oss": Support(False, note="learned sinks in the softmax"),
    "deepseek_v3": Support(False, note="latent attention (MLA): the cache is compressed already"),
    "falcon_h1": Support(False, note="attention and a state in one layer"),
    "doge": Support(False, note="a mask that depends on values"),
    "jetmoe": Support(False, note="keys are repeated between cache and attention"),
    "bloom": Support(False, note="attention of its own (ALiBi)"),
    "mamba": Support(False, note="no attention"),
    "gemma3n_text": Support(False, note="layers use the keys and values of earlier ones"),
    "gemma4_text": Support(False, note="layers use the keys and values of earlier ones, or heads of 512 dimensions"),
    "mllama_text_model": Support(False, note="attends to images by layers of their own"),
    "bart": Support(False, note="an encoder and a decoder"),
}


def supported() -> list[dict[str, Any]]:
    """List the architectures of transformers that are known to work, and why others do not.

    `swan.attach` tries others too: it runs a few tokens on a cache and refuses what does not come out right.

    Returns:
        A row for each: ``architecture``, ``supported``, ``fold`` (whether ``fold=True`` works) and ``note``.

    Example:
        >>> supported()[0]
        {'architecture': 'llama', 'supported': True, 'fold': True, 'note': 'also SmolLM2 and many others of its kind'}
        >>> [row["architecture"] for row in supported() if row["note"].startswith("scores are capped")]
        ['gemma2']
    """
    return [
        {"architecture": name, "supported": row.supported, "fold": row.fold, "note": row.note}
        for name, row in ARCHITECTURES.items()
    ]
