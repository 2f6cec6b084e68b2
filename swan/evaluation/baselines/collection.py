"""The methods that swan is measured against."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from swan.calibration import Calibration, Plan
from swan.calibration.bases import LayerBases
from swan.calibration.moments import Moments
from swan.evaluation.baselines.codes import FLOAT4_BLOCK, BlockBits, Float4, Float8, LloydMax, block_bits
from swan.evaluation.baselines.eviction import Eviction, Score
from swan.evaluation.baselines.quantized import TransformersQuantized
from swan.evaluation.baselines.tiles import Kivi, KVarN, kivi_fits
from swan.evaluation.baselines.trellis import Trellis
from swan.evaluation.perplexity import Method, Setting
from swan.storage import Graded, LayerPlan, Layout, TopK

__all__ = ["rivals"]

BLOCK_BITS = (
    (4, 4),
    (3, 3),
    (3, 2),
    (2, 2),
)  # mean bits of keys and bits of values of Block-GTQ; theirs are the last 3
EVICTED = {16: (0.5, 0.26, 0.15), 4: (0.2, 0.15, 0.1)}  # retentions at which tokens are dropped, by bits of the others


def rivals(
    calibration: Calibration,
    *,
    buffer: int = 64,
    sinks: int = 4,
    seeds: int = 3,
    linear: tuple[Tensor | None, ...] | None = None,
) -> list[Method]:
    """Collect the methods that swan is measured against, at the bytes that each of them takes.

    Args:
        calibration: of the model.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.
        seeds: how many rotations a random one is drawn.
        linear: weights of `fit_linear_scores`; without them no tokens are dropped by linear scores.

    Returns:
        Window and sinks alone; fp8; NVFP4, where head dimensions are multiples of 16; top-k without rotation (8-bit
        values; Mustafar, arXiv:2505.22913) at two retentions; half the principal components of keys and values at 16
        bits; a random rotation with 4, 3 and 2 bits; a trellis code with 3 and 2 bits; Block-GTQ with 4 to 2 bits; KIVI
        with 4 and 2 bits, where the head dimensions of values are multiples of 32; KVarN with 4 bits for keys and 2 for
        values; tokens dropped by three scores, the others at 16 and at 4 bits; and, where their packages are installed,
        the quantized caches of transformers.
    """
    from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

    dims = calibration.dims
    recent: dict[str, Any] = {"buffer": buffer, "sinks": sinks}

    def stored(make: Callable[[int], Layout]) -> Plan:
        return Plan(tuple(LayerPlan(make(d), make(dv)) for d, dv in dims), **recent)

    def topk(retention: float) -> Plan:
        return stored(lambda d: TopK(d, math.floor(2 * d * retention) - 2 - -(-d // 8)))

    methods: list[Method] = [
        Setting(Plan((None,) * len(dims), **recent)),
        Setting(stored(Float8), basis="identity"),
        *(Setting(topk(r), basis="identity", name="topk, no rotation") for r in (0.5, 0.33)),
        Setting(stored(lambda d: Graded.leading(d, d // 2)), "pca", name="low rank"),
    ]
    for bits in (4, 3, 2):
        plan = stored(lambda d, bits=bits: LloydMax(d, bits))
        methods += [Setting(plan, basis="random", seed=seed) for seed in range(seeds)]
    if all(n % FLOAT4_BLOCK == 0 for pair in dims for n in pair):
        methods.append(Setting(Plan(_each_layer(calibration, _nvfp4), **recent), basis="identity"))
    methods += [Setting(stored(lambda d, bits=bits: Trellis(d, bits)), basis="identity") for bits in (3, 2)]
    for bits in BLOCK_BITS:
        plan = Plan(_each_layer(calibration, partial(_block_gtq, bits=bits)), **recent)
        methods.append(Setting(plan, basis="identity"))
    if all(kivi_fits(dv) for _, dv in dims):
        methods += [Kivi(bits, **recent) for bits in (4, 2)]
    used = [layer is not None for layer in Plan.for_retention(1.0, calibration).layers]  # None: a sliding window
    whole = tuple(pair if winnowed else None for pair, winnowed in zip(dims, used, strict=True))
    if len(alike := {pair for pair in whole if pair is not None}) == 1:
        methods.append(KVarN(*alike, **recent))
    methods += _evicting(whole, linear, recent)
    for backend, installed in (("quanto", is_optimum_quanto_available()), ("hqq", is_hqq_available())):
        if installed:
            methods += [TransformersQuantized(backend, bits) for bits in (4, 2)]
    return methods


def _evicting(
    dims: tuple[tuple[int, int] | None, ...], linear: tuple[Tensor | None, ...] | None, recent: dict[str, Any]
) -> list[Method]:
    """Drop tokens by each score, the others at 16 bits and at 4, down to the same bytes."""
    methods: list[Method] = []
    for score in get_args(Score):
        if score == "linear score" and linear is None:
            continue
        for bits, retentions in EVICTED.items():
            whole = Eviction(score, 1.0, dims, bits, linear).retention
            methods += [Eviction(score, r / whole, dims, bits, linear, **recent) for r in retentions]
    return methods


def _each_layer(
    calibration: Calibration, layout: Callable[[Moments, LayerBases, int], LayerPlan]
) -> tuple[LayerPlan, ...]:
    """Make the layouts of each layer from its moments, its identity bases, and the query heads of a KV head."""
    identity, field = calibration.with_basis("identity"), calibration.fingerprint
    group = field["num_attention_heads"] // (field["num_key_value_heads"] or field["num_attention_heads"])
    return tuple(layout(*pair, group) for pair in zip(calibration.moments, identity.layers, strict=True))


def _nvfp4(moments: Moments, bases: LayerBases, group: int) -> LayerPlan:
    """Scale each layer by the root mean square of its keys and of its values."""
    layouts = []
    for moment in (moments.k, moments.v):
        mean = moment.diagonal(dim1=-2, dim2=-1).mean() / moments.tokens
        layouts.append(Float4(moment.shape[-1], float(mean.sqrt())))
    return LayerPlan(*layouts)


def _block_gtq(moments: Moments, bases: LayerBases, group: int, bits: tuple[int, int]) -> LayerPlan:
    """Give bits to pairs of coordinates a half of the head apart, which RoPE rotates together, and all values alike."""
    squares = (moments.q / group + moments.k).diagonal(dim1=-2, dim2=-1) / (2 * moments.tokens)
    energy = squares.unflatten(-1, (2, -1)).sum(-2)
    by_axis = block_bits(energy.cpu(), bits[0]).repeat(1, 2)
    axes = bases.key_basis.abs().argmax(dim=-2).cpu()  # the axis that each coordinate of the identity basis is
    keys = BlockBits(tuple(map(tuple, by_axis.gather(1, axes).tolist())))
    values = torch.full(bases.value_basis.shape[:2], bits[1], device="cpu")
    return LayerPlan(keys, BlockBits(tuple(map(tuple, values.tolist()))))
