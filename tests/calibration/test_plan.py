import itertools
import json
import re

import pytest
import torch

from swan import Graded, LayerPlan, Plan, SwanAttention, TopK, calibrate

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


def bits(layout):
    """Bits of all coordinates together."""
    return sum(size * bits for size, bits in layout.groups)


@each_dims
def test_is_monotone(d, dv):
    for less, more in itertools.pairwise(plans(d, dv).values()):
        assert bits(less.keys) <= bits(more.keys)
        assert bits(less.values) <= bits(more.values)
        assert less.retention <= more.retention


def test_keys_get_more_than_values():
    """Summed over the dial; a single step may round the other way."""
    found = list(plans(64, 64).values())[:-1]
    assert sum(bits(layer.keys) for layer in found) > sum(bits(layer.values) for layer in found)


def test_leading_coordinates_get_at_least_as_many_bits():
    for layer in plans(64, 64).values():
        for layout in (layer.keys, layer.values):
            given = [bits for _, bits in layout.groups]
            assert given == sorted(given, reverse=True)


@pytest.mark.parametrize("retention", [0.5, 0.33, 0.26, 0.2, 0.15])
def test_uses_most_of_what_it_may(retention):
    assert Plan.for_retention(retention, dims=[(128, 128)]).retention > 0.9 * retention


def test_everything_at_one():
    plan = Plan.for_retention(1, dims=[(64, 32)])
    assert plan.layers == (LayerPlan(Graded(((64, 16),)), Graded(((32, 16),))),)
    assert plan.retention == 1


@each_dims
def test_the_least_that_the_error_names_is_possible(d, dv):
    with pytest.raises(ValueError, match="no plan fits in retention") as error:
        Plan.for_retention(0.001, dims=[(d, dv)])
    found = re.search(r"the least is (0\.\d+); fewer bytes are safe where effects were measured", str(error.value))
    assert found is not None
    least = float(found[1])
    assert Plan.for_retention(least, dims=[(d, dv)]).retention <= least


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
        LayerPlan(TopK(64, 40), TopK(64, 24, bits=16, positions="index")),
        None,
        LayerPlan(Graded(((16, 16), (48, 0))), Graded.leading(64, 64)),
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
