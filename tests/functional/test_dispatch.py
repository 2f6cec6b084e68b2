"""Every `impl` is one of those that there are, and never becomes another."""

from types import SimpleNamespace

import pytest
import torch

from swan import Graded, KVCache, LayerPlan, TopK, dense_attention, pack, packed_attention, swan_attention
from swan.functional import dispatch, reference
from swan.kernels import cpu
from tests.compilers import needs_cxx
from tests.strategies import assert_within, attention_bound

LAYOUT = Graded(((16, 4),))
Q, K = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16)
PACKED = pack(K, LAYOUT)
PLAN = LayerPlan(LAYOUT, LAYOUT)


def filled() -> KVCache:
    cache = KVCache(PLAN, buffer=4)
    cache.update(K, K)
    return cache


@pytest.mark.parametrize(
    "call",
    [
        lambda impl: dense_attention(Q, K, K, impl=impl),
        lambda impl: packed_attention(Q, PACKED, PACKED, impl=impl),
        lambda impl: swan_attention(Q, PACKED, PACKED, K, K, impl=impl),
        lambda impl: swan_attention(Q, None, None, K, K, impl=impl),
        lambda impl: pack(K, LAYOUT, impl=impl),
        lambda impl: filled().update(K, K, impl=impl),
        lambda impl: filled()(torch.randn(1, 4, 9, 16), K, K, impl=impl),
        lambda impl: KVCache(None).update(K, K, impl=impl),
    ],
    ids=["dense", "packed", "swan", "swan without history", "pack", "update", "call", "update of a window"],
)
def test_an_unknown_one_is_refused_with_the_list(call):
    with pytest.raises(ValueError, match=r"impl of \w+ must be one of auto, .*compiled.*, got 'nonsense'"):
        call("nonsense")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dense_attention(Q, K, K, impl="cpp"),
            "must be one of auto, reference, sdpa, flex, compiled, got 'cpp'",
        ),
        (lambda: pack(K, LAYOUT, impl="sdpa"), "must be one of auto, compiled, cpp, cuda, got 'sdpa'"),
        (lambda: packed_attention(Q, PACKED, PACKED, impl="flex"), "cannot read packed tensors"),
        (lambda: swan_attention(Q, None, None, K, K, impl="cpp"), "there is no history; use impl='auto'"),
        (lambda: swan_attention(Q, None, None, K, K, impl="cuda"), "there is no history; use impl='auto'"),
        (lambda: packed_attention(Q, PACKED, PACKED, impl="cuda"), "needs tensors on an NVIDIA GPU, these are on cpu"),
        (lambda: pack(K, LAYOUT, impl="cuda"), "needs tensors on an NVIDIA GPU, these are on cpu"),
        (lambda: pack(K, LAYOUT, impl="triton"), "impl='triton' is gone: .* whose name is impl='cuda'"),
        (lambda: packed_attention(Q, PACKED, PACKED, impl="triton"), "impl='triton' is gone"),
        (lambda: pack(K, TopK(16, 4), impl="cpp"), "packs Graded layouts"),
    ],
)
def test_an_impossible_one_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.update(K, K, impl="nonsense"),
        lambda cache: cache(torch.randn(1, 4, 9, 16), K, K, impl="nonsense"),
        lambda cache: cache(torch.randn(1, 4, 9, 16), K, K, impl="flex"),
    ],
)
def test_a_refused_call_changes_nothing(call):
    cache = filled()
    before = [t.clone() for t in cache.tensors]
    with pytest.raises(ValueError, match=r"got 'nonsense'|cannot read packed tensors"):
        call(cache)
    assert cache.length == 9
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors, before, strict=True))


@needs_cxx
def test_auto_follows_its_table():
    cpu.build()
    assert dispatch.dense_impl("auto", Q, K, K, masked=False, return_lse=False) == "sdpa"
    assert dispatch.dense_impl("auto", Q.double(), K.double(), K.double(), masked=False, return_lse=True) == "compiled"
    assert dispatch.packed_impl("auto", Q, PACKED, PACKED) == "cpp"
    assert dispatch.packed_impl("auto", torch.randn(1, 4, 9, 16), PACKED, PACKED) == "auto"  # 18 rows: tiles
    assert dispatch.packed_impl("auto", Q.clone().requires_grad_(), PACKED, PACKED) == "auto"
    assert dispatch.pack_impl("auto", K, LAYOUT) == "cpp"
    assert dispatch.pack_impl("auto", K, TopK(16, 4)) == "compiled"
    assert dispatch.pack_impl("auto", K.double(), LAYOUT) == "compiled"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_a_log_sum_exp_of_sdpa_on_a_gpu_is_flash_attention_of_ampere_and_newer(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def gives(d, dv, dtype, masked=False):
        q, v = (SimpleNamespace(device=torch.device("cuda", 0), shape=(1, 2, 3, n), dtype=dtype) for n in (d, dv))
        return dispatch.sdpa_gives_lse(q, v, masked)

    assert gives(64, 64, torch.bfloat16) == gives(128, 128, torch.float16) == (capability >= (8, 0))
    assert not gives(64, 64, torch.float32) and not gives(64, 32, torch.bfloat16)
    assert not gives(64, 64, torch.bfloat16, masked=True) and not gives(20, 20, torch.bfloat16)


def test_a_cache_that_has_no_history_yet_attends_densely():
    q = torch.randn(1, 4, 9, 16)
    expected, _ = reference.dense_attention(q.double(), K.double(), K.double(), causal=True)
    for impl in ("cpp", "auto"):
        assert_within(KVCache(PLAN, buffer=32)(q, K, K, impl=impl), expected, attention_bound(q, K, K))


def test_what_packs_is_chosen_when_something_is_packed(monkeypatch):
    """The kernel may have to be compiled first, which a prompt shorter than the buffer does not wait for."""
    monkeypatch.setattr(cpu, "built", lambda _: pytest.fail("nothing is packed yet"))
    cache = KVCache(PLAN, buffer=32)
    cache(torch.randn(1, 4, 9, 16), K, K)
