"""Tiny models that read images, of random weights, and inputs for them."""

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import SIZES

TEXT = {name: SIZES[name] for name in SIZES if name not in ("bos_token_id", "eos_token_id")}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
IMAGE = 5  # the token in whose place an image stands: four of them for one


def paligemma() -> PreTrainedModel:
    vision = VISION | {"model_type": "siglip_vision_model", "projection_dim": 64, "vocab_size": 97}
    return _built("PaliGemma", TEXT | {"model_type": "gemma"}, vision, projection_dim=64, hidden_size=64)


def gemma3() -> PreTrainedModel:
    layers = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    text = TEXT | layers | {"query_pre_attn_scalar": 16}
    return _built("Gemma3", text, VISION, mm_tokens_per_image=4, boi_token_index=6, eoi_token_index=7)


def llava() -> PreTrainedModel:
    text = TEXT | {"model_type": "llama", "bos_token_id": 1, "eos_token_id": None}
    return _built("Llava", text, VISION | {"model_type": "clip_vision_model", "projection_dim": 32})


def llava_with_siglip() -> PreTrainedModel:
    text = TEXT | {"model_type": "qwen2", "bos_token_id": 1, "eos_token_id": None}
    return _built("Llava", text, VISION | {"model_type": "siglip_vision_model"}, vision_feature_select_strategy="full")


def qwen2_vl() -> PreTrainedModel:
    """Its positions have three axes."""
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    text |= {"bos_token_id": 1, "eos_token_id": None}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    return _built("Qwen2VL", text, vision, image_token_id=IMAGE, video_token_id=6)


def _built(name: str, text: dict, vision: dict, **settings: object) -> PreTrainedModel:
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(text_config=text, vision_config=vision, image_token_index=IMAGE, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def with_image(model: PreTrainedModel, length: int = 20, start: int = 5, rows: int = 1) -> dict[str, Tensor]:
    """Text with an image in each row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 97, (rows, length), generator=generator)
    ids[:, start : start + 4] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(rows, 3, 28, 28, generator=generator)
    if "token_type_ids" in _arguments(model):
        # PaliGemma: a prompt (0) is seen both ways; Gemma: an image (1) is.
        prompt = "PaliGemma" in type(model).__name__
        inputs["token_type_ids"] = torch.zeros_like(ids) if prompt else (ids == IMAGE).long()
    return inputs


def _arguments(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(type(model).forward.__code__.co_varnames[: type(model).forward.__code__.co_argcount])
