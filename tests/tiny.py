"""Tiny transformers models with random weights, and what their tests share."""

import copy
import dataclasses
import gc
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from swan import Calibration, SwanCache, attach, calibrate
from swan.calibration.effects import KEYS, VALUES, Effects, graded
from swan.evaluation.models import model_folder
from swan.integrations.transformers import cache_keyword
from swan.storage.mixing import MIXES

VOCABULARY = 97

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # attention far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that every generation has the same length
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
GPT2_SIZES |= {"initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": None}
OTHER_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64}
JETMOE_SIZES = OTHER_SIZES | {"intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2}
JETMOE_SIZES |= {"kv_channels": 16, "num_local_experts": 2, "max_position_embeddings": 512}
BART_SIZES = {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1}
OPT_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2}
OPT_SIZES |= {"num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 512, "init_std": 0.15}
OPT_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
QWEN3_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 48}
QWEN3_NEXT = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1}
QWEN3_NEXT |= {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "linear_num_value_heads": 4}
QWEN3_NEXT |= {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
DEEPSEEK = {name: size for name, size in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
DEEPSEEK |= {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
DEEPSEEK |= {"moe_intermediate_size": 48, "num_key_value_heads": 4}
FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
FALCON_H1 |= {"mamba_chunk_size": 16}
HYBRID = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# As released: the window of Phi-3.5-mini is wider than its positions, and its frequencies change at a length.
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 8.0}
LONGROPE |= {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [4.0 + i for i in range(8)]}
PHI3_LONG = {"max_position_embeddings": 384, "sliding_window": 768, "original_max_position_embeddings": 48}
PHI3_LONG |= {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 48}}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8, "hidden_size_per_layer_input": 8}
SHARED |= {"vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA3N = SHARED | {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}
CROSSING = {"num_hidden_layers": 3, "cross_attention_layers": [1]}
# With the embeddings as its head a random Gemma repeats its last token, whatever its attention says.
GEMMA3 = HYBRID | {"query_pre_attn_scalar": 16, "tie_word_embeddings": False}

OLD = int(transformers.__version__.split(".")[1]) < 15 and transformers.__version__.startswith("5.")
FORGETFUL = ("lfm2",) if OLD else ()  # whose convolutions forget, in old versions, what came before a chunk

# By name: the class of the model, that of its configuration, and settings.
ARCHITECTURES: dict[str, tuple[str, str, dict]] = {
    # supported
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES),  # biases
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES),  # norms of q and k
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZES | GEMMA3),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2_SIZES),  # no RoPE, fused qkv, Conv1D
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),  # fused qkv, partial RoPE
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES),  # fused qkv
    "phi3-long": ("Phi3ForCausalLM", "Phi3Config", SIZES | PHI3_LONG),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", SIZES | {"sliding_window": None, "num_local_experts": 2}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SIZES | QWEN3_MOE),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", SIZES | {"num_experts": 2, "num_experts_per_tok": 1}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", SIZES | {"attention_multiplier": 0.2}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", SIZES | {"no_rope_layers": [1, 0]}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", SIZES),  # partial RoPE
    "cohere": ("CohereForCausalLM", "CohereConfig", SIZES),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", SIZES | {"sliding_window": None}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", SIZES),  # partial RoPE
    "opt": ("OPTForCausalLM", "OPTConfig", OPT_SIZES),  # no RoPE
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", SIZES | {"layer_types": ["conv", "full_attention"]}),
    "qwen3-next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", SIZES | QWEN3_NEXT),
    # refused
    "mistral-sliding": ("MistralForCausalLM", "MistralConfig", SIZES | {"sliding_window": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SIZES | {"sliding_window": 8}),  # softcap
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", SIZES | HYBRID | {"num_local_experts": 2}),  # learned sinks
    "doge": ("DogeForCausalLM", "DogeConfig", SIZES),  # a mask of its own
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", JETMOE_SIZES),  # repeats keys between cache and attention
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),  # MLA
    "falcon-h1": ("FalconH1ForCausalLM", "FalconH1Config", SIZES | FALCON_H1),  # a state in the layers of attention
    "bloom": ("BloomForCausalLM", "BloomConfig", OTHER_SIZES | {"n_layer": 2, "n_head": 4}),  # attention of its own
    "mamba": ("MambaForCausalLM", "MambaConfig", OTHER_SIZES | {"num_hidden_layers": 2}),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig", SIZES | GEMMA3N),  # layers use keys and values of others
    "gemma4-e": ("Gemma4ForCausalLM", "Gemma4TextConfig", SIZES | SHARED),  # likewise
    "mllama": ("MllamaForCausalLM", "MllamaTextConfig", SIZES | CROSSING),  # attends to images
    "bart": ("BartForConditionalGeneration", "BartConfig", BART_SIZES),
}


def tiny(architecture: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model of an architecture with random weights, no two biases or norms of it alike."""
    model_class, config_class, settings = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**settings | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_with_words(folder: Path, seed: int = 0, **changes: object) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Write a tiny model with the tokenizer of the default model, and so its vocabulary, into a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))
    model = tiny(seed=seed, vocab_size=len(tokenizer), **changes)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model, tokenizer


def attached(
    architecture: str = "llama", seed: int = 0, fold: bool = False, effects: bool = False, **changes: object
) -> PreTrainedModel:
    """A tiny model, calibrated on random tokens and attached; with effects its plans go down to few bytes."""
    model = tiny(architecture, seed, **changes)
    calibration = calibration_of(model)
    attach(model, with_effects(calibration) if effects else calibration, fold=fold)
    return model


def calibration_of(model: PreTrainedModel) -> Calibration:
    return calibrate(model, [tokens(2, 40, seed=1)])


def with_effects(calibration: Calibration) -> Calibration:
    """Give a calibration effects that fall with the bytes, alike for all layers, but larger from head to head."""
    heads = max(layer.key_basis.shape[0] for layer in calibration.layers)
    tables = []
    for side in (KEYS, VALUES):
        row = torch.tensor([2.0 ** (-graded(64, groups).vector_bytes() / 4) for groups in side])
        tables.append((row * 16.0 ** torch.arange(heads)[:, None]).repeat(len(calibration.layers), 1, 1))
    return dataclasses.replace(calibration, effects=Effects(*tables))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of random tokens of these lengths, padded on the left, with their mask and positions."""
    longest = max(lengths)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": tokens(len(lengths), longest, seed) * mask,
        "attention_mask": mask,
        "position_ids": positions,
    }


@torch.no_grad()
def logits_of(model: PreTrainedModel, cache: object = None, chunk: int | None = None, **inputs: Tensor) -> Tensor:
    """Logits of a text that the model reads in chunks; without a cache all at once."""
    if cache is None:
        return model(**inputs, use_cache=False).logits
    length = inputs["input_ids"].shape[1]
    parts = []
    for start in range(0, length, chunk or length):
        stop = min(start + (chunk or length), length)
        now = {name: t[:, :stop] if name == "attention_mask" else t[:, start:stop] for name, t in inputs.items()}
        parts.append(model(**now, **{cache_keyword(model): cache}).logits)
    return torch.cat(parts, dim=1)


def generated(model: PreTrainedModel, cache: object = None, **arguments: object) -> Tensor:
    """Tokens of `generate`, greedy unless said otherwise, all of the length asked for."""
    given = {} if cache is None else {cache_keyword(model): cache}
    return model.generate(**{"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0} | arguments, **given)


def everything(model: PreTrainedModel, **settings: object) -> SwanCache:
    """A cache that keeps all, in a buffer so small that most tokens are in the history."""
    return SwanCache(model, **{"retention": 1.0, "buffer": 8, "sinks": 2} | settings)


def float32_bound(model: PreTrainedModel, **inputs: Tensor) -> float:
    """Bound the change of a float32 model's logits by rotations: 4 times its own error against float64.

    They add four products per layer (q, k, v, output) to the seven that a layer has, each with a rounding
    error like theirs; the largest of many such errors is as large again in one run as in another.
    """
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # others have no float64
    exact = logits_of(wide, **inputs)
    return 4 * (logits_of(model, **inputs) - exact).abs().max().item()


def greatest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def live_storages() -> dict[int, int]:
    """Bytes of every storage that a tensor in this process holds, by its address."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # By its exact type: proxies lie to isinstance, and fake tensors of compiled tests hold nothing.
        if type(thing) not in (Tensor, nn.Parameter) or torch._C._functorch.is_batchedtensor(thing):
            continue  # one of vmap, which a traceback may keep, holds nothing of its own
        if thing.layout == torch.strided and thing.device.type != "meta":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def forget_mixes() -> None:
    """Free the mixing matrices of `Graded` layouts, which are kept for all caches of the process."""
    vars(MIXES).clear()


def snapshot(model: PreTrainedModel) -> dict[str, object]:
    """All of a model that `detach` has to bring back."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": [name for name, _ in model.named_buffers()],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


def assert_unchanged(model: PreTrainedModel, before: dict[str, object]) -> None:
    now = snapshot(model)
    weights, kept = now.pop("weights"), before["weights"]
    assert list(weights) == list(kept)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert now == {name: value for name, value in before.items() if name != "weights"}
