"""`attach` and `detach` on every architecture: exact at k = d, undone bit for bit, refused with a reason."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from swan import KVCache, Plan, SwanCache, attach, calibrate, detach
from swan.integrations.architectures import ARCHITECTURES as KNOWN
from swan.integrations.transformers import cache_keyword, is_attached
from tests.matrix import REFUSED, model_type
from tests.tiny import (
    ARCHITECTURES,
    FORGETFUL,
    assert_unchanged,
    attached,
    calibration_of,
    everything,
    float32_bound,
    greatest_difference,
    left_padded,
    logits_of,
    snapshot,
    tiny,
    tokens,
)

SUPPORTED = [architecture for architecture in ARCHITECTURES if architecture not in REFUSED]
FOLDABLE = [architecture for architecture in SUPPORTED if KNOWN[model_type(architecture)].fold]
each_architecture = pytest.mark.parametrize("architecture", SUPPORTED)


# Without pruning an attached model is the model ---------------------------------------------------


@each_architecture
def test_without_a_swan_cache_logits_are_those_of_sdpa(architecture):
    model, inputs, chunk = tiny(architecture), left_padded(30, 12), None if architecture in FORGETFUL else 7
    assert model.config._attn_implementation == "sdpa"
    before = logits_of(model, **inputs), logits_of(model, DynamicCache(config=model.config), chunk, **inputs)
    attach(model, calibration_of(model))
    after = logits_of(model, **inputs), logits_of(model, DynamicCache(config=model.config), chunk, **inputs)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


@each_architecture
@pytest.mark.parametrize("chunk", [None, 7, 1], ids=["one pass", "chunks", "token by token"])
def test_a_cache_that_keeps_everything_is_exact(architecture, chunk):
    model, inputs = attached(architecture), left_padded(30, 12)
    real = inputs["attention_mask"].bool()
    if chunk == 7 and architecture in FORGETFUL:
        pytest.xfail("this version of transformers is wrong here with its own cache")
    cached = logits_of(model, everything(model), chunk=chunk, **inputs)
    assert greatest_difference(cached[real], logits_of(model, **inputs)[real]) < float32_bound(model, **inputs)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "olmo2"])
@pytest.mark.parametrize("fold", [False, True], ids=["at run time", "folded"])
def test_pruning_is_in_the_calibrated_basis(architecture, fold):
    """The same cache with axes for a basis is far from it; folded values are pruned in the same basis."""
    model, inputs = attached(architecture), {"input_ids": tokens(1, 60)}
    settings = {"retention": 0.33, "buffer": 8, "sinks": 2, "prefill": "windowed"}
    expected = logits_of(model, SwanCache(model, **settings), **inputs)
    other = tiny(architecture)
    attach(other, calibration_of(other), fold=fold)
    same = greatest_difference(logits_of(other, SwanCache(other, **settings), **inputs), expected)
    detach(other)
    attach(other, calibration_of(other).with_basis("identity"))
    axes = greatest_difference(logits_of(other, SwanCache(other, **settings), **inputs), expected)
    assert same == 0 if not fold else same < axes / 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype):
    """The cache may add what this dtype itself costs against float32, four times (`float32_bound`)."""
    exact, inputs = tiny(), {"input_ids": tokens(1, 30)}
    calibration = calibration_of(exact)
    model = copy.deepcopy(exact).to(dtype)
    error = greatest_difference(logits_of(model, **inputs).float(), logits_of(exact, **inputs))
    attach(model, calibration)
    cache = everything(model)
    cached = logits_of(model, cache, chunk=7, **inputs)
    assert cached.dtype == dtype
    assert greatest_difference(cached.float(), logits_of(exact, **inputs)) < 4 * error
    assert {t.dtype for kv in cache.winnowed.values() for t in kv.tensors if t.is_floating_point()} == {dtype}


# Folding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FOLDABLE)
def test_folding_leaves_the_logits(architecture):
    model, inputs = tiny(architecture), left_padded(30, 12)
    bound, before = float32_bound(model, **inputs), logits_of(model, **inputs)
    weights = snapshot(model)["weights"]
    attach(model, calibration_of(model), fold=True)
    changed = {name.rsplit(".", 2)[1] for name, t in model.state_dict().items() if not torch.equal(t, weights[name])}
    assert changed in ({"v_proj", "o_proj"}, {"v_proj", "out_proj"})
    real = inputs["attention_mask"].bool()
    for cache in (None, everything(model)):
        assert greatest_difference(logits_of(model, cache, **inputs)[real], before[real]) < bound


@pytest.mark.parametrize(
    ("architecture", "named"), [("gpt2", "v_proj, got no such module"), ("gpt-neox", "v_proj"), ("phi3", "v_proj")]
)
def test_folding_refuses_fused_projections(architecture, named):
    model = tiny(architecture)
    calibration, before = calibration_of(model), snapshot(model)
    with pytest.raises(ValueError, match=f"layer 0: fold=True needs a plain torch.nn.Linear as {named}"):
        attach(model, calibration, fold=True)
    assert_unchanged(model, before)


def test_folding_refuses_a_projection_that_is_more_than_linear():
    class Adapted(nn.Linear):
        pass

    model = tiny()
    model.model.layers[1].self_attn.o_proj.__class__ = Adapted
    calibration, before = calibration_of(model), snapshot(model)
    with pytest.raises(ValueError, match=r"layer 1: fold=True .* as o_proj, got .*Adapted; attach with fold=False"):
        attach(model, calibration, fold=True)
    assert_unchanged(model, before)
    assert not is_attached(model)
    attach(model, calibration)


# Detaching ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "fold"),
    [(name, False) for name in SUPPORTED] + [(name, True) for name in FOLDABLE],
    ids=[f"{name}-at run time" for name in SUPPORTED] + [f"{name}-folded" for name in FOLDABLE],
)
def test_detach_brings_the_model_back_bit_for_bit(architecture, fold):
    model, inputs = tiny(architecture), left_padded(30, 12)
    before, logits, calibration = snapshot(model), logits_of(model, **inputs), calibration_of(model)
    for _ in range(2):
        attach(model, calibration, fold=fold)
        logits_of(model, everything(model), **inputs)
        assert list(model.state_dict()) == list(before["weights"])
        detach(model)
        assert_unchanged(model, before)
        assert torch.equal(logits_of(model, **inputs), logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_detach_brings_the_attention_back(implementation):
    model = tiny()
    model.set_attn_implementation(implementation)
    calibration = calibration_of(model)
    attach(model, calibration)
    assert model.config._attn_implementation == "swan"
    detach(model)
    assert model.config._attn_implementation == implementation


def test_attach_keeps_the_mode_of_training_and_draws_no_random_numbers():
    model = tiny(attention_dropout=0.1)
    calibration = calibration_of(model)
    model.train()
    torch.manual_seed(3)
    attach(model, calibration)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)
    assert all(module.training for module in model.modules())


def test_saved_while_attached_is_a_plain_model(tmp_path):
    model, inputs = attached(), {"input_ids": tokens(1, 20)}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(loaded, **inputs), logits_of(model, **inputs))


def test_attached_model_moves_and_copies():
    model, inputs = attached(), {"input_ids": tokens(1, 20)}
    clone = copy.deepcopy(model)
    expected = logits_of(model, everything(model), **inputs)
    detach(model)
    assert torch.equal(logits_of(clone, everything(clone), **inputs), expected)
    clone.to(torch.bfloat16)
    assert logits_of(clone, everything(clone), **inputs).dtype == torch.bfloat16


# Errors -------------------------------------------------------------------------------------------


def test_attach_twice():
    model = attached()
    with pytest.raises(ValueError, match=r"already attached; call swan\.detach"):
        attach(model, calibration_of(tiny()))
    assert is_attached(model)


def test_detach_what_is_not_attached():
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match="not attached; there is nothing to detach"):
        detach(model)
    assert_unchanged(model, before)


def test_attach_the_calibration_of_another_model():
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"of another model \(num_key_value_heads: 4 calibrated, 2 here\)"):
        attach(model, calibration_of(tiny(num_key_value_heads=4)))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("mistral-sliding", "every layer attends to a sliding window only"),
        ("jetmoe", "it computes with keys and values between its cache and its attention"),
        (
            "falcon-h1",
            "2 attention layers with a cache of their own each .*, got 2 caches with .*Layer among",
        ),
    ],
)
def test_refuses_an_architecture_that_a_cache_cannot_serve(architecture, reason):
    model = tiny(architecture)
    calibration, before = calibration_of(model), snapshot(model)
    with pytest.raises(ValueError, match=rf"swan does not support {type(model).__name__}: {reason}"):
        attach(model, calibration)
    assert_unchanged(model, before)
    assert not is_attached(model)


WRONG = {
    "a scale of its own": lambda forward: lambda *given, scale, **more: forward(*given, scale=2 * scale, **more),
    "later tokens seen": lambda forward: lambda *given, mask, **more: forward(*given, mask=both_ways(given), **more),
    "no history": lambda forward: lambda self, q, *given, **more: forward(self, q, *given, **more) * (q.shape[2] > 1),
}


def both_ways(given):
    cache, q = given[0], given[1]
    return torch.ones(1, 1, q.shape[2], q.shape[2] + cache.length, dtype=torch.bool)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_attach_looks_at_what_comes_out(wrong, dtype, architecture, monkeypatch):
    model = tiny(architecture).to(dtype)
    calibration, before = calibration_of(model), snapshot(model)
    monkeypatch.setattr(KVCache, "forward", wrong(KVCache.forward))
    computes = "on a SwanCache that keeps everything it computes something else than on its own cache"
    with pytest.raises(ValueError, match=computes):
        attach(model, calibration)
    assert_unchanged(model, before)


def test_attach_looks_at_what_layers_after_the_first_make_of_it():
    """In float32: the attention of the first layer is right, and that of the next is not."""
    model = tiny()
    calibration, before = calibration_of(model), snapshot(model)

    def wrong(_, given, more, output):
        uses_swan = isinstance(more[cache_keyword(model)], SwanCache)
        return (2 * output[0], *output[1:]) if uses_swan else None

    hook = model.model.layers[1].self_attn.register_forward_hook(wrong, with_kwargs=True)
    with pytest.raises(ValueError, match="it computes something else than on its own cache"):
        attach(model, calibration)
    assert_unchanged(model, before)
    hook.remove()
    attach(model, calibration)


def test_a_cache_belongs_to_the_bases_of_its_model():
    """With another model it would store vectors in one basis and read them in another."""
    model, ids = attached(), {"input_ids": tokens(1, 20)}
    cache = everything(model)
    logits_of(model, cache, **ids)
    held = [t.clone() for kv in cache.winnowed.values() for t in kv.tensors]
    others = [attached(seed=1), attached(num_hidden_layers=3), attached("qwen2"), tiny()]
    attach(others[3], calibrate(others[3], [tokens(2, 40, seed=8)], progress=False))
    for other in others:
        with pytest.raises(ValueError, match=r"made for a model with other bases; make one .* swan\.SwanCache\(model"):
            logits_of(other, cache, **ids)
    assert cache.get_seq_length() == 20
    assert all(map(torch.equal, (t for kv in cache.winnowed.values() for t in kv.tensors), held))
    again = attached()
    logits_of(again, cache, input_ids=tokens(1, 3))  # the same bases
    assert cache.get_seq_length() == 23


def test_cache_of_a_model_that_is_not_attached():
    with pytest.raises(ValueError, match=r"not attached; call swan\.attach"):
        SwanCache(tiny(), retention=0.5)


@pytest.mark.parametrize("settings", [{}, {"plan": Plan.for_retention(0.5, dims=[(16, 16)] * 2), "retention": 0.5}])
def test_cache_takes_a_plan_or_a_retention(settings):
    with pytest.raises(ValueError, match="give exactly one of plan, retention, budget and levels"):
        SwanCache(attached(), **settings)


def test_a_number_is_the_retention():
    model = attached()
    assert SwanCache(model, 0.5).plan == SwanCache(model, retention=0.5).plan
    with pytest.raises(ValueError, match=r"given twice: 0\.5 and 0\.4"):
        SwanCache(model, 0.5, retention=0.4)
    with pytest.raises(TypeError, match="takes a retention or a Plan, got str"):
        SwanCache(model, "0.5")


def test_plan_of_another_number_of_layers():
    with pytest.raises(ValueError, match="the plan has 3 layers, the model 2"):
        SwanCache(attached(), Plan.for_retention(0.5, dims=[(16, 16)] * 3))


def test_plan_of_another_head_dimension():
    with pytest.raises(ValueError, match=r"the plan stores .* 32 and 32 .* in layer 0, the model has 16 and 16"):
        SwanCache(attached(), Plan.for_retention(0.5, dims=[(32, 32)] * 2))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cache_that_reaches_other_attention_says_what_to_do(implementation):
    model = attached()
    cache = SwanCache(model, retention=0.5)
    model.set_attn_implementation(implementation)
    with pytest.raises(AttributeError, match=r"not swan's .* call swan\.attach\(model, calibration\), and leave"):
        logits_of(model, cache, input_ids=tokens(1, 5))


def test_models_that_share_a_config_object():
    """They would switch attention together: the second is refused, the first goes on."""
    first = tiny()
    second = type(first)(first.config).eval()
    calibration, inputs = calibration_of(first), {"input_ids": tokens(1, 20)}
    expected = logits_of(second, **inputs)
    attach(first, calibration)
    assert torch.equal(logits_of(second, **inputs), expected)
    with pytest.raises(ValueError, match=r"shares its config object .* copy of the config"):
        attach(second, calibration)
    logits_of(first, everything(first), **inputs)
    detach(first)
    attach(second, calibration)
    assert first.config._attn_implementation == "swan"
    third = type(first)(copy.deepcopy(first.config)).eval()  # a copy says swan too
    with pytest.raises(ValueError, match=r"or has a copy that .* call model\.set_attn_implementation\('sdpa'\)"):
        attach(third, calibration)
    third.set_attn_implementation("sdpa")
    attach(third, calibration)
    logits_of(third, everything(third), **inputs)
    detach(second)
    assert first.config._attn_implementation == "sdpa"


# The name of the argument --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_cache_is_taken_under_both_names(name, copied):
    """Since 5.24 transformers calls the argument cache and takes the old name too; before, `attach` adds it."""
    model, ids = attached(), tokens(1, 20)
    if copied:
        model = copy.deepcopy(model)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    caches = [everything(model) for _ in range(3)]
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, **{name: caches[0]}), expected)
    for part, cache in ((model, caches[1]), (model.base_model, caches[2])):
        part(ids, **{name: cache})
    assert [cache.get_seq_length() for cache in caches] == [23, 20, 20]
    if cache_keyword(model) == "past_key_values":
        with pytest.raises(ValueError, match="as cache or as past_key_values, not as both"):
            model(ids, cache=caches[1], past_key_values=caches[1])
    before = set(vars(tiny()))
    detach(model)
    assert set(vars(model)) <= before | {"_attn_implementation"} and not model._forward_pre_hooks
