"""What of a model's configuration decides if swan serves it, and how much its cache takes."""

from dataclasses import dataclass
from typing import Any

from swan.integrations.architectures import ARCHITECTURES

__all__ = ["Heads", "heads_of_config"]


@dataclass(frozen=True)
class Heads:
    """The attention of a model.

    Attributes:
        kv_heads: KV heads of each layer.
        dims: head dimensions of keys and values of each layer.
    """

    kv_heads: int
    dims: list[tuple[int, int]]

    def of_rank(self, ranks: int) -> int:
        """Count the KV heads of each process.

        Raises:
            ValueError: they cannot be shared by so many.
        """
        if self.kv_heads % ranks and ranks % self.kv_heads:
            raise ValueError(f"{self.kv_heads} KV heads cannot be shared by {ranks} processes")
        return max(self.kv_heads // ranks, 1)


def heads_of_config(config: Any) -> Heads:
    """Read a configuration of transformers.

    Raises:
        ValueError: swan does not serve such a model; the message says why.
    """
    text = config.get_text_config(decoder=True)
    known = ARCHITECTURES.get(text.model_type)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"swan does not serve {text.model_type}: latent attention (MLA), its cache is compressed already"
        )
    if known is not None and not known.supported:
        raise ValueError(f"swan does not serve {text.model_type}: {known.note}")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and window < text.max_position_embeddings:
        kinds.add("sliding_attention")
    if others := sorted(kinds - {"full_attention"}):
        raise ValueError(f"swan does not serve {text.model_type}: it has layers of {' and '.join(others)}")
    heads = text.num_attention_heads
    d = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Heads(getattr(text, "num_key_value_heads", None) or heads, [(d, d)] * text.num_hidden_layers)
