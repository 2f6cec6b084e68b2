"""Effects against autograd and against KL divergences that are measured, and plans that follow them."""

import itertools
import math

import pytest
import torch
from torch import nn

from swan import Calibration, Graded, LayerPlan, Plan, SwanAttention, calibrate, pack, random_rotation, rotate, unpack
from swan.calibration.artifact import _bases
from swan.calibration.capture import Observed
from swan.calibration.effects import (
    BUFFER,
    KEYS,
    SINKS,
    STRIDE,
    VALUES,
    Effects,
    LayerGradients,
    _both_sums,
    _layer_gradients,
    _likelihood_gradient,
    _stored,
    effects_of,
    graded,
    sensitivities,
)
from swan.calibration.moments import Moments
from swan.evaluation.perplexity import Setting, evaluate
from swan.storage import ByHead
from tests.strategies import one_thread  # noqa: F401
from tests.tiny import VOCABULARY, tiny, tokens


def random_effects(layers: int, seed: int, heads: int = 1) -> Effects:
    generator = torch.Generator().manual_seed(seed)
    return Effects(
        *(
            torch.rand(layers, heads, len(side), generator=generator).sort(-1, descending=True).values
            for side in (KEYS, VALUES)
        )
    )


def with_effects(dims, effects: Effects) -> Calibration:
    heads = effects.keys.shape[1]
    layers = nn.Sequential(*(SwanAttention(heads * d, heads=heads) for d, _ in dims))
    found = [calibrate(layer, [torch.randn(1, 5, layer.dim)]) for layer in layers]
    return Calibration(
        tuple(c.layers[0] for c in found), tuple(c.moments[0] for c in found), "joint", 0, found[0].fingerprint, effects
    )


def two_rows(count, d, dv, masked):
    """Draw queries of 4 heads, keys and values of 2, and a mask that is causal, or hides three tokens of a row too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, count, n) for h, n in ((4, d), (2, d), (2, dv)))
    visible = torch.ones(2, 1, count, count, dtype=torch.bool).tril()
    if masked:
        visible[1, ..., :3] = False
    return q, k, v, visible


def outputs(q, dense, packed, visible, scale):
    """Attend to keys and values as queries see them, recent ones dense: ``[batch, tokens, heads, dv]``."""
    far = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2]) >= BUFFER
    far[:, :SINKS] = False
    k, v, k_packed, v_packed = (t.repeat_interleave(2, dim=1) for t in (*dense, *packed))
    scores = torch.where(far, q @ k_packed.mT, q @ k.mT) * scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0)
    return ((weights * ~far) @ v + (weights * far) @ v_packed).transpose(1, 2)


def observed(q, k, v, out, visible, masked, scale=0.3):
    return Observed(nn.Identity(), q, k, v, out.detach().float(), visible if masked else None, scale, False)


@pytest.mark.parametrize("masked", [False, True])
def test_sensitivities_are_gradients_through_packed_keys_and_values(masked):
    """The same by autograd, with a copy of keys and values for the queries that see them packed."""
    q, k, v, visible = two_rows(BUFFER + 40, 16, 8, masked)
    packed = k.clone().requires_grad_(), v.clone().requires_grad_()
    out = outputs(q, (k, v), packed, visible, 0.3)
    gradient = torch.randn(out.shape)
    expected = torch.autograd.grad((out * gradient).sum(), packed)
    for found, wanted in zip(sensitivities(observed(q, k, v, out, visible, masked), gradient), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_changes_by_queries_are_those_of_outputs(masked):
    """Half the sum of (g · change of the output)² over the queries that are looked at, for each head and candidate."""
    d, dv = 32, 64
    q, k, v, visible = two_rows(BUFFER + 60, d, dv, masked)
    bases = random_rotation(2, d, seed=0), random_rotation(2, dv, seed=1)
    wide = q.double(), (k.double(), v.double())
    out = outputs(*wide, wide[1], visible, 0.3)
    gradient = torch.randn(out.shape)
    layer = _layer_gradients(observed(q, k, v, out, visible, masked), gradient)
    for side, (_, results) in enumerate(_both_sums(layer, *bases, q.device)):
        for groups, found in zip((KEYS, VALUES)[side], results.T, strict=True):
            packed = [k.double(), v.double()]
            stored = unpack(pack(rotate((k, v)[side], bases[side]), graded((d, dv)[side], groups)))
            packed[side] = rotate(stored, bases[side].mT).double()
            change = ((outputs(*wide, packed, visible, 0.3) - out) * gradient).sum(3)[:, BUFFER + SINKS :: STRIDE]
            wanted = change.unflatten(2, (2, 2)).sum(3).square().sum((0, 1)) * STRIDE / 2  # of two KV heads
            torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=1e-9)


def test_what_is_lost_alike_of_all_tokens_counts():
    """Values with a part in common, whose loss adds up in an output: one token at a time predicts too little of it."""
    torch.manual_seed(0)
    count, d = BUFFER + 200, 32
    q, k, v = torch.randn(1, 1, count, d) * 0.1, torch.randn(1, 1, count, d), torch.randn(1, 1, count, d)
    v[..., -1] = 3.0  # in a coordinate that the first candidate of values prunes
    weights = (q @ k.mT * 0.2).masked_fill(~torch.ones(count, count, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    gradient = torch.randn(1, count, 1, d)
    seen = Observed(nn.Identity(), q, k, v, (weights @ v).transpose(1, 2), None, 0.2, False)
    layer, plain = _layer_gradients(seen, gradient), torch.eye(d)[None]
    _, (by_tokens, by_queries) = _both_sums(layer, plain, plain, q.device)
    assert by_queries[0, 0] > 5 * by_tokens[0, 0]
    predicted = effects_of([({0: layer}, {0: (plain, plain)})], {0: 1}, count, q.device)
    assert predicted.values[0, 0, 0] == by_queries[0, 0] / count


def test_effects_predict_the_measured_divergence():
    model, ids = tiny(num_hidden_layers=3), tokens(6, 300)
    calibration = calibrate(model, list(ids.split(1)))
    assert calibration.effects is not None
    exact = Graded(((16, 16),))
    for side, candidates in (("keys", KEYS), ("values", VALUES)):
        for number in (len(candidates) - 1, len(candidates) - 3):  # small errors: the first order holds
            layout = graded(16, candidates[number])
            layer = LayerPlan(layout, exact) if side == "keys" else LayerPlan(exact, layout)
            _, row = evaluate(model, ids, [Setting(Plan((layer,) * 3, buffer=BUFFER))], calibration)
            predicted = getattr(calibration.effects, side)[..., number].sum().item()
            assert predicted / 2 < row["kl"] < predicted * 2


def test_needs_tokens_beyond_the_buffer():
    model = tiny()
    assert calibrate(model, [tokens(1, BUFFER)]).effects is None
    with pytest.raises(ValueError, match="texts of more than 64 tokens"):
        calibrate(model, [tokens(1, BUFFER)], effects=True)
    assert calibrate(model, [tokens(1, 2 * BUFFER)], effects=False).effects is None
    assert (calibrate(model, [tokens(1, BUFFER + 2)]).effects.keys == 0).all()  # all that is packed are sinks


def test_of_frozen_and_of_padded_models():
    model, ids = tiny(), tokens(2, 2 * BUFFER)
    wanted = calibrate(model, [ids]).effects
    model.requires_grad_(False)
    found = calibrate(model, [ids]).effects
    assert torch.equal(found.keys, wanted.keys)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    padded = calibrate(model, [{"input_ids": ids, "attention_mask": mask}]).effects
    assert padded.keys.isfinite().all()
    assert not torch.equal(padded.keys, wanted.keys)


class OwnModel(nn.Module):
    """A model of one's own whose output is logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.attention = SwanAttention(32, heads=2)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(x + self.attention(x))


def test_of_a_model_of_ones_own():
    model, ids = OwnModel(), tokens(1, 2 * BUFFER)
    assert calibrate(model, [ids]).effects is None
    found = calibrate(model, [ids], effects=True).effects
    assert found.keys.shape == (1, 2, len(KEYS))
    assert (found.keys > 0).all()


def test_sliding_layers_have_no_entry():
    calibration = calibrate(tiny("gemma3"), [tokens(1, 2 * BUFFER)])
    assert calibration.effects.keys[0].isnan().all()  # the first layer has a window
    assert calibration.effects.keys[1].isfinite().all()
    for retention in (1.0, 0.4):
        assert [layer is None for layer in Plan.for_retention(retention, calibration).layers] == [True, False]


def test_of_a_model_of_sliding_layers_alone_there_are_none():
    with pytest.warns(UserWarning, match="not measured: every layer attends to a sliding window only"):
        calibration = calibrate(tiny("mistral-sliding"), [tokens(1, 2 * BUFFER)])
    assert calibration.effects is None


def test_are_saved_and_belong_to_the_basis(tmp_path):
    calibration = calibrate(tiny(), [tokens(1, 2 * BUFFER)])
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert torch.equal(loaded.effects.keys, calibration.effects.keys)
    assert torch.equal(loaded.effects.values, calibration.effects.values)
    assert loaded.with_basis("pca").effects is None
    assert loaded.with_basis("joint").effects is not None
    assert "effects=True" in repr(loaded)


def test_measuring_leaves_no_gradients():
    model = tiny()
    calibrate(model, [tokens(1, 2 * BUFFER)])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("d", [16, 40, 64, 256])
def test_changes_by_tokens_are_those_of_packed_vectors(d):
    """Half of the sum of (h · error)² with each candidate packed and unpacked whole, in float64 but for the codes."""
    (k, h_k, v, h_v), bases = torch.randn(4, 2, 3, 50, d), [random_rotation(3, d, seed=seed) for seed in (0, 1)]
    no_queries = torch.empty(2, 3, 1, 0, d)
    layer = LayerGradients(
        h_k, h_v, no_queries, no_queries, k, v, torch.arange(0), None, 1.0, Moments.begin(k, k, v, None)
    )
    sums = _both_sums(layer, *bases, k.device)
    for x, h, basis, candidates, (found, _) in zip((k, v), (h_k, h_v), bases, (KEYS, VALUES), sums, strict=True):
        rotated, by = rotate(x, basis), rotate(h, basis).double()
        for each, groups in zip(found.T, candidates, strict=True):
            error = unpack(pack(rotated, graded(d, groups))).double() - rotated.double()
            torch.testing.assert_close(each.double(), (by * error).sum(-1).square().sum((0, 2)) / 2, rtol=1e-3, atol=0)


def test_words_are_drawn_from_the_predictions():
    """The gradient of a text of one word is that word less its probability, of as many draws as predicted."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0]).expand(1, 20_000, 4)
    seen = Observed(nn.Identity(), *[torch.zeros(1, 1, 1, 1)] * 4, None, 1.0, False)
    gradient = _likelihood_gradient(logits, torch.Generator().manual_seed(0), {0: seen})
    p = logits[0, 0].softmax(-1)
    drawn = (gradient[0] + p).round()
    torch.testing.assert_close(gradient[0], drawn - p)
    assert torch.equal(drawn.sum(-1), torch.ones(20_000))
    assert ((drawn.mean(0) - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()  # five standard errors


@pytest.mark.parametrize("rows", [1, 2], ids=["whole", "with more rows"])
def test_each_batch_counts_once_in_the_moments(rows):
    """Those run backward too, and those of which only the beginning is."""
    model, ids = tiny().double(), tokens(6 * rows, 2 * BUFFER).split(rows)
    both, alone = calibrate(model, ids), calibrate(model, ids, effects=False)
    assert both.effects is not None and both.tokens == alone.tokens == 6 * rows * 2 * BUFFER
    for a, b in zip(both.moments, alone.moments, strict=True):
        for name in "qkv":
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("basis", ["joint", "random"])
@pytest.mark.parametrize("rows", [1, 2], ids=["whole", "with more rows"])
@pytest.mark.parametrize("count, measured", [(1, 1), (4, 4), (5, 5), (8, 8), (12, 8)])
def test_bases_are_those_of_other_text_where_there_is_enough(count, measured, rows, basis, monkeypatch):
    """Those of keys of all of it, those of values of four windows in batches that are an odd number before or after.

    Of a batch of two rows the first is run backward; the second is other text.
    """
    monkeypatch.setattr("swan.calibration.artifact.TOKENS", BUFFER + 8)
    model, seen = tiny().double(), []
    ids = [tokens(rows, BUFFER + 8, seed) for seed in range(count)]

    def bases_of(calibration, row, own, v):
        seen.append((row, own, _bases(calibration, row, own, v)))
        return seen[-1][2]

    def calibrated(texts):
        return calibrate(model, texts, basis, seed=3, effects=False, positions=1)

    monkeypatch.setattr("swan.calibration.artifact._bases", bases_of)
    whole = calibrate(model, ids, basis, seed=3, positions=1)
    assert len(seen) == measured * 2 and whole.tokens == count * rows * (BUFFER + 8)  # 2 layers
    singles = [row[None] for batch in ids for row in batch]
    for row, own, found in seen:
        assert own.tokens == BUFFER + 8
        by_all = by_few = whole
        if len(singles) >= 5:
            (number,) = (n for n, one in enumerate(singles) if same_moments(model, one, row, own))
            others = [one for n, one in enumerate(singles) if n != number]
            by_all = by_few = calibrated(others)
            alternate = [one for n, one in enumerate(singles) if n // rows % 2 != number // rows % 2]
            if len(alternate) >= 4:
                by_few = calibrated(alternate[:4])
        for wanted, basis_found in zip(
            (by_all.layers[row].key_basis, by_few.layers[row].value_basis), found, strict=True
        ):
            torch.testing.assert_close(basis_found.abs(), wanted.abs(), rtol=0, atol=1e-4)  # up to the sign of columns


def same_moments(model, ids, row, moments):
    """Tell if these are the moments of a layer of a text."""
    of_text = calibrate(model, [ids], effects=False, positions=1).moments[row]
    return all(torch.allclose(getattr(of_text, name), getattr(moments, name)) for name in "qkv")


def test_a_failing_backward_pass_leaves_the_moments(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    model, ids = tiny(), [tokens(1, 2 * BUFFER, seed) for seed in range(3)]
    wanted = calibrate(model, ids, effects=False)
    monkeypatch.setattr("swan.calibration.effects.sensitivities", fails)
    with pytest.warns(UserWarning, match="not measured: out of memory"):
        found = calibrate(model, ids)
    assert found.effects is None and found.tokens == wanted.tokens
    for a, b in zip(found.moments, wanted.moments, strict=True):
        torch.testing.assert_close(a.k, b.k, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(model, ids, effects=True)


# Plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_plans_by_effect_keep_to_their_bytes_and_are_nested(seed, heads):
    calibration = with_effects([(64, 64)] * 3, random_effects(3, seed, heads))
    sizes = []
    for retention in [i / 100 for i in range(15, 101)]:
        plan = Plan.for_retention(retention, calibration)
        assert plan.retention <= retention + 1e-9
        layouts = [layout for layer in plan.layers for layout in (layer.keys, layer.values)]
        of_heads = [x.layouts if isinstance(x, ByHead) else (x,) * heads for x in layouts]
        sizes.append([layout.vector_bytes() for each in of_heads for layout in each])
    for less, more in itertools.pairwise(sizes):
        assert all(a <= b for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_no_other_choice_of_fewer_bytes_adds_less(seed):
    """Against all choices for one layer: a plan is at every corner of their lower convex hull."""
    effects = random_effects(1, seed)
    calibration = with_effects([(64, 64)], effects)
    sizes = [[graded(64, groups).vector_bytes() for groups in side] for side in (KEYS, VALUES)]
    tables = effects.keys[0, 0].tolist(), effects.values[0, 0].tolist()
    choices = [
        (sizes[0][a] + sizes[1][b], tables[0][a] + tables[1][b]) for a in range(len(KEYS)) for b in range(len(VALUES))
    ]
    corners = 0
    for stored, effect in choices:
        between = [  # does no mixture of a smaller and a larger choice pass below?
            a[1] + (b[1] - a[1]) * (stored - a[0]) / (b[0] - a[0])
            for a in choices
            for b in choices
            if a[0] <= stored < b[0]
        ]
        layer = Plan.for_retention(stored / 256, calibration).layers[0]
        kl = sum(  # candidates that are the same layout at this dimension have effects of their own here
            min(effect for effect, groups in zip(table, side, strict=True) if graded(64, groups) == layout)
            for table, side, layout in zip(tables, (KEYS, VALUES), (layer.keys, layer.values), strict=True)
        )
        if effect <= min(between, default=effect):
            corners += 1
            assert kl <= effect + 1e-6
            assert layer.keys.vector_bytes() + layer.values.vector_bytes() == stored
    assert corners > 4


def test_the_last_bytes_are_spent_on_a_part_of_a_step():
    """A candidate above the hull counts where the next step of the hull does not fit: here of three, all else alike."""
    few, some, many = ([graded(64, groups).vector_bytes() for groups in VALUES][index] for index in (0, 3, 7))
    effects = Effects(torch.full((1, 1, len(KEYS)), 1e-3), torch.full((1, 1, len(VALUES)), 9e-3))
    effects.values[0, 0, 3], effects.values[0, 0, 7:] = 8.9e-3, 1e-6  # index 3 is far above the line from 0 to 7
    calibration = with_effects([(64, 64)], effects)
    keys = min(graded(64, groups).vector_bytes() for groups in KEYS)
    sizes = {
        room: Plan.for_retention((keys + room) / 256, calibration).layers[0].values.vector_bytes()
        for room in (few, some - 1, some, many - 1, many)
    }
    assert sizes == {few: few, some - 1: few, some: some, many - 1: some, many: many}


def test_a_plan_is_predicted_by_the_effects_of_its_layouts():
    dims, rows = [(64, 64), (128, 128), (64, 64)], (0, 2)
    effects = random_effects(3, seed=0)
    effects.keys[1], effects.values[1] = torch.nan, torch.nan  # a sliding window
    calibration = with_effects(dims, effects)
    for key, value in ((0, 3), (5, 13)):
        layers = [LayerPlan(graded(d, KEYS[key]), graded(dv, VALUES[value])) for d, dv in dims]
        found = Plan((layers[0], None, layers[2])).predicted_kl(calibration)
        assert found.shape == (3, 1, 2) and found[1].isnan().all()
        for row in rows:
            assert found[row, 0].tolist() == [effects.keys[row, 0, key].item(), effects.values[row, 0, value].item()]
    assert Plan.for_retention(1.0, calibration).predicted_kl(calibration).nansum() == 0
    more, less = (Plan.for_retention(r, calibration).predicted_kl(calibration).nansum() for r in (0.5, 0.2))
    assert more < less


def test_what_was_not_measured_is_not_predicted():
    calibration = with_effects([(64, 64)], random_effects(1, seed=0))
    with pytest.raises(ValueError, match=r"the effect of Graded\(groups=\(\(64, 2\),\)\) was not measured"):
        Plan((LayerPlan(Graded(((64, 2),)), Graded(((64, 6),))),)).predicted_kl(calibration)
    with pytest.raises(ValueError, match="the plan has 2 layers, the model 1"):
        Plan.for_retention(0.5, dims=[(64, 64)] * 2).predicted_kl(calibration)
    with pytest.raises(ValueError, match=r"has no effects; run swan\.calibrate"):
        Plan.for_retention(0.5, calibration).predicted_kl(calibration.with_basis("pca"))


def test_too_small_a_retention_names_the_least():
    calibration = with_effects([(64, 64)], random_effects(1, 0))
    with pytest.raises(
        ValueError, match=r"no plan fits in retention 0.05 at these head dimensions; the least is 0\.\d+"
    ):
        Plan.for_retention(0.05, calibration)
    levels = Plan.levels(calibration)
    assert levels[0].retention == 1
    assert all(a.retention > b.retention for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_what_cannot_be_stored_is_refused(bad):
    x = torch.randn(1, 2, 5, 16)
    x[0, 1, 3, 2] = bad
    with pytest.raises(ValueError, match="codes of few bits cannot store some keys or values: numbers above 55,109"):
        _stored(x, KEYS)
