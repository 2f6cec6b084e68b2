"""Moments against direct sums in float64, and that the activations they are made of do not stay."""

import pytest
import torch
from einops import einsum, rearrange
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from swan import SwanAttention, calibrate
from swan.calibration.batches import placed, positions_of
from swan.calibration.capture import call
from swan.calibration.moments import Moments, output_projection
from tests.cases import images
from tests.tiny import ARCHITECTURES, VOCABULARY, attached, left_padded, live_storages, logits_of, tiny, tokens

# Both sides are sums in float64 of some thousand products of the same float32 numbers.
SAME_SUMS = {"rtol": 1e-12, "atol": 1e-12}


class OwnModel(nn.Module):
    """A model of one's own: two layers of `SwanAttention`."""

    def __init__(self, **settings):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 48)
        self.layers = nn.ModuleList(SwanAttention(48, heads=6, kv_heads=2, **settings) for _ in range(2))

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def gram(x, kv_heads, real=None):
    """The sum over tokens and over the heads of each group of x xᵀ, one token at a time."""
    total = torch.zeros(kv_heads, x.shape[-1], x.shape[-1], dtype=torch.float64)
    for row in range(x.shape[0]):
        for token in range(x.shape[2]):
            if real is None or real[row, token]:
                for head in range(x.shape[1]):
                    vector = x[row, head, token].double()
                    total[head * kv_heads // x.shape[1]] += torch.outer(vector, vector)
    return total


def keys_and_values(model, **inputs):
    """Keys and values of each layer, from the cache of transformers."""
    cache = DynamicCache()
    logits_of(model, cache, **inputs)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize(
    "settings", [{}, {"qk_norm": True, "bias": True}, {"rope": None}], ids=["rope", "norm", "plain"]
)
def test_of_a_model_of_ones_own(settings):
    model, ids = OwnModel(**settings).double(), tokens(2, 9)
    calibration = calibrate(model, [ids])
    x = model.embedding(ids)
    for layer, moments in zip(model.layers, calibration.moments, strict=True):
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", d=8) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = (turned(norm(t), layer.rope) for norm, t in ((layer.q_norm, q), (layer.k_norm, k)))
        # RoPE is computed in float32, here and there.
        torch.testing.assert_close(moments.q, gram(q, 2), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.k, gram(k, 2), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.v, gram(v, 2), **SAME_SUMS)
        x = x + layer(x)
    assert calibration.tokens == 18


def turned(x, base):
    """RoPE by the formula: the pair (i, i + d/2) of token t turns by t / base ** (2 i / d)."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    out = x.clone()
    for t in range(x.shape[2]):
        for i in range(half):
            angle = torch.tensor(t / base ** (i / half), dtype=torch.float64)
            a, b = x[:, :, t, i], x[:, :, t, i + half]
            out[:, :, t, i], out[:, :, t, i + half] = (
                a * angle.cos() - b * angle.sin(),
                b * angle.cos() + a * angle.sin(),
            )
    return out


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "olmo2", "gpt2", "gpt-neox"])
def test_keys_and_values_of_transformers(architecture):
    model, ids = tiny(architecture), tokens(2, 20)
    calibration = calibrate(model, [ids], positions=1)
    for moments, (k, v) in zip(calibration.moments, keys_and_values(model, input_ids=ids), strict=True):
        torch.testing.assert_close(moments.k, gram(k, k.shape[1]), **SAME_SUMS)
        torch.testing.assert_close(moments.v, gram(v, v.shape[1]), **SAME_SUMS)
    assert calibration.tokens == 40


def test_queries_of_transformers():
    model, ids = tiny("llama"), tokens(2, 11)
    seen = []

    def see(module, arguments, named):
        cos, sin = named["position_embeddings"]
        q = rearrange(module.q_proj(named["hidden_states"]), "b t (h d) -> b h t d", d=16)
        seen.append(apply_rotary_pos_emb(q, q, cos, sin)[0].detach())

    hooks = [layer.self_attn.register_forward_pre_hook(see, with_kwargs=True) for layer in model.model.layers]
    logits_of(model, input_ids=ids)
    for hook in hooks:
        hook.remove()
    for moments, q in zip(calibrate(model, [ids], positions=1).moments, seen, strict=True):
        torch.testing.assert_close(moments.q, gram(q, 2), **SAME_SUMS)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_padding_does_not_count(architecture):
    """This holds for a sliding layer too (gemma3), where the last token does not see the first ones."""
    model, inputs = tiny(architecture), left_padded(20, 3, 11)
    real = inputs["attention_mask"].bool()
    calibration = calibrate(model, [inputs])
    for moments, (k, v) in zip(calibration.moments, keys_and_values(model, **inputs), strict=True):
        torch.testing.assert_close(moments.k, gram(k, k.shape[1], real), **SAME_SUMS)
        torch.testing.assert_close(moments.v, gram(v, v.shape[1], real), **SAME_SUMS)
        assert moments.tokens == 34


def test_what_stands_in_the_padding_does_not_matter():
    model, inputs = tiny(), left_padded(20, 3)
    other = inputs | {"input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 5)}
    for a, b in zip(calibrate(model, [inputs]).moments, calibrate(model, [other]).moments, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in "qkv")


@pytest.mark.parametrize("model", [OwnModel().double(), tiny().double()], ids=["own", "llama"])
def test_batches_sum_up(model):
    ids = tokens(6, 15)
    whole = calibrate(model, [ids], positions=1)
    parts = calibrate(model, iter(ids.split([1, 2, 3])), positions=1)
    assert parts.tokens == whole.tokens == 90
    for a, b in zip(parts.moments, whole.moments, strict=True):
        for name in "qkv":
            # float64 up to RoPE, whose float32 is the same in both
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model, tensors", [(OwnModel(), 1), (tiny(), 2)], ids=["own", "llama"])
def test_activations_do_not_stay(model, tensors):
    """Between batches nothing is alive but the moments, however many batches have come."""
    held = []

    def batches():
        before = live_storages()
        for _ in range(4):
            yield tokens(2, 200)
            held.append(sum(size for _, size in live_storages().items() - before.items()))

    calibration = calibrate(model, batches(), effects=False)
    moments = sum(getattr(m, name).nbytes for m in calibration.moments for name in "qkvo")
    batch = tensors * 2 * 200 * 8  # ids, and positions where texts are spread over them
    assert all(size <= moments + batch for size in held)
    assert held[1] == held[-1]


# Positions ----------------------------------------------------------------------------------------


def test_texts_are_spread_over_the_positions_of_a_model():
    """Row i of batch n begins at the share u² of the 492 free ones, u = n (√5 - 1) / 2 + i √2 less its whole part."""
    model, ids = tiny(), tokens(5, 20)
    inputs = [{"input_ids": ids[:3]}, ids[3:]]
    spread = [first + torch.arange(20) for first in (0, 84, 337, 187, 0)]  # u: 0, 0.414.., 0.828.., 0.618.., 0.032..
    at = [
        {"input_ids": part, "position_ids": torch.stack(where)}
        for part, where in zip(ids.split(3), (spread[:3], spread[3:]), strict=True)
    ]
    expected, found = calibrate(model, at), calibrate(model, inputs)
    for a, b, (k, v) in zip(
        expected.moments,
        found.moments,
        keys_and_values(model, input_ids=ids, position_ids=torch.stack(spread)),
        strict=True,
    ):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in "qkvo")
        torch.testing.assert_close(b.k, gram(k, k.shape[1]), **SAME_SUMS)
        torch.testing.assert_close(b.v, gram(v, v.shape[1]), **SAME_SUMS)


POSITIONS = dict.fromkeys(("gpt2", "opt", "bloom", "mamba", "bart"), 1) | {"phi3-long": 48}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_predicts_the_same_wherever_a_text_begins(architecture):
    """But for rounding: an angle of 512 is off by 3e-5 in float32."""
    if architecture == "gpt-oss":
        pytest.skip("the tiny one cannot run: it has fewer experts than a token asks for")
    model, ids = tiny(architecture), tokens(3, 40)
    positions = positions_of(model)
    assert positions == POSITIONS.get(architecture, 512)
    batch = placed(ids, 1, positions)
    assert (batch is ids) == (positions == 1)
    with torch.no_grad():
        torch.testing.assert_close(call(model, batch).logits, call(model, ids).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("build", [images.paligemma, images.gemma3, images.llava, images.qwen2_vl])
def test_text_alone_is_spread_in_a_model_that_reads_images(build):
    model, ids = build(), tokens(2, 40).clamp(min=10)  # no tokens that stand for images
    batch = placed(ids, 2, positions_of(model))
    with torch.no_grad():
        torch.testing.assert_close(call(model, batch).logits, call(model, ids).logits, rtol=0, atol=1e-3)
    assert batch["position_ids"].min() > 0
    if build is not images.qwen2_vl:
        inputs = images.with_image(model)
        assert placed(inputs, 1, 512) is inputs


@pytest.mark.parametrize("original", [None, 100])
def test_other_frequencies_begin_where_a_model_says(original):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": original}
    assert positions_of(tiny(rope_parameters=rope)) == (original or 512)


def test_positions_that_are_given_stay():
    model, ids = tiny(), tokens(2, 20)
    given = {"input_ids": ids, "position_ids": torch.arange(20).expand(2, -1)}
    for a, b in zip(calibrate(model, [given]).moments, calibrate(model, [ids], positions=1).moments, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in "qkv")


@pytest.mark.parametrize(
    ("model", "positions", "said"),
    [
        (tiny(), 0, "from 1 to the 512 of this model, got 0"),
        (tiny(), 513, "from 1 to the 512 of this model, got 513"),
        (tiny("phi3-long"), 49, "from 1 to the 48 of this model"),  # it rotates by other frequencies from there on
        (tiny("gpt2"), 2, "models with rotary embeddings and a number of positions, this is none"),
        (OwnModel(), 2, "models with rotary embeddings and a number of positions, this is none"),
    ],
)
def test_positions_that_a_model_does_not_know(model, positions, said):
    with pytest.raises(ValueError, match=said):
        calibrate(model, [tokens(1, 20)], positions=positions)


def test_an_attached_model_can_be_calibrated_again():
    """Vectors are observed before swan's rotation."""
    model, ids = tiny(), tokens(2, 20)
    fresh, again = calibrate(model, [ids]), calibrate(attached(), [ids])
    for a, b in zip(fresh.moments, again.moments, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in "qkvo")


# The output projection ----------------------------------------------------------------------------


class Twice(nn.Module):
    """A wrapped projection, as adapters and quantization make them."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.in_features = inner, inner.in_features

    def forward(self, x):
        return 2 * self.inner(x)


def output_gram(weight, kv_heads, d):
    """Σ over the heads of a group of W_hᵀ W_h, with W [dim, heads * d]."""
    by_head = rearrange(weight.double(), "o (h g d) -> h g o d", h=kv_heads, d=d)
    return einsum(by_head, by_head, "h g o d, h g o e -> h d e")


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "weight"),
    [
        ("llama", 2, lambda model: model.model.layers[1].self_attn.o_proj.weight),
        ("gpt2", 4, lambda model: model.transformer.h[1].attn.c_proj.weight.T),  # Conv1D, with a bias
        ("gpt-neox", 4, lambda model: model.gpt_neox.layers[1].attention.dense.weight),  # with a bias
    ],
    ids=["llama", "gpt2", "gpt-neox"],
)
def test_output_moment_is_the_gram_of_the_weights(architecture, kv_heads, weight):
    model = tiny(architecture)
    moment = calibrate(model, [tokens(1, 5)]).moments[1].o
    # The projection runs in float32 and its bias is subtracted: errors of eps times a weight, 64 of them summed.
    expected = output_gram(weight(model).detach(), kv_heads, 16)
    torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_output_moment_of_a_model_of_ones_own():
    model = OwnModel()
    moment = calibrate(model, [tokens(1, 5)]).moments[1].o
    torch.testing.assert_close(moment, output_gram(model.layers[1].o_proj.weight.detach(), 2, 8), **SAME_SUMS)


def test_a_wrapped_projection_counts_as_it_acts():
    model = tiny()
    plain = calibrate(model, [tokens(1, 5)]).moments[0].o
    attention = model.model.layers[0].self_attn
    attention.o_proj = Twice(attention.o_proj)
    torch.testing.assert_close(calibrate(model, [tokens(1, 5)]).moments[0].o, 4 * plain, **SAME_SUMS)


def test_without_a_known_projection_the_output_moment_is_zero():
    attention = nn.Module()
    assert output_projection(attention) is None
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 4)
    moments = Moments.begin(q, k, v, attention)
    assert moments.k.shape == (2, 8, 8)
    assert torch.equal(moments.o, torch.zeros(2, 4, 4, dtype=torch.float64))
