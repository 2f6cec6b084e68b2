import itertools
import json

import pytest
import torch

from swan import Graded, Plan, PlanLayer, SwanAttention, TopK, calibrate

DIMS = [(d, d) for d in (16, 24, 64, 80, 128, 256)] + [(24, 16), (192, 128), (16, 64)]
each_dims = pytest.mark.parametrize(("d", "dv"), DIMS, ids=[f"{d}x{dv}" for d, dv in DIMS])
GRID = [i / 200 for i in range(1, 201)]


def plans(d, dv):
    """The layer of each retention of the grid that has a plan."""
    found = {}
    for retention in GRID:
        try:
            found[retention] = Plan.for_retention(retention, dims=[(d, dv)]).layers[0]
        except ValueError:
            assert not found, "a larger retention has no plan where a smaller one has"
    return found


@each_dims
def test_never_stores_more_than_asked(d, dv):
    for retention, layer in plans(d, dv).items():
        stored = layer.keys.vector_bytes() + layer.values.vector_bytes()
        assert stored <= retention * 2 * (d + dv) + 1e-6
        assert layer.retention == stored / (2 * (d + dv))


@each_dims
def test_is_monotone(d, dv):
    for less, more in itertools.pairwise(list(plans(d, dv).values())[:-1]):  # the last one keeps everything
        assert less.keys.keep <= more.keys.keep
        assert less.values.keep <= more.values.keep
        assert (
            less.keys.vector_bytes() + less.values.vector_bytes()
            <= more.keys.vector_bytes() + more.values.vector_bytes()
        )


@each_dims
def test_uses_what_it_may(d, dv):
    """One coordinate more, of keys or of values, would not fit: no more than its byte and a bitmap are left."""
    for retention, layer in list(plans(d, dv).items())[:-1]:
        if layer.keys.keep < d or layer.values.keep < dv:
            left = retention * 2 * (d + dv) - layer.retention * 2 * (d + dv)
            assert left < 1 + max(-(-d // 8), -(-dv // 8))


@each_dims
def test_keys_keep_more_than_values_of_the_same_size(d, dv):
    for layer in list(plans(d, dv).values())[:-1]:
        if d == dv:
            assert layer.values.keep <= layer.keys.keep


def test_everything_at_one():
    plan = Plan.for_retention(1, dims=[(64, 32)])
    assert plan.layers == (PlanLayer(Graded(((64, 16),)), Graded(((32, 16),))),)
    assert plan.retention == 1


@each_dims
def test_the_least_that_the_error_names_is_possible(d, dv):
    with pytest.raises(ValueError, match="no plan fits in retention") as error:
        Plan.for_retention(0.001, dims=[(d, dv)])
    least = float(str(error.value).rpartition(" ")[2])
    assert Plan.for_retention(least, dims=[(d, dv)]).layers[0] == PlanLayer(TopK(d, 1), TopK(dv, 1))


def test_layers_of_different_dimensions():
    plan = Plan.for_retention(0.4, dims=[(64, 64), (128, 64)])
    assert [(layer.keys.d, layer.values.d) for layer in plan.layers] == [(64, 64), (128, 64)]
    stored = sum(layer.keys.vector_bytes() + layer.values.vector_bytes() for layer in plan.layers)
    assert plan.retention == pytest.approx(stored / (2 * (64 + 64 + 128 + 64)))


def test_dimensions_of_a_calibration():
    model = torch.nn.Sequential(SwanAttention(64, heads=4), SwanAttention(64, heads=2))
    calibration = calibrate(model, [torch.randn(1, 5, 64)])
    assert Plan.for_retention(0.5, calibration) == Plan.for_retention(0.5, dims=[(16, 16), (32, 32)])


@pytest.mark.parametrize("retention", [0, -0.1, 1.01, float("nan")])
def test_refuses_a_retention_out_of_range(retention):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Plan.for_retention(retention, dims=[(64, 64)])


def test_needs_dimensions():
    with pytest.raises(ValueError, match="give a calibration, or dims"):
        Plan.for_retention(0.5)


@pytest.mark.parametrize("settings", [{"buffer": 0}, {"sinks": -1}])
def test_refuses_an_impossible_buffer(settings):
    with pytest.raises(ValueError, match="buffer >= 1 and sinks >= 0"):
        Plan.for_retention(0.5, dims=[(64, 64)], **settings)


MIXED = Plan(
    (
        PlanLayer(TopK(64, 40), TopK(64, 24, bits=16, positions="index")),
        None,
        PlanLayer(Graded(((16, 16), (48, 0))), Graded.leading(64, 64)),
    ),
    buffer=32,
    sinks=0,
)


def test_json_both_ways():
    assert Plan.from_json(MIXED.to_json()) == MIXED
    assert json.loads(MIXED.to_json())["layers"][1] is None
    assert json.loads(MIXED.to_json())["layers"][0]["keys"]["form"] == "topk"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("buffer"),
        lambda data: data.update(buffer="many"),
        lambda data: data.update(layers=[[]]),
        lambda data: data["layers"][0].pop("keys"),
        lambda data: data["layers"][0]["keys"].update(form="ternary"),
        lambda data: data["layers"][0]["keys"].update(colour=1),
        lambda data: data["layers"][0]["keys"].update(keep=65),
    ],
    ids=["no buffer", "buffer of text", "layer of a list", "no keys", "unknown form", "unknown setting", "keep > d"],
)
def test_refuses_json_that_is_no_plan(change):
    data = json.loads(MIXED.to_json())
    change(data)
    with pytest.raises(ValueError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"layers": 3}'])
def test_refuses_text_that_is_no_plan(text):
    with pytest.raises(ValueError, match=r"not the JSON of a plan .* Plan\.to_json"):
        Plan.from_json(text)
