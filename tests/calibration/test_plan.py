import dataclasses
import itertools
import json
import re

import pytest
import torch

from swan import Graded, LayerPlan, Plan, SwanAttention, TopK, calibrate
from swan.calibration.effects import KEYS, Effects, graded
from swan.storage import ByHead
from tests.tiny import with_effects

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


def by_heads(factors):
    """A calibration of two layers whose effects differ from head to head by some factors."""
    model = torch.nn.Sequential(*(SwanAttention(64 * len(factors), heads=len(factors)) for _ in range(2)))
    calibration = with_effects(calibrate(model, [torch.randn(1, 5, 64 * len(factors))]))
    tables = (
        table[:, :1] * torch.tensor(factors)[:, None]
        for table in (calibration.effects.keys, calibration.effects.values)
    )
    return dataclasses.replace(calibration, effects=Effects(*tables))


@pytest.mark.parametrize("retention", [0.15, 0.2, 0.26, 0.4])
def test_heads_in_which_errors_do_more_harm_get_more_bits(retention):
    calibration = by_heads([1.0, 100.0])
    layer, alike = (Plan.for_retention(retention, calibration, by_head=each).layers[0] for each in (True, False))
    assert isinstance(layer.keys, ByHead)
    less, more = (LayerPlan(k, v) for k, v in zip(heads_of(layer.keys), heads_of(layer.values), strict=True))
    assert less.retention < alike.retention < more.retention
    assert Plan.for_retention(retention, calibration).retention <= retention + 1e-9


def heads_of(layout):
    return layout.layouts if isinstance(layout, ByHead) else (layout, layout)


@pytest.mark.parametrize("retention", [0.12, 0.2, 0.33])
def test_heads_that_need_the_same_are_alike(retention):
    plan = Plan.for_retention(retention, by_heads([1.0, 1.0, 1.0]), by_head=False)
    assert all(isinstance(layout, Graded) for layer in plan.layers for layout in (layer.keys, layer.values))


def test_a_layer_has_three_runs_of_heads_at_most():
    """Neighbours that need about the same share a layout, whatever stands between others that do."""
    calibration = by_heads([1.0, 1.5, 1.2, 900.0, 1000.0, 1.0, 1.1, 1.3])
    for retention in (0.15, 0.2, 0.26, 0.33):
        for layer in Plan.for_retention(retention, calibration).layers:
            for layout in (layer.keys, layer.values):
                edges = [run.start for run in layout.runs] if isinstance(layout, ByHead) else [0]
                assert set(edges) <= {0, 3, 5}


def test_predicted_kl_is_the_sum_over_heads():
    calibration = by_heads([1.0, 100.0])
    plan = Plan.for_retention(0.2, calibration)
    found, layer = plan.predicted_kl(calibration), plan.layers[0]
    wanted = sum(
        calibration.effects.keys[0, head, [graded(64, groups) for groups in KEYS].index(layout)]
        for head, layout in enumerate(heads_of(layer.keys))
    )
    torch.testing.assert_close(found[0, :, 0].sum(), wanted)


def test_json_of_heads_both_ways():
    plan = Plan((LayerPlan(ByHead((Graded(((16, 4),)), Graded(((8, 4), (8, 2))))), Graded(((16, 4),))),))
    assert Plan.from_json(plan.to_json()) == plan
    text = plan.to_json().replace("[8, 2]", "[9, 2]")
    with pytest.raises(ValueError, match=r"not the JSON of a plan .*one head dimension"):
        Plan.from_json(text)


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
