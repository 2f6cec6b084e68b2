"""The library on a GPU that is emulated: operators, what they launch, and caches that take them by themselves."""

import itertools
import re
import warnings

import pytest
import torch

from swan import Graded, KVCache, LayerPlan, SwanCache, TopK, pack, packed_attention, swan_attention
from swan.kernels import Seen, calls, cuda
from swan.kernels.cuda import ahead, attend, device
from swan.kernels.cuda.build import file_of
from swan.kernels.cuda.device import Limits
from swan.kernels.cuda.layouts import in_room
from swan.storage import ByHead
from tests.compilers import needs_cxx
from tests.kernels.emulated import emulated  # noqa: F401
from tests.stateful.layouts import heads_of
from tests.strategies import assert_packed, normal
from tests.tiny import attached, logits_of
from tests.tiny import tokens as text

pytestmark = needs_cxx
BF16 = torch.bfloat16
PLAN = LayerPlan(Graded(((16, 5), (16, 3), (32, 1))), Graded(((16, 3), (48, 2))))
LEADING = LayerPlan(Graded.leading(64, 32), Graded(((16, 16), (48, 0))))
HEADS, KV_HEADS = 4, 2


def tokens(seed: int, count: int, batch: int = 1, dtype: torch.dtype = BF16):
    q = normal(seed, batch, HEADS, count, 64).to(dtype)
    return q, *normal(seed + 1, 2, batch, KV_HEADS, count, 64).to(dtype)


def assert_like(found, expected, relative=0.02):
    """Within the roundings of a dtype of two bytes and of the kernel, as norms; rows that see nothing are equal."""
    error = (found.double() - expected.double()).norm(dim=-1)
    assert (error <= relative * expected.double().norm(dim=-1)).all(), error.max()


def step(cache, q, k, v, **masks):
    """A step by the kernels, and what the reference makes of the same tokens in the cache."""
    padding = masks.pop("padding", None)
    visible = cache.update(k, v, padding=padding)
    return cache.attend(q, visible, **masks), cache.attend(q, visible, impl="reference", **masks)


def assert_history(cache, given, tokens):
    """The tokens after the sinks are stored, which kernels mix in float32; `given`: keys and values of each call."""
    columns = slice(2, 2 + tokens)
    for history, parts in zip((cache.state.k_history, cache.state.v_history), zip(*given, strict=True), strict=True):
        x, stored = torch.cat(parts, dim=2)[:, :, columns], history.tokens(0, tokens)
        heads = heads_of(stored) if isinstance(stored.format, ByHead) else [stored]
        for found, of_head in zip(heads, x.chunk(len(heads), dim=1), strict=True):
            matrix = found.format.mix(x.dtype, x.device)
            mixed = of_head.double() if matrix is None else of_head.double() @ matrix.double()
            assert_packed(found, of_head, mixed, found.format.d * 2.0**-23 * mixed.abs().amax(-1, keepdim=True))


CACHES = {
    "dynamic": {},
    "windowed": {"prefill": "windowed"},
    "static": {"static": True, "max_length": 150},
    "static windowed": {"static": True, "max_length": 150, "prefill": "windowed"},
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES.keys())
def test_a_cache(emulated, settings, padded):  # noqa: F811
    """A prompt, chunks and steps: outputs are those of the reference, and bytes may be what they are."""
    batch, given = 2, []
    padding = torch.tensor([0, 7]) if padded else None
    cache, twin = (KVCache(PLAN, buffer=16, sinks=2, **settings) for _ in range(2))
    for seed, count in enumerate((40, 1, 9, 1, 1, 20, 1)):
        q, k, v = tokens(seed, count, batch)
        found, expected = step(cache, q, k, v, padding=padding)
        rows = slice(7, None) if padded and seed == 0 else slice(None)  # outputs at padding mean nothing
        assert_like(found[:, :, rows], expected[:, :, rows])
        twin.update(k, v, padding=padding, impl="compiled")
        given.append((k, v))
        padding = None
    assert cache.history_length == twin.history_length == 73 - 16 - 2
    assert_history(cache, given, 55)
    assert torch.equal(cache.state.k_recent, twin.state.k_recent)
    assert torch.equal(cache.state.v_recent, twin.state.v_recent)
    assert {name for name, _ in emulated.done} >= {"take_in", "take_in_many", "attend"}


@pytest.mark.parametrize("settings", [CACHES["windowed"], CACHES["static"]], ids=["windowed", "static"])
def test_a_cache_whose_heads_differ(emulated, settings):  # noqa: F811
    """Each pair of layouts has launches of its own, masks by head and bytes are those of its heads."""
    plan = LayerPlan(ByHead((PLAN.keys, LEADING.keys)), ByHead((LEADING.keys, PLAN.values)))
    cache, given = KVCache(plan, buffer=16, sinks=2, **settings), []
    for seed, count in enumerate((40, 1, 9, 1)):
        q, k, v = tokens(seed, count, 2)
        mask = normal(seed + 9, 1, HEADS, count, cache.length + count) < 1
        found, expected = step(cache, q, k, v, mask=mask)
        assert_like(found, expected)
        given.append((k, v))
    assert_history(cache, given, 33)


def test_a_cache_with_masks(emulated):  # noqa: F811
    cache = KVCache(PLAN, buffer=16, sinks=2)
    cache.update(*tokens(0, 40, 2)[1:])
    mask = torch.rand(2, 1, 3, 43, generator=torch.Generator().manual_seed(0)) > 0.4
    assert_like(*step(cache, *tokens(1, 3, 2), mask=mask & torch.ones(3, 43, dtype=torch.bool).tril(40)))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_layouts_of_16_bits(emulated, dtype):  # noqa: F811
    cache = KVCache(LEADING, buffer=16, sinks=2)
    for seed, count in enumerate((40, 1, 1)):
        found, expected = step(cache, *tokens(seed, count, dtype=dtype))
        assert_like(found, expected)


def test_caches_of_float32(emulated):  # noqa: F811
    """The history by the kernel, recent tokens by torch."""
    cache = KVCache(PLAN, buffer=16, sinks=2)
    for seed, count in enumerate((40, 1, 1)):
        found, expected = step(cache, *tokens(seed, count, dtype=torch.float32))
        assert_like(found, expected, 0.005)
    assert ("attend", (1, 2, 1)) in emulated.done


def test_an_eager_step_takes_two_launches_and_in_a_graph_three(emulated, monkeypatch):  # noqa: F811
    cache = KVCache(PLAN, buffer=16, sinks=2)
    cache(*tokens(0, 60))
    emulated.done.clear()
    cache(*tokens(1, 1))
    assert [name for name, _ in emulated.done] == ["take_in", "attend"]
    monkeypatch.setattr(attend, "arrivals", lambda index, count: None)  # a stream that is being captured
    emulated.done.clear()
    assert_like(*step(cache, *tokens(2, 1)))
    assert [name for name, _ in emulated.done] == ["take_in", "attend", "merge"]


def test_many_query_rows_take_tiles(emulated, monkeypatch):  # noqa: F811
    """Their keys and values are unpacked by a kernel."""
    q, k, v = tokens(0, 80)
    k, v = pack(k, PLAN.keys), pack(v, PLAN.values)
    monkeypatch.setattr(cuda, "MOST_ROWS", 100)
    found = packed_attention(q, k, v)
    assert {name for name, _ in emulated.done} == {"pack", "unpack"}
    assert_like(found, packed_attention(q, k, v, impl="reference"))


@pytest.mark.parametrize("layout", [PLAN.keys, LEADING.values, Graded(((13, 5), (20, 6), (3, 0), (28, 16)))], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_packing_and_back(emulated, layout, dtype):  # noqa: F811
    x = normal(0, 2, 2, 37, 64).to(dtype)
    packed = pack(x, layout)
    mix = layout.mix(dtype, x.device)
    mixed = x.double() if mix is None else x.double() @ mix.double()
    assert_packed(packed, x, mixed, 64 * 2.0**-23 * mixed.abs().amax(-1, keepdim=True))
    torch.testing.assert_close(calls.restore(packed), layout.unpack(packed), rtol=2.0**-22, atol=0)
    assert [name for name, _ in emulated.done] == ["pack", "unpack"]
    assert pack(x[:, :, :0], layout).shape == (2, 2, 0, 64)


def test_what_is_not_aligned_is_copied(emulated):  # noqa: F811
    """Packs without room for whole tiles, views in the middle of others, and queries and tokens of any strides."""
    q, k, v = tokens(0, 90)
    k, v = pack(k, PLAN.keys, impl="compiled"), pack(v, PLAN.values, impl="compiled")
    cut = [packed.tokens(5, 50) for packed in (k, v)]
    q = q[:, :, 70:].transpose(2, 3).contiguous().transpose(2, 3)[:, :, 3:5]
    recent = [t.transpose(2, 3).contiguous().transpose(2, 3)[:, :, 1:] for t in tokens(1, 9)[1:]]
    mask = (torch.rand(45, 2, 4, 1, generator=torch.Generator().manual_seed(0)) > 0.4).permute(3, 2, 1, 0)
    for history in ((k, v), cut):
        seen = mask if history is cut else None
        arguments = q, *history, *recent
        found = swan_attention(*arguments, history_mask=seen)
        assert_like(found, swan_attention(*arguments, history_mask=seen, impl="reference"))


def test_what_is_aligned_is_not_copied():
    x = torch.zeros(2, 3, 128, 20, dtype=torch.uint8)
    assert in_room(x, 128) is x and in_room(x, 100) is x
    view = x[:, :, :100]
    assert in_room(view, 100) is view
    past = torch.zeros(2, 3, 100, 16, dtype=torch.uint8)  # of its last head no whole tile is there
    for other in (past, x[:, :, :, :12], x[:, :, 1:], x[:, :, :100].contiguous()[:, :, :97].contiguous()):
        copy = in_room(other, other.shape[2])
        assert copy is not other and torch.equal(copy[:, :, : other.shape[2]], other) and copy.shape[2] % 32 == 0


def test_numbers_of_what_is_seen(emulated):  # noqa: F811
    q, k, v = tokens(0, 90, 2)
    k, v = pack(k, PLAN.keys), pack(v, PLAN.values)
    first, end = torch.tensor([3, 40]), torch.tensor([70, 12, 105])
    strided = [torch.stack([t, t + 1000], 1)[:, 0] for t in (first, end)]
    one_for_all = Seen(first[1:], None, 0), Seen(None, end[:1], 10), Seen(first[1], end[1], 10)
    for seen in (Seen(first, end, 10), Seen(first, None, 0), Seen(*strided, 10), *one_for_all):
        found, lse = packed_attention(q[:, :, :3], k, v, mask=seen, return_lse=True)
        expected, other = packed_attention(q[:, :, :3], k, v, mask=seen, impl="reference", return_lse=True)
        assert_like(found, expected)
        assert torch.equal(lse.isinf(), other.isinf())


def test_nothing_to_see(emulated):  # noqa: F811
    q, k, v = tokens(0, 1)
    empty = [pack(t[:, :, :0], layout) for t, layout in ((k, PLAN.keys), (v, PLAN.values))]
    out, lse = packed_attention(q, *empty, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    assert emulated.done == []


def test_operators_say_what_they_return(emulated):  # noqa: F811
    """What compiled code assumes of them: shapes, dtypes, strides, and which arguments they write."""
    q, k, v = tokens(0, 1)
    cache = KVCache(PLAN, buffer=16, sinks=2)
    cache(*tokens(3, 50))
    functions, seen = dict(cuda.FUNCTIONS), []

    def checked(name):
        def call(*arguments):
            if name not in seen:
                seen.append(name)
                copies = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
                operator = getattr(torch.ops.swan, f"{name}_cuda").default
                torch.library.opcheck(operator, copies, test_utils=("test_schema", "test_faketensor"))
            return functions[name](*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in functions:
            patch.setitem(cuda.FUNCTIONS, name, checked(name))
        cache(q, k, v)
        calls.restore(pack(k, PLAN.keys))
    assert sorted(seen) == ["attend", "pack", "take_in", "unpack"]


def test_a_compiled_step(emulated):  # noqa: F811
    """One graph for all steps of a static cache: its operators are those of eager code."""
    torch._dynamo.reset()
    caches = [KVCache(PLAN, buffer=16, sinks=2, static=True, max_length=100) for _ in range(2)]
    for cache in caches:
        cache(*tokens(0, 40))
    step = torch.compile(caches[0], fullgraph=True)
    emulated.done.clear()
    for i in range(4):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = step(*tokens(i + 1, 1))
        assert_like(found, caches[1](*tokens(i + 1, 1)), 1e-3)
    assert [name for name, _ in emulated.done] == ["take_in", "attend", "merge", "take_in", "attend"] * 4
    torch._dynamo.reset()


def test_what_the_kernels_do_not_read_is_slow_and_says_so_once(emulated):  # noqa: F811
    q, k, v = tokens(0, 40)
    cuda._say_slow_once.cache_clear()
    layouts = TopK(64, 20), Graded(((8, 5), (56, 3)))
    for layout, times in itertools.product(layouts, (1, 0)):
        packed = [pack(t, layout, impl="compiled") for t in (k, v)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            packed_attention(q[:, :, :1], *packed)
        assert len(caught) == times
        if caught:
            assert "impl='cuda' attends to Graded layouts of groups of 16, 32" in str(caught[0].message)
            assert "hundreds of times as long as dense attention" in str(caught[0].message)
        with pytest.raises(ValueError, match="attends to Graded layouts of groups of 16, 32"):
            packed_attention(q[:, :, :1], *packed, impl="cuda")
    assert {name for name, _ in emulated.done} == {"unpack"}


def test_a_gpu_that_cannot_have_them_says_so_once(monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda device=None: "the GPU has compute capability 7.5, the kernels need 8.0")
    cuda._built_once.cache_clear(), cuda._say_slow_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"were not built: the GPU has .* uses tensor code on this GPU") as caught:
        assert not cuda.built(torch.device("cpu")) and not cuda.built(torch.device("cpu"))
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match=r"compute capability 7.5.*cuda-core"):
        cuda.require(torch.device("cpu"))
    cuda._built_once.cache_clear()


def test_kernels_of_many_layers_are_compiled_once_and_at_once(emulated, monkeypatch, tmp_path, capfd):  # noqa: F811
    compiled = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "arch_of", lambda index: "sm_90")

    def compile_one(source, defines, arch):
        compiled.append((source.name, defines["K_GROUPS"], arch))
        file_of(source, defines, arch).touch()

    monkeypatch.setattr(ahead, "compiled", compile_one)
    layers = [PLAN, PLAN, LayerPlan(PLAN.values, PLAN.keys), LayerPlan(TopK(64, 20), TopK(64, 20))]
    for _ in range(2):
        cuda.compile_ahead(layers, BF16, torch.device("cpu", 0))
    assert len(compiled) == 4
    cuda.compile_ahead(layers, BF16, torch.device("cpu", 0), page=64)  # other files attend, the same pack
    assert [name for name, *_ in compiled[4:]] == ["attend.cu"] * 2
    del compiled[4:]
    groups = ["{{16,3},{48,2}}", "{{16,5},{16,3},{32,1}}"]
    assert sorted(compiled) == [(name, each, "sm_90") for name in ("attend.cu", "pack.cu") for each in groups]
    assert re.fullmatch(r"swan: compiled 4 files in \d+ s\nswan: compiled 2 files in \d+ s\n", capfd.readouterr().err)


def test_a_cache_of_transformers_compiles_ahead(emulated, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(cuda, "built", lambda device: False)  # tensor code computes
    model = attached(num_hidden_layers=2)
    monkeypatch.setattr(cuda, "compile_ahead", lambda layers, dtype, device: asked.append((len(layers), dtype)))
    cache = SwanCache(model, retention=0.33)
    for _ in range(2):
        logits_of(model, cache, input_ids=text(1, 9))
    cache.retention = 0.5
    logits_of(model, cache, input_ids=text(1, 1))
    assert asked == [(2, torch.float32)] * 2


# Geometry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [Limits(132, 228 * 1024), Limits(108, 164 * 1024), Limits(128, 100 * 1024)], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("d", [16, 64, 128, 256])
def test_programs_fit_on_every_gpu(limits, bits, d, monkeypatch):
    monkeypatch.setattr(attend, "limits", lambda index: limits)
    attend.pair_of.cache_clear()
    pair = attend.pair_of(((d, bits),), ((d, bits),), BF16, 0)
    attend.pair_of.cache_clear()
    assert pair.attend.shared + device.RESERVED <= limits.shared
    assert pair.programs >= limits.processors and pair.attend.threads == pair.warps * 32
    if d <= 128 and bits <= 4:
        assert pair.programs >= 2 * limits.processors


def test_splits_fill_the_gpu_but_give_each_warp_a_tile():
    assert attend._splits(32768, 4, 528 // 8) == 66
    assert attend._splits(32768, 4, 528 // 64) == 8
    assert attend._splits(32768, 4, 0) == 1
    assert attend._splits(300, 4, 66) == 3 and attend._splits(0, 4, 66) == 0


def test_counters_are_kept_by_stream_and_not_in_graphs(monkeypatch):
    zeros, stream = torch.zeros, [1]
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **others: zeros(*shape, **others))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream[0] is None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream[0], raising=False)
    monkeypatch.setattr(device, "_arrivals", {})
    one = device.arrivals(0, 10)
    assert one is not None and device.arrivals(0, 500) is one and len(one) >= 500
    assert device.arrivals(1, 10) is not one
    more = device.arrivals(0, 5000)
    assert more is not None and len(more) >= 5000 and device.arrivals(0, 10) is more
    stream[0] = 2
    assert device.arrivals(0, 10) is not more
    stream[0] = None
    assert device.arrivals(0, 10) is None
