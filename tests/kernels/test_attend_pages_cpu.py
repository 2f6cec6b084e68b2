"""The kernel over pages against the same kernel over each sequence alone, which other tests hold to float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swan import Graded, pack
from swan.kernels import Recent, calls
from tests.kernels.test_attend_cpu import bounds, layouts_of, wide
from tests.strategies import dtypes, normal, seeds

pytestmark = pytest.mark.usefixtures("cpu_variant")
D = 32
LAYOUTS = [layout for layout in layouts_of(D) if isinstance(layout, Graded)]


def in_pages(packed, table, page: int, pages: int):
    """Lay packed vectors [batch, ...] into pages, as a table says; what no sequence has is 255, not a number."""
    each, tokens = table.shape[1], packed.shape[2]

    def lay(plane):
        room = torch.nn.functional.pad(plane, (0, 0, 0, each * page - tokens))
        pool = torch.full((pages, room.shape[1], page, room.shape[3]), 255).to(plane.dtype)
        pool[table] = room.unflatten(2, (each, page)).transpose(1, 2)
        return pool

    return packed.map(lay)


def check(seed, dtype, keys, values, page, lengths, queries, heads, beside, first=0):
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, kv_heads = len(lengths), max(lengths), 2
    q = normal(seed, batch, heads, queries, D).to(dtype)
    k, v = (
        pack(normal(seed + n, batch, kv_heads, max(tokens, 1), D).to(dtype), layout)
        for n, layout in ((1, keys), (2, values))
    )
    near = [normal(seed + n, batch, kv_heads, beside, D).to(dtype) for n in (3, 4)]
    mask = torch.rand(batch, 1, queries, beside, generator=generator) > 0.5
    mask[..., 0] = True
    each = -(-max(tokens, 1) // page)
    pages = batch * each + 3
    table = torch.randperm(pages, generator=generator)[: batch * each].view(batch, each)
    k_pages, v_pages = (in_pages(x, table, page, pages) for x in (k, v))
    # Of each sequence, its last query sees all of it, the one before a token less, and so on.
    ends = torch.tensor([[max(length - behind, 0) for behind in range(queries)][::-1] for length in lengths])
    out, lse = calls.attend_pages(q, k_pages, v_pages, table, first, ends, D**-0.5, Recent(*near, mask))
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        stored = [x.map(lambda plane, one=one: plane[one]).tokens(0, max(length, 1)) for x in (k, v)]
        columns = torch.arange(max(length, 1))
        seen = (columns >= first) & (columns < ends[b][:, None])
        recent = Recent(near[0][one], near[1][one], mask[one])
        expected, expected_lse = calls.attend(q[one], *stored, seen[None, None], D**-0.5, recent)
        most, score = bounds(q[one], *map(wide, stored))
        assert (out[one] - expected).abs().max() <= 2 * most
        assert (lse[one] - expected_lse).abs().max() <= 2 * score


@pytest.mark.parametrize("values", LAYOUTS, ids=str)
@pytest.mark.parametrize("page", [64, 128])
def test_layouts(values, page):
    check(3, torch.float32, LAYOUTS[4], values, page, (1, 130, 64, 700), 1, 6, beside=16)
    check(4, torch.float32, values, LAYOUTS[2], page, (65, 0, 128), 2, 4, beside=3)


@given(
    seeds,
    dtypes,
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.sampled_from([64, 128, 256]),
    st.lists(st.integers(0, 900), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([0, 4, 70]),
)
def test_any_sequences(seed, dtype, keys, values, page, lengths, queries, heads, first):
    check(seed, dtype, keys, values, page, lengths, queries, heads, beside=5, first=first)


def test_pages_that_are_not_there():
    """A wrong table is an error, not another sequence."""
    packed = pack(torch.randn(2, 2, 64, D), Graded(((D, 4),)))
    recent = Recent(*torch.randn(2, 1, 2, 4, D), torch.ones(1, 1, 1, 4, dtype=torch.bool))
    q = torch.randn(1, 4, 1, D)

    def attend(table, end, pages=packed):
        return calls.attend_pages(q, pages, pages, torch.tensor([table]), 0, torch.tensor([[end]]), 1.0, recent)

    attend([1, 7], 64)  # the second is not read
    for table in ([2, 0], [-1, 0], [1, 7]):
        with pytest.raises(RuntimeError, match=r"page \S+ of 2"):
            attend(table, 65)
    with pytest.raises(RuntimeError, match="more tokens than there are pages"):
        attend([1, 0], 129)
    with pytest.raises(RuntimeError, match="power of two"):
        attend([1, 0], 10, pack(torch.randn(2, 2, 192, D), Graded(((D, 4),))))
