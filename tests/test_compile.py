"""Everything public compiles whole (no graph break), means the same, and a static decode compiles once."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from swan import (
    Graded,
    KVCache,
    LayerPlan,
    OrthoRotation,
    StructuredPruner,
    SwanAttention,
    TopK,
    dense_attention,
    fold_value_rotation,
    graded_prune,
    inverse_rotate,
    merge_attention,
    pack,
    packed_attention,
    random_rotation,
    rotate,
    swan_attention,
    topk_prune,
    unpack,
)
from swan.modules.buffer import StaticBuffer
from tests.compilers import needs_cxx
from tests.strategies import (
    U32,
    assert_within,
    attention_bound,
    normal,
    one_thread,  # noqa: F401
    qkv,
)

D = 16
TOPK, INDEX, GRADED = TopK(D, 6), TopK(D, 6, positions="index"), Graded(((4, 16), (8, 0), (4, 16)))
PLAN = LayerPlan(TOPK, GRADED)
slow = pytest.mark.slow
dynamic_or_not = pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(tokens: int, queries: int = 3):
    return qkv(0, 2, (4, 2), queries, tokens, D, D, torch.float32)


def history(tokens: int):
    return tuple(pack(t, layout) for t, layout in zip(inputs(tokens)[1:], (TOPK, GRADED), strict=True))


def mask(queries: int, tokens: int):
    return (torch.arange(tokens) % 3 > 0).expand(1, 1, queries, tokens)


BASIS = random_rotation(2, D, seed=0)
FUNCTIONS = {
    "rotate": lambda n: (rotate, (inputs(n)[0], BASIS)),
    "inverse_rotate": lambda n: (inverse_rotate, (inputs(n)[0], BASIS)),
    "random_rotation": lambda n: (lambda x: x @ random_rotation(2, D, seed=0), (inputs(n)[1],)),
    "fold_value_rotation": lambda n: (
        fold_value_rotation,
        (normal(0, 2 * D, n), normal(1, n, 4 * D), BASIS, normal(2, 2 * D)),
    ),
    "topk_prune": lambda n: (lambda x: topk_prune(x, 6), (inputs(n)[1],)),
    "graded_prune": lambda n: (lambda x: graded_prune(x, GRADED.groups), (inputs(n)[1],)),
    "pack topk": lambda n: (lambda x: pack(x, TOPK), (inputs(n)[1],)),
    "pack index": lambda n: (lambda x: pack(x, INDEX), (inputs(n)[1],)),
    "pack graded": lambda n: (lambda x: pack(x, GRADED), (inputs(n)[1],)),
    "unpack topk": lambda n: (unpack, (pack(inputs(n)[1], TOPK),)),
    "unpack index": lambda n: (unpack, (pack(inputs(n)[1], INDEX),)),
    "unpack graded": lambda n: (unpack, (pack(inputs(n)[1], GRADED),)),
    "dense_attention": lambda n: (dense_attention, inputs(n)),
    "dense_attention causal": lambda n: (lambda q, k, v: dense_attention(q, k, v, causal=True), inputs(n)),
    "dense_attention lse": lambda n: (
        lambda q, k, v, mask: dense_attention(q, k, v, mask=mask, return_lse=True),
        (*inputs(n), mask(3, n)),
    ),
    "dense_attention compiled": lambda n: (
        lambda q, k, v, mask: dense_attention(q, k, v, mask=mask, impl="compiled"),
        (*inputs(n), mask(3, n)),
    ),
    "packed_attention": lambda n: (packed_attention, (inputs(n)[0], *history(n))),
    "packed_attention over tiles": lambda n: (packed_attention, (inputs(n)[0], *history(1100 + n))),
    "merge_attention": lambda n: (
        lambda *parts: merge_attention([parts[:2], parts[2:]]),
        tuple(t for i in (1, 2) for t in dense_attention(*inputs(n * i), return_lse=True)),
    ),
    "swan_attention": lambda n: (
        lambda q, kh, vh, k, v, mask: swan_attention(q, kh, vh, k, v, history_mask=mask),
        (inputs(n)[0], *history(n), *inputs(5)[1:], mask(3, n)),
    ),
    "OrthoRotation": lambda n: (OrthoRotation(BASIS), (inputs(n)[0],)),
    "OrthoRotation inverse": lambda n: (OrthoRotation(BASIS).inverse, (inputs(n)[0],)),
    "StructuredPruner": lambda n: (StructuredPruner(TOPK), (inputs(n)[1],)),
    "SwanAttention": lambda n: (LAYER, (normal(0, 2, n, 32),)),
    "SwanAttention padded": lambda n: (
        lambda x, padding: LAYER(x, padding=padding),
        (normal(0, 2, n, 32), torch.tensor([0, 2])),
    ),
}
LAYER = SwanAttention(32, 4, 2, D).requires_grad_(False)
LAYER.set_bases(BASIS, random_rotation(2, D, seed=1))


def assert_equal(found, expected):
    found, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


LONG = ("packed_attention", "packed_attention over tiles", "swan_attention")  # to trace, when every size is a symbol


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param(name, dynamic, marks=slow if dynamic == (name in LONG) else (), id=f"{name}-{dynamic}")
        for name in FUNCTIONS
        for dynamic in (False, True)
    ],
)
def test_compiles_whole(name, dynamic):
    function, _ = FUNCTIONS[name](7)
    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=dynamic)
    for tokens in (7, 13) if dynamic else (7,):
        arguments = FUNCTIONS[name](tokens)[1]
        assert_equal(compiled(*arguments), function(*arguments))


@dynamic_or_not
def test_mixing_matrices_are_inputs_of_the_graph(dynamic):
    """Several in one graph, not built in it; and it stays good when others are made elsewhere."""
    first, second = Graded(((8, 5), (8, 3))), Graded(((16, 4),))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def function(q, k, v):
        return swan_attention(q, pack(k, first), pack(v, second), k, v)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    assert_equal(compiled(*inputs(7)), function(*inputs(7)))
    pack(inputs(7)[1], Graded(((12, 6), (4, 1))))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*inputs(7))
    names = [str(node.target).lower() for node in graphs[0].graph.nodes]
    assert len([name for name in names if "mixes" in name]) == 2
    assert not [name for name in names if "block_diag" in name or "kron" in name or "eye" in name]


# Caches -------------------------------------------------------------------------------------------


def step_cache(cache, q, k, v):
    return cache(q, k, v)


def static_cache(prefill="windowed", plan_layer=PLAN) -> KVCache:
    return KVCache(plan_layer, buffer=8, sinks=2, prefill=prefill, static=True, max_length=64)


@dynamic_or_not
def test_a_static_buffer_compiles(dynamic):
    k, v = inputs(30)[1:]
    plain, buffer = StaticBuffer(4, 2), StaticBuffer(4, 2)
    push = torch.compile(buffer.push, fullgraph=True, backend="eager", dynamic=dynamic)
    for part in (slice(3), slice(3, 4), slice(4, 30)):
        assert_equal(push(k[:, :, part], v[:, :, part]), plain.push(k[:, :, part], v[:, :, part]))
    columns = torch.compile(buffer.columns, fullgraph=True, backend="eager", dynamic=dynamic)
    assert_equal(columns(), plain.columns())


@slow
@dynamic_or_not
@pytest.mark.parametrize("plan_layer", [PLAN, None], ids=["packed", "window"])
@pytest.mark.parametrize("prefill", ["chunk", "windowed"])
def test_a_static_cache_compiles(prefill, plan_layer, dynamic):
    q, k, v = qkv(0, 2, (4, 2), 40, 40, D, D, torch.float32)
    plain, cache = static_cache(prefill, plan_layer), static_cache(prefill, plan_layer)
    step = torch.compile(step_cache, fullgraph=True, backend="eager", dynamic=dynamic)
    for part in (slice(11), slice(11, 12), slice(12, 40)):  # empty, one token, a chunk
        arguments = q[:, :, part], k[:, :, part], v[:, :, part]
        # Not equal: code that is not compiled sees that the cache is empty, and takes a plain causal kernel.
        assert_within(step(cache, *arguments), step_cache(plain, *arguments), 2 * attention_bound(q, k, v))


@slow
@dynamic_or_not
def test_attention_on_a_static_cache_compiles(dynamic):
    x, plain, cache = normal(0, 2, 40, 32), static_cache(), static_cache()
    compiled = torch.compile(LAYER, fullgraph=True, backend="eager", dynamic=dynamic)
    for part in (slice(11), slice(11, 12), slice(12, 40)):
        assert_equal(compiled(x[:, part], cache), LAYER(x[:, part], plain))


@dynamic_or_not
def test_a_static_decode_compiles_once(dynamic):
    """While the buffer fills, while the sinks are still in it, and when tokens leave it."""
    x, plain, cache, counter = normal(0, 2, 40, 32), static_cache(), static_cache(), CompileCounter()
    for each in (plain, cache):
        LAYER(x[:, :5], each)
    step = torch.compile(LAYER, fullgraph=True, backend=counter, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(5, 25):
            assert_equal(step(x[:, i : i + 1], cache), LAYER(x[:, i : i + 1], plain))
    assert counter.frame_count == 1
    assert cache.length == 25


# With the real compiler ---------------------------------------------------------------------------


@pytest.fixture
def uninitialized_as_it_is():
    """Inductor's code does not know NaN filling (tests/conftest.py)."""
    torch.use_deterministic_algorithms(False)


@needs_cxx
@slow
def test_inductor_packs_and_attends(uninitialized_as_it_is):
    q, k, v = inputs(70)

    def function(q, k, v):
        return swan_attention(q, pack(k, TOPK), pack(v, INDEX), k[:, :, :5], v[:, :, :5], impl="compiled")

    bound = attention_bound(q, *(torch.cat([unpack(pack(t, TOPK)), t], dim=2) for t in (k, v)))
    assert_within(torch.compile(function, fullgraph=True)(q, k, v), function(q, k, v), 2 * bound)


@needs_cxx
def test_inductor_packs_what_eager_code_packs(uninitialized_as_it_is):
    """To the bit: a scale that is not rounded before it divides would move codes by a step. And it can be cached."""
    counters.clear()
    caches = [KVCache(LayerPlan(TopK(64, 26), TopK(64, 26)), buffer=8, static=True, max_length=64) for _ in range(2)]
    q, k, v = qkv(0, 1, (2, 2), 50, 50, 64, 64, torch.float32)
    compiled_step = torch.compile(step_cache, fullgraph=True)
    for part in (slice(20), *(slice(t, t + 1) for t in range(20, 50))):
        for cache, step in zip(caches, (step_cache, compiled_step), strict=True):
            (step if part.start else step_cache)(cache, q[:, :, part], k[:, :, part], v[:, :, part])
    for plain, compiled in zip(*(cache.tensors for cache in caches), strict=True):
        assert_equal(compiled, plain)
    found = counters["aot_autograd"]
    assert found["total"] == 1 and not found["autograd_cache_bypass"]


@needs_cxx
@slow
def test_inductor_decodes_on_a_static_cache(uninitialized_as_it_is):
    plan_layer = LayerPlan(TopK(D, 6, bits=16), GRADED)  # a rounding may not move a value to another step of int8
    x, plain, cache = normal(0, 2, 40, 32), static_cache(plan_layer=plan_layer), static_cache(plan_layer=plan_layer)
    for each in (plain, cache):
        LAYER(x[:, :5], each)
    step = torch.compile(LAYER, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, expected = (
            torch.cat([function(x[:, i : i + 1], each) for i in range(5, 40)], dim=1)
            for function, each in ((step, cache), (LAYER, plain))
        )
    # Sums of 32, 16, up to 40, 16 and 64 terms in a row, each in another order, and scores below 3 in an exponent.
    assert_within(found, expected, 2 * (32 + 16 + 40 + 16 + 64 + 2 * 3 * (32 + 16)) * U32 * expected.abs().max())
