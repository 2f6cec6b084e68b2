"""The CUDA kernel on a CPU, thread by thread, against float64 on what is stored; and what compilers make of it.

The kernel rounds queries to half precision, and weights to that or to the dtype. Each error is held to a bound that
is derived (`bounds`), and as a whole to what independent errors of weights give (`check`).
"""

import dataclasses
import math
import shutil

import pytest
import torch
from torch import Tensor

from swan import Graded, Packed, Plan, pack
from swan.functional import reference
from swan.kernels.cuda import missing
from swan.kernels.cuda.build import compile_now
from swan.storage.codes import PARTS, scale_of
from swan.storage.packed import mixing, unpack_mixed
from tests.compilers import needs_cxx
from tests.kernels.attend_cuda import SOURCE, Recent, attend, macros
from tests.strategies import U32, assert_lse_within, assert_within, lse_bound, normal, one_thread  # noqa: F401

needs_nvrtc = pytest.mark.skipif(missing() is not None, reason=f"{missing()}")

# Every number of bits; groups of 16 and 48; in words, in bytes and across them; pruned and of 16 bits; several parts.
SMALL = Graded(((16, 5), (16, 3), (32, 1))), Graded(((16, 3), (48, 2)))
LAYOUTS = [
    SMALL,
    (Graded(((16, 8), (48, 5))), Graded(((48, 8), (16, 6)))),
    (Graded(((16, 3), (32, 2), (16, 16), (48, 0), (16, 4))), Graded(((16, 4), (32, 0), (16, 1), (48, 16), (16, 5)))),
    (Graded(((16, 6),)), Graded(((16, 1),))),
    (Graded(((32, 6), (32, 5), (64, 3))), Graded(((128, 4),))),
]
MORE = [
    (Graded(((48, 1), (80, 3), (16, 0), (112, 6))), Graded(((80, 3), (48, 1), (112, 5), (16, 0)))),
    (Graded(((48, 2), (48, 4))), Graded(((48, 4), (48, 3)))),
    (Graded.leading(64, 32), Graded(((16, 2), (16, 5), (16, 16)))),
    (Graded(((64, 16),)), Graded(((112, 2),))),
    (Graded(((16, 4), (80, 1))), Graded(((80, 6), (16, 8)))),
    (Graded(((256, 4),)), Graded(((256, 3),))),
    (Graded(((112, 8),)), Graded(((16, 16), (48, 5), (16, 2)))),
]
PLANS = [
    Plan.for_retention(retention, dims=[(d, d)]).layers[0]
    for d in (64, 128)
    for retention in (0.18, 0.2, 0.25, 0.3, 0.4, 0.5)
]
ADVISED = [(plan.keys, plan.values) for plan in PLANS if plan]


def wide(packed: Packed) -> Tensor:
    """Unpack the stored numbers, in mixed coordinates, without rounding."""
    return unpack_mixed(dataclasses.replace(packed, dtype=torch.float64)).double()


def mix(packed: Packed) -> Tensor:
    matrix = mixing(packed)
    return torch.eye(packed.format.d, dtype=torch.float64) if matrix is None else matrix.double()


def score_bound(q: Tensor, k: Packed, scale: float) -> float:
    """Bound the error of a score: of mixed queries, float64.

    A query is rounded to 2**-11. A field stands in the mantissa of a number of up to 2**(10 + shift) steps, and each
    product of tensor cores rounds a sum of such.
    """
    largest, scales = 0.0, 0
    keys = wide(k)
    for start, stop, bits in k.format.stored:
        part, size = q[..., start:stop].abs(), stop - start
        largest += 2.0**-11 * float(part.sum(-1).max() * keys[..., start:stop].abs().max())
        if bits in PARTS:
            step = float(scale_of(k.scales[..., scales]).max()) * 2.0 ** (1 - bits + 10 + bits - PARTS[bits][0])
            largest += U32 * (size / 16 * len(PARTS[bits]) + 4) * step * float(part.sum(-1).max())
            scales += 1
    return largest * abs(scale)


def visible(q: Tensor, tokens: int, mask=None, first=None, end=None, origin=0) -> Tensor | None:
    if mask is None and first is None and end is None:
        return None
    batch, heads, queries, _ = q.shape
    seen = torch.ones(batch, heads, queries, tokens, dtype=torch.bool)
    if mask is not None:
        seen &= mask
    if first is not None:
        seen &= torch.arange(tokens) + origin >= first[:, None, None, None]
    if end is not None:
        seen &= torch.arange(tokens) + origin < end[:, None]
    return seen


def parts_of(q, k, v, scale, recent, seen):
    """Keys and values of history and recent tokens in float64, plain coordinates, with what queries see of them."""
    parts = []
    if k.shape[2]:
        parts.append((wide(k) @ mix(k).mT, wide(v) @ mix(v).mT, seen))
    if recent:
        parts.append((recent.keys.double(), recent.values.double(), recent.mask))
    return parts


def expected_of(q, parts, scale):
    """Output, its log-sum-exp, and the output of the values' magnitudes."""
    found = [
        (*reference.dense_attention(q.double(), keys, values, mask=seen, scale=scale), keys, values, seen)
        for keys, values, seen in parts
    ]
    out, lse = reference.merge_attention([(out, lse) for out, lse, *_ in found])
    absolute = [
        (reference.dense_attention(q.double(), keys, values.abs(), mask=seen, scale=scale)[0], lse)
        for _, lse, keys, values, seen in found
    ]
    return out, lse, reference.merge_attention(absolute)[0]


def bounds(q, k, v, scale, recent, parts, magnitude) -> tuple[Tensor, float]:
    """Bound output and log-sum-exp.

    A weight is off by twice the error of a score (it is divided by the sum of weights) and rounded to 2**-9, in the
    coordinates in which values are stored; a mix makes that at most sqrt(size) times as large.
    """
    lse = max(lse_bound(q, keys, scale) for keys, _, _ in parts)
    if k.shape[2]:
        lse += score_bound(q.double() @ mix(k), k, scale)
    tokens, largest = sum(keys.shape[2] for keys, _, _ in parts), max(float(x.abs().max()) for _, x, _ in parts)
    spread = math.sqrt(max([size for size, bits in v.format.groups if bits in PARTS], default=1)) if k.shape[2] else 1.0
    relative = 2.0**-9 + 2 * lse
    return relative * spread * magnitude.amax(-1, keepdim=True) + 4 * U32 * (tokens + 16) * spread * largest, lse


def check(
    keys,
    values,
    dtype,
    heads,
    queries,
    tokens,
    splits=1,
    recent=None,
    *,
    batch=1,
    scale=None,
    seen=None,
    sizes=None,
    same=False,
    **others,
):
    """The kernels against float64.

    Args:
        keys, values, dtype, heads, queries, tokens, splits, batch, scale: what they are given.
        recent: a number of tokens.
        seen: the arguments that are masks, and the column of the first packed token.
        sizes: factors of the values of tokens, [tokens].
        same: the results are also those of two kernels, up to the order in which weights of parts are summed.
        others: see `attend`.
    """
    d = keys.d
    scale = d**-0.5 if scale is None else scale
    count = tokens + (recent or 0)
    q = normal(tokens, batch, heads[0], queries, d).to(dtype)
    k, v = (normal(tokens + i, batch, heads[1], count, n).to(dtype) for i, n in ((1, d), (2, values.d)))
    if sizes is not None:
        v = v * sizes[:, None].to(dtype)
    history = pack(k[:, :, :tokens], keys), pack(v[:, :, :tokens], values)
    seen = dict(seen or {})
    beside = Recent(k[:, :, tokens:], v[:, :, tokens:], seen.pop("recent_mask", None)) if recent else None
    out, lse = attend(q, *history, scale, splits, beside, **seen, **others)
    if same:
        for found, expected in zip((out, lse), attend(q, *history, scale, splits, beside, **seen), strict=True):
            torch.testing.assert_close(found, expected, rtol=torch.finfo(found.dtype).eps, atol=0)
    assert_right(out, lse, q, history, scale, beside, visible(q, tokens, **seen))


def assert_right(out, lse, q, history, scale, beside, masks):
    """What was found, against float64; `masks`: what queries see of the history."""
    parts = parts_of(q, *history, scale, beside, masks)
    expected, expected_lse, magnitude = expected_of(q, parts, scale)
    limit, lse_limit = bounds(q, *history, scale, beside, parts, magnitude)
    limit = limit + torch.finfo(q.dtype).eps * expected.abs()  # the rounding of outputs
    assert_within(out.double(), expected, limit)
    assert_lse_within(lse, expected_lse, lse_limit)
    # Tokens are independent, so errors of 2**-9 of each weight give an error of 2**-9 of the output or less, as norms.
    error, size = (out - expected).norm(dim=-1), expected.norm(dim=-1)
    assert (error <= 2 * 2.0**-9 * size).all(), f"{(error / size).max():.3g}"


def ids(layouts):
    return "-".join("+".join(f"{size}x{bits}" for size, bits in layout.groups) for layout in layouts)


def named(layouts, *marks):
    return [pytest.param(each, id=ids(each), marks=marks) for each in layouts]


@needs_cxx
@pytest.mark.parametrize("layouts", [*named(LAYOUTS), *named([*MORE, *ADVISED], pytest.mark.slow)])
def test_every_layout(layouts):
    dtype = (torch.bfloat16, torch.float16)[len(layouts[0].groups) % 2]
    settings = {"WARPS": 2} if layouts[0].d == 256 else {}
    for tokens, heads, queries in ((1, (1, 1), 1), (31, (3, 1), 1), (97, (8, 1), 1)):
        check(*layouts, dtype, heads, queries, tokens, **settings)
    check(*layouts, dtype, (4, 2), 3, 300, 3, 19, batch=2, **settings)


@needs_cxx
@pytest.mark.parametrize("rows", range(1, 9))
def test_query_rows(rows):
    check(*SMALL, torch.float16, (2 * rows, 2), 1, 70)


@needs_cxx
@pytest.mark.parametrize(("heads", "queries"), [((12, 1), 1), ((8, 2), 3), ((2, 2), 17)])
def test_more_than_eight_query_rows(heads, queries):
    check(*SMALL, torch.float16, heads, queries, 40, 2, 9)


@needs_cxx
@pytest.mark.parametrize("tokens", [1500, 384])
def test_stages_are_used_again(tokens):
    """A race between a copy and those who read its place shows in long spans only."""
    check(*SMALL, torch.float16, (4, 1), 1, tokens)


@needs_cxx
@pytest.mark.parametrize("recent", [1, 16, 100])
def test_recent_tokens_alone(recent):
    check(*SMALL, torch.float16, (4, 2), 2, 0, recent=recent, batch=2)


def some(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


MASKS = {
    "first": {"first": torch.tensor([0, 150])},
    "first behind all": {"first": torch.tensor([200, 33])},
    "end": {"end": torch.tensor([64, 3, 200])},
    "end before all": {"end": torch.tensor([0, 96, 130])},
    "first and end": {"first": torch.tensor([70, 5]), "end": torch.tensor([80, 60, 161])},
    "one end": {"end": torch.tensor([77])},
    "end with a stride": {"end": torch.arange(12)[4::3] * 20},
    "columns": {"first": torch.tensor([70, 5]), "end": torch.tensor([80, 60, 161]), "origin": 20},
    "late columns": {
        "first": torch.tensor([0, 2**40 + 40]),
        "end": 2**40 + torch.tensor([9, 70, 900]),
        "origin": 2**40 + 5,
    },
    "mask": {"mask": some(0, 2, 4, 3, 200)},
    "the same mask": {"mask": some(1, 1, 1, 3, 200)},
    "one query's mask": {"mask": some(2, 2, 1, 1, 200).expand(2, 1, 3, 200)},
    "strided": {"mask": some(3, 200, 2, 3, 1).permute(1, 3, 2, 0)},
    "recent": {"recent_mask": some(4, 2, 4, 3, 21)},
    "all": {
        "first": torch.tensor([3, 40]),
        "end": torch.tensor([70, 180, 199]),
        "mask": some(5, 2, 1, 3, 200),
        "recent_mask": some(6, 1, 1, 3, 21),
    },
}


@needs_cxx
@pytest.mark.parametrize("seen", MASKS.values(), ids=MASKS.keys())
def test_masks(seen):
    check(*SMALL, torch.float16, (4, 2), 3, 200, 2, 21, batch=2, seen=seen)


@needs_cxx
def test_what_is_behind_the_last_seen_token_is_not_read():
    """There numbers of 16 bits may be anything, also none."""
    keys, values = LAYOUTS[2]
    q, k, v = (normal(i, 1, n, t, 128).half() for i, n, t in ((0, 2, 1), (1, 1, 100), (2, 1, 100)))
    k, v = pack(k, keys), pack(v, values)
    for packed in (k, v):
        packed.planes[1][:, :, 45:] = math.nan
    found = attend(q, k, v, 0.1, 2, end=torch.tensor([45]))
    expected = attend(q, k.tokens(0, 45), v.tokens(0, 45), 0.1)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


@needs_cxx
def test_rows_that_see_nothing():
    mask = torch.ones(2, 4, 1, 70, dtype=torch.bool)
    mask[0, 1] = False
    q, k, v = (normal(i, 2, n, t, 64).half() for i, n, t in ((0, 4, 1), (1, 2, 70), (2, 2, 70)))
    out, lse = attend(q, pack(k, SMALL[0]), pack(v, SMALL[1]), 0.1, 2, mask=mask)
    assert (out[0, 1] == 0).all() and (lse[0, 1] == -math.inf).all()
    assert (out.norm(dim=-1) > 0).sum() == lse.isfinite().sum() == 7


@needs_cxx
@pytest.mark.parametrize("scale", [3.0, -0.1, 0.0, 1e-3])
def test_scales(scale):
    check(*SMALL, torch.float16, (4, 1), 1, 90, 1, 9, scale=scale)


@needs_cxx
@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("layouts", [named([SMALL])[0], *named(LAYOUTS[2:3], pytest.mark.slow)])
def test_values_of_any_magnitude(layouts, falling):
    """Scales multiply weights in half precision, which are less than 2**16."""
    sizes = 2.0 ** (torch.arange(600) // 30 - 12.0)
    check(*layouts, torch.bfloat16, (4, 1), 1, 600, 2, sizes=sizes.flip(0) if falling else sizes)


@needs_cxx
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**14, 2.0**100])
def test_queries_of_any_magnitude(factor):
    """Half precision holds 2**-24 to 2**16; queries may have any magnitude, each row its own."""
    keys, values = SMALL
    q, k, v = (normal(i, 1, n, t, 64).bfloat16() for i, n, t in ((0, 4, 1), (1, 1, 70), (2, 1, 70)))
    history = pack(k, keys), pack(v, values)
    factors = torch.tensor([1, factor, 1, factor], dtype=torch.bfloat16)[:, None, None]
    out, lse = attend(q, *history, 0.1)
    scaled, scaled_lse = attend(q * factors, *history, 0.1 / factor)
    assert torch.equal(out[:, 1::2], scaled[:, 1::2]) and torch.equal(lse[:, 1::2], scaled_lse[:, 1::2])


@needs_cxx
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_queries_that_are_not_finite_show(value):
    q, k, v = (normal(i, 1, n, t, 64).half() for i, n, t in ((0, 4, 1), (1, 2, 70), (2, 2, 70)))
    q[0, 1, 0, 3] = value
    out, lse = attend(q, pack(k, SMALL[0]), pack(v, SMALL[1]), 0.1, 1, Recent(k[:, :, :9], v[:, :, :9]))
    assert not out[0, 1].isfinite().any() and lse[0, 1].isnan()
    assert out[0, [0, 2, 3]].isfinite().all() and lse[0, [0, 2, 3]].isfinite().all()


@needs_cxx
@pytest.mark.parametrize("token", [3, 68, slice(None)])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_tokens_that_are_no_numbers_show(name, token):
    """In their KV head, whether they are some of the tokens or all; others do not see them."""
    q, k, v = (normal(i, 1, n, t, 64).half() for i, n, t in ((0, 4, 1), (1, 2, 70), (2, 2, 70)))
    for x in (k, v):
        if (x is k) == (name == "keys"):
            x[0, 1, token, 5] = math.nan
    out, lse = attend(q, pack(k, SMALL[0]), pack(v, SMALL[1]), 0.1, 2)
    assert out[0, 2:].isnan().any(-1).all() and out[0, :2].isfinite().all()
    assert lse[0, :2].isfinite().all() and bool(lse[0, 2:].isnan().all()) == (name == "keys")


@needs_cxx
@pytest.mark.parametrize("layouts", [*named([SMALL]), *named([*LAYOUTS[3:], MORE[1], MORE[4]], pytest.mark.slow)])
def test_numbers_of_four_bytes(layouts):
    check(*layouts, torch.float32, (8, 2), 3, 150, 2, batch=2)
    check(*layouts, torch.float32, (3, 1), 1, 33, 2, last_merges=True, same=True)


MERGES = {
    "splits": {"heads": (4, 2), "queries": 1, "tokens": 700, "splits": 20},
    "recent tokens too": {"heads": (4, 1), "queries": 3, "tokens": 130, "splits": 3, "recent": 9},
    "one part": {"heads": (1, 1), "queries": 1, "tokens": 20, "splits": 1},
    "recent tokens alone": {"heads": (2, 2), "queries": 1, "tokens": 0, "splits": 1, "recent": 30},
}


@needs_cxx
@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize("case", MERGES.values(), ids=MERGES)
def test_the_last_program_merges(case, in_turns):
    """As the second kernel does, up to the order of one sum, whichever program is the last one."""
    check(*SMALL, torch.float16, **case, batch=2, last_merges=True, in_turns=in_turns, same=True)


@needs_cxx
@pytest.mark.parametrize("fence", [0, 1])
def test_the_last_program_waits_for_what_others_wrote(fence, tmp_path):
    for file in SOURCE.parent.glob("*.cu*"):
        shutil.copy(file, tmp_path)
    parts = (tmp_path / "merge.cuh").read_text().split("__threadfence();")
    assert len(parts) == 3
    parts[fence : fence + 2] = ["".join(parts[fence : fence + 2])]
    (tmp_path / "merge.cuh").write_text("__threadfence();".join(parts))
    with pytest.raises(AssertionError, match=r"race: .* not ordered after .* programs? "):
        check(*SMALL, torch.float16, (4, 1), 1, 90, 2, last_merges=True, source=tmp_path / SOURCE.name)


@needs_nvrtc
@pytest.mark.parametrize(
    ("layouts", "dtype", "message"),
    [
        (LAYOUTS[2], torch.float32, "groups of 16 bits are numbers of two bytes"),
        ((Graded(((24, 4),)), Graded(((16, 4),))), torch.float16, "sizes of groups are not multiples of 16"),
    ],
)
def test_what_the_kernel_does_not_take(layouts, dtype, message):
    with pytest.raises(RuntimeError, match=message):
        compile_now(SOURCE, macros(*layouts, dtype), "sm_90")
