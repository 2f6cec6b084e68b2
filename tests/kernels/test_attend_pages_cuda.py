"""The CUDA kernel over pages of a server, thread by thread on a CPU, against float64 on what is stored."""

import dataclasses
import math

import pytest
import torch

from swan import Graded, LayerPlan, Plan, pack
from swan.functional.dispatch import pages_kernel
from swan.integrations.vllm.layer import ServedLayer
from swan.integrations.vllm.pages import PageLayout
from swan.kernels import Recent, calls, cuda
from swan.kernels.cuda import attend
from swan.kernels.cuda.device import Limits
from tests.compilers import needs_cxx
from tests.integrations.test_vllm_pages import Server, states
from tests.kernels.emulated import emulated  # noqa: F401
from tests.kernels.test_attend_cuda import ADVISED, LAYOUTS, MORE, SMALL, assert_right, named
from tests.kernels.test_cuda_host import assert_like
from tests.strategies import normal

pytestmark = [needs_cxx, pytest.mark.usefixtures("small_gpu")]
SINKS = 3
WHOLE = LAYOUTS[2]  # with groups of 16 bits
ODD = Graded(((24, 5), (8, 16))), Graded(((32, 3),))  # of any size, which are only packed


@pytest.fixture
def small_gpu(emulated, monkeypatch):  # noqa: F811
    """A GPU of one processor: sequences are split a few times at most, so that warps have many tiles."""
    monkeypatch.setattr(attend, "limits", lambda index: Limits(1, 228 * 1024))
    return emulated


@dataclasses.dataclass
class Sequences:
    """Some of the sequences of a server: packed tokens in one piece, and in pages, of which they share a pool."""

    history: tuple  # keys and values [batch, kv_heads, tokens, d]
    pages: tuple
    table: torch.Tensor


def sequences(layouts, dtype, lengths, kv_heads, page):
    """Pack tokens and lay them into pages, in no order. Whatever no token was written to is no number."""
    batch, tokens = len(lengths), max(*lengths, 1)
    history = tuple(
        pack(normal(seed, batch, kv_heads, tokens, layout.d).to(dtype), layout, impl="compiled")
        for seed, layout in enumerate(layouts)
    )
    each = -(-tokens // page)
    count = batch * each + 2
    layout = PageLayout(LayerPlan(*layouts), page, dtype, SINKS)
    memory = torch.full((count, 3, kv_heads, page, layout.slot_bytes), 255, dtype=torch.uint8)
    pages = layout.pool(memory[:, 1])  # those of three layers lie side by side
    table = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: batch * each].view(batch, each)
    for packed, pool in zip(history, (pages.keys, pages.values), strict=True):
        for rows, plane in zip(packed.tensors, pool.tensors, strict=True):
            for b, length in enumerate(lengths):
                for token in range(0, length, page):
                    some = rows[b, :, token : min(token + page, length)]
                    plane[table[b, token // page], :, : some.shape[1]] = some
    for b, length in enumerate(lengths):
        table[b, -(-length // page) :] = 10**9  # there is no such page
    return Sequences(history, (pages.keys, pages.values), table)


def check(layouts, dtype, heads, queries, lengths, *, page=64, first=0, recent=9, masked=True):
    """Each sequence has tokens of its own number, and its last query sees all, the one before it a token less, ..."""
    batch, d, dv = len(lengths), *(layout.d for layout in layouts)
    found = sequences(layouts, dtype, lengths, heads[1], page)
    q = normal(7, batch, heads[0], queries, d).to(dtype)
    beside = [normal(8 + i, batch, heads[1], recent, n).to(dtype) for i, n in enumerate((d, dv))]
    mask = torch.rand(batch, 1, queries, recent, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., 0] = True
    beside = Recent(*beside, mask if masked else None)
    ends = torch.tensor([[max(length - behind, 0) for behind in range(queries)][::-1] for length in lengths])
    out, lse = calls.attend_pages(q, *found.pages, found.table, first, ends, d**-0.5, beside)
    columns = torch.arange(found.history[0].shape[2])
    seen = ((columns >= first) & (columns < ends[..., None]))[:, None]
    assert_right(out, lse, q, found.history, d**-0.5, beside, seen.expand(-1, heads[0], -1, -1))


@pytest.mark.parametrize("layouts", [*named([SMALL, WHOLE]), *named([*LAYOUTS[3:], *MORE, *ADVISED], pytest.mark.slow)])
def test_every_layout(layouts):
    dtype = (torch.bfloat16, torch.float16)[len(layouts[0].groups) % 2]
    check(layouts, dtype, (4, 2), 1, (131, 64, 0, 33))


@pytest.mark.parametrize("page", [64, 192, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [0, 4, 70])
def test_pages_of_any_number_of_tokens(page, first):
    check(SMALL, torch.float16, (4, 1), 1, (330, 70, 3), page=page, first=first)


@pytest.mark.parametrize("queries", [2, 3, 5])
def test_each_query_of_each_sequence_has_its_end(queries):
    """Also where query rows of a program are of several, and the next program has others."""
    check(WHOLE, torch.float16, (6, 2), queries, (129, 66, 1, 200))


def test_no_mask():
    check(SMALL, torch.float16, (2, 2), 2, (97, 64), masked=False)


def test_long_sequences():
    """A warp has a dozen tiles: places in shared memory are used again, pages looked up ahead."""
    check(SMALL, torch.float16, (1, 1), 1, (20, 3000), page=192)


def test_nothing_that_no_query_sees_is_read():
    """Behind the end of a sequence numbers of 16 bits and scales are NaN; a page that is not there is no memory."""
    found = sequences(WHOLE, torch.float16, (65, 10), 1, 64)
    near = [normal(i, 2, 1, 4, 128).half() for i in (1, 2)]
    q = normal(0, 2, 2, 1, 128).half()
    arguments = q, *found.pages, found.table, 0

    def run(*ends):
        return calls.attend_pages(*arguments, torch.tensor(ends)[:, None], 0.1, Recent(*near, None))[0]

    assert run(65, 10).isfinite().all()
    assert run(66, 10)[0].isnan().any(-1).all()
    with pytest.raises(AssertionError, match="out of bounds"):
        run(65, 65)


def test_a_compiled_call_is_the_same():
    """Its merge is a launch of its own."""
    found = sequences(SMALL, torch.float16, (150, 70), 2, 64)
    q, near = normal(0, 2, 4, 1, 64).half(), [normal(i, 2, 2, 5, 64).half() for i in (1, 2)]
    arguments = q, *found.pages, found.table, 3, torch.tensor([[150], [70]]), 0.1, Recent(*near, None)
    torch._dynamo.reset()
    compiled = torch.compile(calls.attend_pages, fullgraph=True)
    assert all(map(torch.equal, compiled(*arguments), calls.attend_pages(*arguments)))
    torch._dynamo.reset()


def test_what_kernels_do_not_read_is_refused():
    found = sequences(SMALL, torch.float16, (70,), 1, 64)
    q, near = normal(0, 1, 1, 1, 64).half(), Recent(*(normal(i, 1, 1, 4, 64).half() for i in (1, 2)), None)
    ends = torch.tensor([[70]])

    def run(pages=found.pages, table=found.table, ends=ends):
        return calls.attend_pages(q, *pages, table, 0, ends, 0.1, near)

    assert math.isfinite(float(run()[1]))
    for wrong in ({"table": found.table.int()}, {"table": found.table[0]}, {"ends": ends.int()}, {"ends": ends[0]}):
        with pytest.raises(ValueError, match=r"table \[batch, pages\] and ends \[batch, queries\] of int64"):
            run(**wrong)
    small = [pack(normal(0, 2, 1, 48, 64).half(), layout, impl="compiled") for layout in SMALL]
    with pytest.raises(ValueError, match="a multiple of 32 tokens"):
        run(small)
    odd = [
        pool.map(lambda p: torch.zeros(*p.shape[:3], p.shape[3] + 1, dtype=p.dtype)[..., 1:]) for pool in found.pages
    ]
    with pytest.raises(ValueError, match="follow each other"):
        run(odd)
    apart = [pool.map(lambda p: torch.zeros(p.numel() + 4, dtype=p.dtype)[4:].view(p.shape)) for pool in found.pages]
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        run(apart)


# Storing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layouts", "dtype"), [(SMALL, torch.bfloat16), pytest.param(ODD, torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_tokens_go_to_their_slots_and_nothing_else_changes(layouts, dtype, emulated):  # noqa: F811
    """Bytes are those of the kernel that packs; padding and places that are not there are left out."""
    d = layouts[0].d
    layout = PageLayout(LayerPlan(*layouts), 64, dtype, SINKS)
    memory = torch.randint(256, (5, 3, 2, 64, layout.slot_bytes), generator=torch.Generator().manual_seed(0)).byte()
    expected = memory.clone()
    k, v = (normal(i, 2, 21, d).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)[None] for i in (1, 2))
    slots = torch.randperm(5 * 64, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([64, 66, 67, 5 * 64 - 1, 2])  # sinks, the first that is none, the last slot
    slots = torch.cat([chosen, slots[~torch.isin(slots, chosen)]])[:21]
    slots[[6, 20]] = -1
    packed = [calls.store(x, each) for x, each in zip((k, v), layouts, strict=True)]
    emulated.done.clear()
    layout.pool(memory[:, 1]).write(slots, k, v)
    assert emulated.done == [("pack_pages", (3, 2, 2))] * 2  # packed, and dense
    pool = layout.pool(expected[:, 1])
    for i, slot in enumerate(slots.tolist()):
        page, place = divmod(slot, 64)
        for stored, rows in zip((pool.keys, pool.values), packed, strict=True):
            for plane, some in zip(stored.tensors, rows.tensors, strict=True):
                if slot >= 0:
                    plane[page, :, place] = some[0, :, i]
        if slot >= 0 and place < SINKS:
            pool.first.keys[page, :, place], pool.first.values[page, :, place] = k[0, :, i], v[0, :, i]
    assert torch.equal(memory, expected)


def test_slots_of_another_kind_are_refused():
    layout = PageLayout(LayerPlan(*SMALL), 64, torch.float16)
    pages = layout.pool(torch.zeros(2, 1, 64, layout.slot_bytes, dtype=torch.uint8))
    k = torch.zeros(1, 1, 3, 64).half()
    for slots in (torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected slots \[3\] of int64"):
            pages.write(slots, k, k)


def test_a_server(emulated):  # noqa: F811
    """Sequences that decode are attended together, by one launch, beside a prompt; each as it is alone."""
    plan = LayerPlan(Graded(((16, 5), (16, 16))), Graded(((16, 3), (16, 2))))
    server, new = Server(plan, dtype=torch.bfloat16, tokens=192, pages=16), {"a": 1, "b": 9, "c": 1, "d": 1}
    for seed, (name, length) in enumerate(zip(new, (250, 100, 1, 20), strict=True)):
        server.add(name, *(x.bfloat16() for x in states(length, seed)[1:]))
    assert {name for name, _ in emulated.done} == {"pack_pages"}
    q = states(sum(new.values()), 9)[0].bfloat16()
    emulated.done.clear()
    found, start = server.attend_together(q, new, buffer=20), 0
    assert emulated.kernels[-len(emulated.done)].defines[-1] == ("PAGE", 192)
    for name, count in new.items():
        expected = server.attend(name, q[:, :, start : start + count], buffer=20)
        assert_like(found[:, :, start : start + count], expected)
        start += count


@pytest.mark.parametrize(
    ("layouts", "dtype"), [(SMALL, torch.float32), ((Graded(((24, 5), (40, 4))), SMALL[1]), torch.float16)], ids=str
)
def test_what_has_no_kernel_is_slow_and_says_so_once(layouts, dtype):
    cuda._say_slow_once.cache_clear()
    layout = PageLayout(LayerPlan(*layouts), 64, dtype)
    pages = layout.pool(torch.zeros(1, 1, 64, layout.slot_bytes, dtype=torch.uint8))
    q = torch.zeros(1, 1, 1, 64, dtype=dtype)
    with pytest.warns(RuntimeWarning, match="kernel over pages attends to Graded layouts of groups of 16") as caught:
        assert pages_kernel(q, pages.keys, pages.values) is None and pages_kernel(q, pages.keys, pages.values) is None
    assert len(caught) == 1


def test_a_server_compiles_ahead(monkeypatch):
    """All layers for the pages that it has, once."""
    asked = []
    monkeypatch.setattr(cuda, "compile_ahead", lambda *arguments: asked.append(arguments))
    plans = LayerPlan(*SMALL), LayerPlan(*WHOLE)
    for index in range(2):
        layer = ServedLayer(Plan(plans), index, torch.eye(64)[None], torch.eye(64)[None], torch.float16)
        layer.compile_ahead(192)
    assert asked == [([*plans], torch.float16, torch.device("cpu"), 192)]
