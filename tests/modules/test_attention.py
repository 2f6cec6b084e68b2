"""`SwanAttention` against torch's attention with transformers' rotary embedding."""

import re

import pytest
import torch
from torch import nn

from swan import KVCache, LayerPlan, OrthoRotation, SwanAttention, TopK, random_rotation
from tests.strategies import ids, normal, unit

DIM = 48
SHAPES = {"mha": (3, 3, 16), "gqa": (6, 2, 8), "mqa": (5, 1, 20)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
settings = pytest.mark.parametrize(
    "settings",
    [{}, {"rope": 500.0}, {"rope": None}, {"qk_norm": True}, {"bias": True}],
    ids=["plain", "rope 500", "no rope", "qk_norm", "bias"],
)


def layer(shape=(6, 2, 8), *, dtype=torch.float32, **settings) -> SwanAttention:
    torch.manual_seed(0)
    heads, kv_heads, head_dim = shape
    attention = SwanAttention(DIM, heads, kv_heads, head_dim, **settings)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention.to(dtype)


def keep_all(d: int, **settings) -> KVCache:
    return KVCache(LayerPlan(TopK(d, d, bits=16), TopK(d, d, bits=16)), **settings)


def eager(attention: SwanAttention, x, dtype, padding=None):
    """The layer in torch's and transformers' own operations, in any precision (angles are float32 in all)."""
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    weights = {name: p.to(dtype) for name, p in attention.named_parameters()}
    x, d = x.to(dtype), attention.head_dim

    def project(name):
        out = nn.functional.linear(x, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))
        out = out.unflatten(-1, (-1, d)).transpose(1, 2)
        norm = weights.get(f"{name}_norm.weight")
        return out if norm is None else nn.functional.rms_norm(out, (d,), norm)

    q, k, v = (project(name) for name in "qkv")
    if attention.rope is not None:
        config = LlamaConfig(
            hidden_size=d * attention.heads,
            num_attention_heads=attention.heads,
            head_dim=d,
            rope_parameters={"rope_type": "default", "rope_theta": attention.rope},
        )
        positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
        positions = positions if padding is None else positions - padding[:, None]
        cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(x, positions)
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    if padding is None:
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        columns = torch.arange(x.shape[1])
        mask = (columns <= columns[:, None]) & (columns >= padding[:, None, None])
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    return nn.functional.linear(out.transpose(1, 2).flatten(2), weights["o_proj.weight"])


def assert_as_good(found, attention, x, padding=None):
    """At most twice the error of the same layer in eager operations, and a few roundings of the largest output."""
    exact = eager(attention, x, torch.float64, padding).detach()
    plain = eager(attention, x, x.dtype, padding).detach()
    seen = torch.ones(x.shape[:2], dtype=torch.bool)
    if padding is not None:
        seen = torch.arange(x.shape[1]) >= padding[:, None]
    assert found.dtype == x.dtype
    assert found.isfinite().all()
    error, error_plain = ((t[seen].double() - exact[seen]).abs().max() for t in (found, plain))
    limit = 2 * error_plain + 4 * unit(x.dtype) * exact[seen].abs().max()
    assert error <= limit, f"error {error:.3g}, eager {error_plain:.3g}"


# Without a cache ----------------------------------------------------------------------------------


@every_shape
@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@torch.no_grad()
def test_is_torch_attention(dtype, settings, shape):
    attention, x = layer(shape, dtype=dtype, **settings), normal(0, 2, 37, DIM, dtype=dtype)
    assert_as_good(attention(x), attention, x)


@torch.no_grad()
def test_positions_survive_bfloat16():
    """Angles are float32 even in a bfloat16 module: rounded, position 1000 would be off by radians."""
    attention, x = layer(dtype=torch.bfloat16), normal(0, 1, 1000, DIM, dtype=torch.bfloat16)
    assert_as_good(attention(x), attention, x)


@every_shape
@torch.no_grad()
def test_padding_is_not_there(shape):
    attention, x, padding = layer(shape), normal(0, 3, 20, DIM), torch.tensor([0, 3, 19])
    found = attention(x, padding=padding)
    assert_as_good(found, attention, x, padding)
    for row, start in enumerate(padding.tolist()):
        assert_as_good(found[row : row + 1, start:], attention, x[row : row + 1, start:])


@settings
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 5])], ids=["whole", "padded"])
def test_gradients_flow(padding, settings):
    attention, x = layer(**settings), normal(0, 2, 20, DIM).requires_grad_()
    inputs = [x, *attention.parameters()]
    seen = torch.ones(2, 20, 1) if padding is None else (torch.arange(20) >= padding[:, None])[..., None]

    def gradients(out):
        return torch.autograd.grad((out * seen).square().mean(), inputs)

    exact, plain = (gradients(eager(attention, x, dtype, padding)) for dtype in (torch.float64, torch.float32))
    for a, b, c in zip(gradients(attention(x, padding=padding)), plain, exact, strict=True):
        assert a.isfinite().all()
        limit = 2 * (b - c).abs().max() + 16 * unit(torch.float32) * c.abs().max()
        assert (a - c).abs().max() <= limit


def test_the_observer_sees_queries_keys_values_and_output():
    attention, seen = layer(bias=True), []
    attention.observer = lambda *tensors: seen.append([t.shape for t in tensors])
    attention(normal(0, 2, 5, DIM))
    assert seen == [[(2, 6, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 5, 6, 8)]]
    attention(normal(0, 2, 5, DIM), keep_all(8))
    assert len(seen) == 1


# With a cache -------------------------------------------------------------------------------------


@every_shape
@settings
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
@torch.no_grad()
def test_a_cache_that_keeps_all_changes_nothing(prefill, static, settings, shape):
    attention, x = layer(shape, **settings), normal(0, 2, 40, DIM)
    d = attention.head_dim
    attention.set_bases(*(random_rotation(attention.kv_heads, d, seed=seed) for seed in (1, 2)))
    room = {"static": True, "max_length": 40} if static else {}
    cache = keep_all(d, buffer=7, sinks=2, prefill=prefill, **room)
    found = torch.cat([attention(part, cache) for part in x.split([20, 1, 1, 13, 5], dim=1)], dim=1)
    # Rotating q, k and v there and the output back adds d products and sums each, next to DIM in a projection.
    assert_as_good(found, attention, x)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "each time"])
@torch.no_grad()
def test_a_cache_remembers_padding(again, static):
    attention, x, padding = layer(), normal(0, 3, 30, DIM), torch.tensor([0, 3, 9])
    cache = keep_all(8, buffer=7, sinks=2, **({"static": True, "max_length": 30} if static else {}))
    outs = [attention(x[:, :10], cache, padding=padding)]
    outs += [attention(part, cache, padding=padding if again else None) for part in x[:, 10:].split(4, dim=1)]
    assert_as_good(torch.cat(outs, dim=1), attention, x, padding)


@torch.no_grad()
def test_bfloat16_on_a_cache():
    attention, x = layer(dtype=torch.bfloat16), normal(0, 2, 40, DIM, dtype=torch.bfloat16)
    cache = keep_all(8, buffer=7, sinks=2)
    found = torch.cat([attention(part, cache) for part in x.split([20, 1, 19], dim=1)], dim=1)
    assert_as_good(found, attention, x)


def test_pruning_changes_something():
    attention, x = layer(), normal(0, 1, 40, DIM)
    cache = KVCache(LayerPlan(TopK(8, 2), TopK(8, 2)), buffer=4, prefill="windowed")
    assert (attention(x, cache) - attention(x)).abs().max() > 0.01


# Bases and state ----------------------------------------------------------------------------------


def test_state_dict_holds_the_bases():
    attention, other = layer(qk_norm=True, bias=True), SwanAttention(DIM, 6, 2, 8, qk_norm=True, bias=True)
    bases = [random_rotation(2, 8, seed=seed) for seed in (1, 2)]
    attention.set_bases(*bases)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other.key_basis, bases[0])
    assert torch.equal(other.value_basis, bases[1])
    x = normal(0, 1, 9, DIM)
    assert torch.equal(attention(x, keep_all(8)), other(x, keep_all(8)))
    assert "key_basis" in attention.state_dict()
    assert OrthoRotation(attention.key_basis).basis.shape == (2, 8, 8)


def test_refused_bases_change_nothing():
    attention, good = layer(), random_rotation(2, 8, seed=0)
    with pytest.raises(ValueError, match=r"value_basis must be \[2, 8, 8\], got \[1, 8, 8\]"):
        attention.set_bases(good, good[:1])
    with pytest.raises(ValueError, match="not orthogonal"):
        attention.set_bases(good, 2 * good)
    assert torch.equal(attention.key_basis, torch.eye(8).repeat(2, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((48, 6, 4), {}, r"heads \(6\) must be a multiple of kv_heads \(4\)"),
        ((48, 0), {}, r"heads \(0\)"),
        ((48, 6, 0), {}, r"kv_heads \(0\)"),
        ((50, 6), {}, r"dim \(50\) is not a multiple of heads \(6\); give head_dim"),
        ((48, 6, 2, 7), {}, "head_dim must be even, got 7"),
    ],
)
def test_sizes_that_do_not_divide(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        SwanAttention(*arguments, **settings)


@pytest.mark.parametrize("shape", [(5, DIM), (1, 5, DIM + 1)])
def test_forward_refuses(shape):
    with pytest.raises(ValueError, match=re.escape(f"expected x [batch, tokens, 48], got {list(shape)}")):
        layer()(torch.zeros(shape))


def test_odd_head_dim_without_rope():
    assert SwanAttention(DIM, 6, 2, 7, rope=None)(normal(0, 1, 3, DIM)).shape == (1, 3, DIM)
    assert "kv_heads=2, head_dim=7, rope=None" in repr(SwanAttention(DIM, 6, 2, 7, rope=None))
