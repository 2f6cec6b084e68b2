"""Inputs, derived error bounds and oracles that the tests share."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from swan import Graded, LayerPlan, Packed, TopK, pack, random_rotation, unpack
from swan.functional import reference
from swan.modules import visible
from swan.storage.codes import PARTS
from swan.storage.packed import unpack_mixed
from tests.coding import stored_range

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(3, 3), (4, 2), (6, 2), (5, 1)]  # query and KV heads: MHA, GQA, MQA
U32 = torch.finfo(torch.float32).eps / 2

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)
heads = st.sampled_from(HEADS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: on small tensors threads only wait, far too long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """For modules that import it: windowed chunks are attended to in many blocks, as those of long prompts are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visible, "QUERIES", 5)
        yield


def ids(value):
    """Short ids of parameters."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# Inputs -------------------------------------------------------------------------------------------


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distinct(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors whose coordinates have the magnitudes 1 to d: exact in every dtype, and no two are equal."""
    random = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return ((random.argsort(-1) + 1) * torch.where(random < 0.5, -1, 1)).to(dtype)


def qkv(seed: int, batch: int, head_counts: tuple[int, int], queries: int, tokens: int, d: int, dv: int, dtype):
    count, kv_count = head_counts
    shapes = (batch, count, queries, d), (batch, kv_count, tokens, d), (batch, kv_count, tokens, dv)
    return [normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def bases(seed: int, kv_heads: int, d: int, kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "identity":
        return torch.eye(d, dtype=dtype).repeat(kv_heads, 1, 1)
    return random_rotation(kv_heads, d, seed=seed, dtype=dtype)


@st.composite
def topk_layouts(draw, d, bits=(8, 16)):
    return TopK(d, draw(st.integers(1, d)), draw(st.sampled_from(bits)), draw(st.sampled_from(["bitmap", "index"])))


@st.composite
def graded_layouts(draw, d):
    cuts = sorted(draw(st.sets(st.integers(1, d - 1), max_size=3)))
    kept = draw(st.booleans())  # bits alternate from here
    sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, d], strict=True)]
    groups = [(size, 16 if (i % 2 == 0) == kept else 0) for i, size in enumerate(sizes)]
    return Graded(tuple(groups)) if any(bits for _, bits in groups) else Graded(((d, 16),))


@st.composite
def any_graded(draw, d):
    """Up to five groups of any bits."""
    cuts = sorted(draw(st.sets(st.integers(1, d - 1), max_size=4)))
    bits = st.sampled_from([0, *PARTS, 16])
    groups = [(stop - start, draw(bits)) for start, stop in itertools.pairwise([0, *cuts, d])]
    return Graded(tuple(groups)) if any(bits for _, bits in groups) else Graded(((d, 4),))


@st.composite
def coded_layouts(draw, d):
    """`Graded` with up to four groups of any size and bits."""
    cuts = sorted(draw(st.sets(st.integers(1, d - 1), max_size=3)))
    sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, d], strict=True)]
    bits = draw(st.lists(st.sampled_from([0, *PARTS, 16]), min_size=len(sizes), max_size=len(sizes)))
    return Graded(tuple(zip(sizes, bits, strict=True))) if any(bits) else Graded(((d, 3),))


def layouts(d, bits=(8, 16)):
    return topk_layouts(d, bits) | graded_layouts(d)


@st.composite
def plan_layers(draw, d, dv, bits=(8, 16)):
    return LayerPlan(draw(layouts(d, bits)), draw(layouts(dv, bits)))


@st.composite
def splits(draw, tokens):
    """Chunk sizes that sum to `tokens`."""
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=6))) if tokens > 1 else []
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True)]


# Error bounds: first order, from the unit roundoff u of each dtype ---------------------------------


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def largest_score(q: Tensor, k: Tensor, scale: float | None = None) -> float:
    """Cauchy-Schwarz, the log of the number of tokens added: no score and no log-sum-exp is larger."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if 0 in q.shape or 0 in k.shape:
        return 0.0
    peak = factor * q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()
    return float(peak) + math.log(k.shape[2])


def lse_bound(q: Tensor, k: Tensor, scale: float | None = None, impl: str | None = None) -> float:
    """A score is d products, d sums and a factor; then peak, exp, a sum over tokens, log, and merges.

    A sum of positive numbers is off by no more (relative) than each of them: in bfloat16 and float16 torch's SDPA has
    exponentials on a CPU that are off by up to 9.3e-5, below 2**-13 (for fewer tokens than a vector has lanes exact
    ones, so that with AVX-512 short rows do not show it).
    """
    exponential = 2.0**-13 if impl in ("sdpa", "auto") and q.dtype in (torch.bfloat16, torch.float16) else 0.0
    return U32 * ((q.shape[-1] + 8) * largest_score(q, k, scale) + k.shape[2] + 16) + exponential


def attention_bound(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> float:
    """Largest error of an attention output: scores, softmax and merges in float32, the rest in the dtype.

    A weight is a quotient of two exponentials and a sum, so it is off by twice the error of a log-sum-exp
    (relative); the product with the values sums over tokens again. Weights, each part's output and the merged
    output are rounded to the dtype; a weight below its smallest normal number is off by u times that.
    """
    if 0 in v.shape:
        return 0.0
    u, tiny = unit(v.dtype), torch.finfo(v.dtype).smallest_normal
    relative = 2 * lse_bound(q, k, scale) + U32 * k.shape[2] + u * (3 + k.shape[2] * tiny)
    return relative * float(v.double().abs().max())


def assert_within(actual: Tensor, expected: Tensor, bound: float | Tensor, what: str = "error") -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all(), f"{what}: not finite"
    error = (actual.double() - expected.double()).abs()
    limit = torch.as_tensor(bound, dtype=torch.float64)
    assert (error <= limit).all(), f"{what}: {(error - limit).max():.3g} above its bound {limit.max():.3g}"


def assert_lse_within(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.dtype == torch.float32
    nothing = expected == -math.inf
    assert torch.equal(actual == -math.inf, nothing)
    assert_within(actual.masked_fill(nothing, 0), expected.masked_fill(nothing, 0), bound, "log-sum-exp")


# Oracles ------------------------------------------------------------------------------------------


def stored(x: Tensor, layout) -> Tensor:
    """Return `x` as a cache stores it (tests/storage/test_packed.py checks that it is right)."""
    return unpack(pack(x, layout))


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def windowed_oracle(q, k, v, plan_layer, **settings) -> Tensor:
    """`reference.windowed_attention` in float64 on what the layouts store."""
    pruned = stored(k, plan_layer.keys), stored(v, plan_layer.values)
    return reference.windowed_attention(*double(q, k, v, *pruned), **settings)


def decode(cache, q: Tensor, k: Tensor, v: Tensor, chunks, *, padding: Tensor | None = None, mask=None) -> Tensor:
    """The outputs of a sequence that a cache takes in chunk by chunk."""
    outs, start = [], 0
    for size in chunks:
        stop = start + size
        seen = None if mask is None else mask[:, :, start:stop]
        outs.append(cache(*(t[:, :, start:stop] for t in (q, k, v)), padding=padding, mask=seen))
        start = stop
    return torch.cat(outs, dim=2)


def assert_packed(found: Packed, x: Tensor, mixed: Tensor, rounding: Tensor | float = 0.0) -> None:
    """A `Graded` layout stores `x`, in mixed coordinates `mixed` (float64) that the packer knew up to `rounding`.

    `stored_range` says what each scale and each coordinate may be.
    """
    assert isinstance(found.format, Graded)
    values, scale, u = unpack_mixed(found).double(), 0, unit(x.dtype)
    for start, stop, bits in found.format.stored:
        if bits == 16:
            assert torch.equal(unpack(found)[..., start:stop], x[..., start:stop])
            continue
        assert found.scales is not None
        byte, number = found.scales[..., scale : scale + 1], values[..., start:stop]
        least, most, first, last = stored_range(mixed[..., start:stop], rounding, bits)
        assert ((first <= byte) & (byte <= last)).all()
        loose = u * number.abs() + torch.finfo(x.dtype).tiny * u
        assert ((least - loose <= number) & (number <= most + loose))[(byte < 255).expand_as(number)].all()
        scale += 1
