"""Calls that users get wrong are answered with a sentence that says what to do."""

import pytest
import torch

import swan
from swan import Graded, KVCache, LayerPlan, Plan, SwanAttention, TopK, attach, calibrate, packed_attention

MODEL = torch.nn.Sequential(SwanAttention(64, heads=4))
X = torch.randn(2, 20, 64)
CALIBRATION = calibrate(MODEL, [X])
Q, K, V = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
PACKED = swan.pack(K, TopK(16, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: calibrate(MODEL, X), TypeError, r"several, such as ids.split\(1\) .* got one Tensor"),
        (lambda: calibrate(MODEL, {"x": X}), TypeError, "got one dict"),
        (lambda: calibrate(MODEL, "text"), TypeError, "got one str"),
        (lambda: packed_attention(Q, K, V), TypeError, "k must be Packed, .* got Tensor; .* dense_attention"),
        (lambda: packed_attention(Q, PACKED, V), TypeError, "v must be Packed"),
        (lambda: swan.swan_attention(Q, K, V, K, V), TypeError, "k must be Packed, .* dense_attention"),
        (lambda: KVCache(TopK(64, 32)), TypeError, r"got TopK; use LayerPlan\(keys, values\)"),
        (lambda: KVCache(Plan.for_retention(0.5, dims=[(64, 64)])), TypeError, r"got Plan; use plan.caches\(\)"),
        (lambda: LayerPlan(64, 32), TypeError, r"keys must be a layout, such as Graded.*, got 64"),
        (lambda: LayerPlan(Graded(((64, 4),)), None), TypeError, "values must be a layout"),
        (lambda: Plan.for_retention(CALIBRATION, 0.33), TypeError, "the retention comes first.*got Calibration"),
        (lambda: attach(MODEL, 0.33), TypeError, "attach takes a Calibration, or the file of one, got float"),
        (lambda: attach(MODEL, "nowhere.safetensors"), FileNotFoundError, "nowhere.safetensors"),
    ],
)  # fmt: skip
def test_is_answered(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_calibration_is_attached_by_its_file(tmp_path):
    CALIBRATION.save(tmp_path / "c.safetensors")
    attach(MODEL, str(tmp_path / "c.safetensors"))
    assert torch.equal(MODEL[0].key_basis, CALIBRATION.layers[0].key_basis)


def test_caches_of_a_plan_have_its_buffer_and_sinks():
    plan = Plan.for_retention(0.5, dims=[(16, 16)] * 3, buffer=7, sinks=2)
    caches = plan.caches(static=True, max_length=20, prefill="windowed")
    assert [cache.plan_layer for cache in caches] == list(plan.layers)
    for cache in caches:
        assert (cache.buffer.size, cache.buffer.sinks, cache.prefill, cache.max_length) == (7, 2, "windowed", 20)


def test_dir_shows_public_names_only():
    names = dir(swan)
    assert {"attach", "Graded", "Layout", "SwanCache", "__version__"} <= set(names)
    assert not {"importlib", "Any", "TYPE_CHECKING", "_LAZY", "storage", "waiting"} & set(names)
