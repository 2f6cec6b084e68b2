"""Groups with few bits: their grid, their bytes, and attention in mixed coordinates."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Graded, Packed, TopK, graded_prune, pack, packed_attention, topk_prune, unpack
from swan.functional import reference
from swan.functional.dispatch import Impl
from swan.storage.codes import PARTS
from swan.storage.mixing import hadamard
from swan.storage.packed import mixing, unpack_mixed
from tests.coding import scale_of, stored_range

EPS = torch.finfo(torch.float32).eps
GROUPS = [
    ((16, 5), (48, 3)),
    ((5, 1), (12, 2), (7, 0), (9, 16), (31, 6)),
    ((63, 8),),
    ((24, 4), (8, 0)),
    ((1, 1), (15, 16)),
]
IDS = ["5+3", "ragged", "odd", "pruned tail", "one bit"]
every_impl = pytest.mark.parametrize("impl", ["auto", "compiled"])  # auto: the kernel, where it is built


def spectrum(*shape: int) -> torch.Tensor:
    """Vectors whose coordinates lose importance, as in a sorted basis."""
    return torch.randn(*shape) * torch.linspace(3, 0.2, shape[-1])


def read_by_hand(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors in mixed coordinates and the scale of each, from the bytes, bit by bit, as `Graded` says it stores."""
    layout = packed.format
    assert isinstance(layout, Graded)
    planes = [plane.flatten(0, 2).tolist() for plane in (*packed.planes, packed.scales) if plane is not None]
    vectors = []
    for vector in zip(*planes, strict=True):
        codes, whole, scales = list(vector[0]), list(vector[len(packed.planes) - 1]), list(vector[-1])
        numbers: list[tuple[float, float]] = []
        for size, bits in layout.groups:
            if bits in (0, 16):
                numbers += [(whole.pop(0) if bits else 0.0, 0.0) for _ in range(size)]
                continue
            fields = [0] * size
            for part in {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}[bits]:
                width = math.ceil(size * part / 8)
                plane, codes = codes[:width], codes[width:]
                for i in range(size):
                    fields[i] = fields[i] << part | plane[i * part // 8] >> i * part % 8 & 2**part - 1
            scale = 2.0 ** (scales.pop(0) / 8 - 16)
            numbers += [((n - (2**bits - 1) / 2) * 2.0 ** (1 - bits) * scale, scale) for n in fields]
        vectors.append(numbers)
    values, scales = torch.tensor(vectors, dtype=torch.float64).view(*packed.shape, 2).unbind(-1)
    return values, scales


@st.composite
def coded_groups(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    count = draw(st.integers(1, 4))
    groups = [(draw(st.integers(1, 40)), draw(st.sampled_from((0, 16, *PARTS)))) for _ in range(count)]
    return tuple(groups) if any(bits for _, bits in groups) else ((draw(st.integers(1, 40)), 4),)


@given(coded_groups(), st.integers(0, 2**31))
def test_error_is_half_a_step_or_across_the_vector(groups: tuple[tuple[int, int], ...], seed: int) -> None:
    """Of more than three bits; what fewer store is as long along a group as the group, up to half a step of scales."""
    torch.manual_seed(seed)
    layout = Graded(groups)
    x = spectrum(2, 2, 5, layout.d)
    packed = pack(x, layout)
    matrix = mixing(packed)
    mixed = x if matrix is None else x @ matrix
    found = unpack_mixed(packed)
    scales = iter(packed.scales.split(1, dim=-1) if packed.scales is not None else ())
    rounding = 4 * layout.d * EPS * x.abs().amax()  # of the mix, and of quotients near a step's edge
    for start, stop, bits in layout.stored:
        group, read = mixed[..., start:stop], found[..., start:stop]
        if bits == 16:
            assert torch.equal(read, group)
            continue
        scale = scale_of(next(scales))
        if bits > 3:
            assert ((read - group).abs() <= scale * 2.0**-bits + rounding).all()
        else:
            along, square = (read * group).sum(-1).double(), group.square().sum(-1).double()
            assert ((along / square).log2().abs() <= 1 / 16 + 1e-5).all()
            assert ((read * group).amin(-1) >= -scale[..., 0] * rounding).all()  # no number has changed its sign
    assert packed.nbytes == x[..., 0].numel() * layout.vector_bytes(itemsize=4)


@every_impl
@pytest.mark.parametrize("groups", [*GROUPS, tuple((7, bits) for bits in PARTS)], ids=[*IDS, "every bits"])
def test_bytes_are_what_is_said(groups: tuple[tuple[int, int], ...], impl: Impl) -> None:
    """Read without any of its code: the steps and the scales of `stored_range`, and `unpack` reads the same."""
    x = spectrum(1, 2, 7, sum(size for size, _ in groups))
    packed, mixed = pack(x, Graded(groups), impl=impl), x.double() @ reference.mix(groups)
    values, scales = read_by_hand(packed)
    rounding = 4 * x.shape[-1] * EPS * x.abs().amax()  # of the mix, and of quotients near a step's edge
    start = 0
    for size, bits in groups:
        here = slice(start, start + size)
        start += size
        expected, number = mixed[..., here], values[..., here]
        if bits in PARTS:
            least, most, first, last = stored_range(expected, rounding.double(), bits)
            assert ((least <= number) & (number <= most)).all()
            byte = 8 * scales[..., here].log2() + 128
            assert ((first - 1e-9 <= byte) & (byte <= last + 1e-9)).all()
        else:
            assert ((number - expected * (bits == 16)).abs() <= rounding).all()
    found = unpack(dataclasses.replace(packed, dtype=torch.float64))
    assert (found - values @ reference.mix(groups).mT).abs().max() <= rounding


@every_impl
def test_a_peak_on_the_grid_of_scales(impl: Impl) -> None:
    """A scale is then no larger than its coordinate, which falls on the end of the last step."""
    layout = Graded(tuple((1, bits) for bits in PARTS if bits > 3))
    x = torch.tensor([1.0, -1.0, 2.0, -0.25]).view(1, 1, 4, 1).expand(1, 1, 4, layout.d)
    values, scales = read_by_hand(pack(x, layout, impl=impl))
    assert torch.equal(scales, x.abs().double())
    assert torch.equal(x.abs() - values.abs(), scales * 0.5 ** torch.tensor([bits for _, bits in layout.groups]))


@every_impl
def test_one_number_of_few_bits_takes_the_outermost_step(impl: Impl) -> None:
    """Its scale is the one with which that is nearest to the number: the middle of the step is what is read."""
    layout = Graded(tuple((1, bits) for bits in PARTS if bits <= 3))
    x = torch.tensor([1.0, -1.0, 2.0, -0.25, 1e4, 0.0]).view(1, 1, 6, 1).expand(1, 1, 6, layout.d)
    values, _ = read_by_hand(pack(x, layout, impl=impl))
    assert ((values / x)[..., :5, :].log2().abs() <= 1 / 16 + 1e-6).all()
    assert (values[..., 5, :].abs() <= 2.0**-17).all()


@every_impl
@pytest.mark.parametrize("groups", GROUPS, ids=IDS)
def test_equals_reference(groups: tuple[tuple[int, int], ...], impl: Impl) -> None:
    x = spectrum(1, 2, 7, sum(size for size, _ in groups))
    expected = reference.graded_prune(x.double(), groups)
    found = unpack(pack(x, Graded(groups), impl=impl if Graded(groups).mixed else "auto"))
    assert (found - graded_prune(x, groups)).abs().max() <= 8 * x.shape[-1] * EPS * x.abs().max()
    # A coordinate within rounding of a step's edge may take the neighbouring step; none does at this seed.
    assert (found - expected).abs().max() <= 8 * x.shape[-1] * EPS * x.abs().max()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 24, 63, 64, 80])
def test_mix_is_orthonormal_and_even(size: int) -> None:
    matrix = hadamard(size, torch.device("cpu"))
    torch.testing.assert_close(matrix, reference.hadamard(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.square().sum(0), torch.ones(size, dtype=torch.float64))
    if size & (size - 1) == 0:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_codes_are_nested() -> None:
    x = spectrum(1, 1, 50, 64)
    fine, coarse = (pack(x, Graded(((64, bits),))) for bits in (6, 4))
    assert torch.equal(fine.planes[0][..., :32], coarse.planes[0])
    assert fine.scales is not None and coarse.scales is not None
    assert torch.equal(fine.scales, coarse.scales)


def test_16_and_0_bits_are_exact_and_unmixed() -> None:
    x = spectrum(1, 2, 5, 48)
    packed = pack(x, Graded(((16, 16), (24, 0), (8, 16))))
    assert mixing(packed) is None
    assert torch.equal(unpack(packed), torch.cat([x[..., :16], torch.zeros(1, 2, 5, 24), x[..., 40:]], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-6, 1.0, 1e4])
def test_extreme_vectors_stay_finite(dtype: torch.dtype, value: float) -> None:
    x = torch.full((1, 1, 3, 16), value, dtype=dtype)
    found = unpack(pack(x, Graded(((8, 4), (8, 2)))))
    assert torch.isfinite(found).all()
    peak = 8**0.5 * value  # Hadamard gathers equal coordinates into one
    assert (found - x).double().norm() <= 2 * (max(peak, 2.0**-16) * 4 + peak * torch.finfo(dtype).eps)


@every_impl
@pytest.mark.parametrize(("groups", "others"), list(itertools.pairwise([*GROUPS, GROUPS[0]])), ids=IDS)
def test_attention_reads_mixed_coordinates(
    groups: tuple[tuple[int, int], ...], others: tuple[tuple[int, int], ...], impl: Impl
) -> None:
    """Keys and values are mixed each in their own groups."""
    k, v = (pack(spectrum(2, 2, 37, Graded(each).d), Graded(each)) for each in (groups, others))
    q = torch.randn(2, 4, 3, k.shape[3])
    keys, values = (read_by_hand(x)[0] @ reference.mix(x.format.groups).mT for x in (k, v))
    expected, _ = reference.dense_attention(q.double(), keys, values)
    found = packed_attention(q, k, v, impl=impl).double()
    torch.testing.assert_close(found, expected, atol=64 * k.shape[3] * EPS, rtol=0)


@pytest.mark.parametrize("keep", [17, 9, 4])
def test_topk_with_four_bits(keep: int) -> None:
    x = torch.randn(1, 2, 9, 17)
    packed = pack(x, TopK(17, keep, bits=4))
    assert packed.nbytes == 18 * TopK(17, keep, bits=4).vector_bytes()
    assert packed.scales is not None
    error = (unpack(packed) - topk_prune(x, keep)).abs()
    assert (error <= scale_of(packed.scales) / 16 * (1 + 8 * EPS)).all()
    assert ((unpack(packed) != 0).sum(-1) == keep).all()


def test_compiles_whole() -> None:
    layout = Graded(((16, 5), (40, 3), (8, 0)))
    x, q = spectrum(1, 2, 9, 64), torch.randn(1, 4, 1, 64)

    def step(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        packed = pack(x, layout)
        return packed_attention(q, packed, packed)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, x), step(q, x))
