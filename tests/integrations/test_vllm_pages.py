"""Pages of a server without the server: what is written into them, and attention over them."""

import pytest
import torch

from swan import Graded, KVCache, LayerPlan, Plan, TopK, pack
from swan.functional.dispatch import pages_kernel
from swan.integrations.vllm.attention import QUERIES, Batch, batch_attention, windowed_attention
from swan.integrations.vllm.layer import heads_of, window_tokens
from swan.integrations.vllm.pages import DensePages, PageLayout
from swan.kernels import cpu

HEADS, KV_HEADS, D = 4, 2, 32
MIXED = LayerPlan(Graded(((16, 5), (8, 16), (8, 0))), Graded(((16, 3), (16, 2))))
LAYOUTS = {
    "coded": LayerPlan(Graded(((16, 8), (16, 4))), Graded(((16, 3), (16, 2)))),
    "mixed": MIXED,
    "whole": LayerPlan(*[Graded(((D, 16),))] * 2),
}


class Server:
    """Pages of a layer, and the sequences in them: of each its pages, in no order."""

    def __init__(self, plan: LayerPlan, *, tokens=64, window=16, pages=12, dtype=torch.float32, sinks=3, padding=0):
        self.layout = PageLayout(plan, tokens, dtype, sinks, padding)
        # As vLLM lays them: those of one layer far apart. What was never written is NaN.
        bytes_of_page = KV_HEADS * tokens * self.layout.slot_bytes
        memory = torch.full((pages, 3, bytes_of_page), 255, dtype=torch.uint8)
        self.packed = self.layout.pool(memory[:, 1].view(pages, KV_HEADS, tokens, -1))
        dense = torch.full((8 * pages, KV_HEADS, window, 2 * D), torch.nan, dtype=dtype)
        self.dense = DensePages.split(dense, D)
        self.tables: dict[str, tuple] = {}
        order = torch.Generator().manual_seed(3)
        self.free = [torch.randperm(n, generator=order).tolist() for n in (pages, 8 * pages)]

    def add(self, name: str, k, v) -> None:
        """Take in the new tokens of a sequence."""
        length, *tables = self.tables.get(name, (0, [], []))
        stop = length + k.shape[2]
        for table, free, pages in zip(tables, self.free, (self.packed, self.dense), strict=True):
            while len(table) * pages.tokens < stop:
                table.append(free.pop())
            column = torch.arange(length, stop)
            slots = torch.tensor(table)[column // pages.tokens] * pages.tokens + column % pages.tokens
            pages.write(slots, k, v)
        self.tables[name] = (stop, *tables)

    def attend(self, name: str, q, buffer: int):
        batch = self.batch({name: q.shape[2]}, buffer)
        return windowed_attention(q, batch, 0, self.packed, self.dense, D**-0.5)

    def attend_together(self, q, new: dict[str, int], buffer: int):
        """Attend with the newest tokens of some sequences, so many of each."""
        return batch_attention(q, self.batch(new, buffer), self.packed, self.dense, D**-0.5)

    def batch(self, new: dict[str, int], buffer: int) -> Batch:
        lengths, packed, dense = zip(*(self.tables[name] for name in new), strict=True)
        starts = [0, *torch.tensor(list(new.values())).cumsum(0).tolist()]
        tables = [
            torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in x], batch_first=True) for x in (packed, dense)
        ]
        return Batch(starts, list(lengths), tables[0].int(), tables[1].int(), buffer, self.packed.sinks)


def states(tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, tokens, D, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.fixture
def exact_kernels(monkeypatch):
    """Kernels for CPUs that round nothing in float32; those for AVX2 round queries and weights to 2**-15."""
    if cpu.variant() == "avx2":
        monkeypatch.setenv("SWAN_CPU", "generic")


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("plan", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "chunks", [(150,), (1,) * 150, (7, 64, 1, 78), (2, 20, 128)], ids=["whole", "single", "a", "b"]
)
@pytest.mark.parametrize("sinks", [0, 3, 30], ids=["no sinks", "some", "more than the window"])
def test_pages_give_what_a_windowed_cache_gives(plan, chunks, sinks):
    q, k, v = states(150)
    server, cache = Server(plan, sinks=sinks), KVCache(plan, buffer=20, sinks=sinks, prefill="windowed")
    start = 0
    for size in chunks:
        new = slice(start, start + size)
        server.add("a", k[:, :, new], v[:, :, new])
        out = server.attend("a", q[:, :, new], buffer=20)
        expected = cache(q[:, :, new], k[:, :, new], v[:, :, new])
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
        start += size


def test_many_queries_are_attended_a_few_at_a_time():
    tokens = QUERIES + 70
    q, k, v = states(tokens)
    server, cache = Server(MIXED), KVCache(MIXED, buffer=20, sinks=3, prefill="windowed")
    server.add("a", k, v)
    torch.testing.assert_close(server.attend("a", q, buffer=20), cache(q, k, v), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("page", "padding"), [(64, 0), (192, 0), (64, 7)])
def test_packed_tokens_are_copied_a_few_at_a_time(page, padding, monkeypatch):
    """Whole pages of them, padded or not."""
    q, k, v = states(700)
    server, cache = Server(MIXED, tokens=page, padding=padding), KVCache(MIXED, buffer=20, sinks=3, prefill="windowed")
    server.add("a", k, v)
    monkeypatch.setattr("swan.integrations.vllm.attention.TOKENS", 150)
    torch.testing.assert_close(server.attend("a", q, buffer=20), cache(q, k, v), atol=2e-5, rtol=2e-5)


def test_sequences_do_not_see_each_other():
    """Two that take turns, against each alone."""
    alone, together = [], []
    for name, seed in (("a", 1), ("b", 2)):
        server, (q, k, v) = Server(MIXED), states(130, seed)
        server.add(name, k, v)
        alone.append(server.attend(name, q[:, :, -1:], buffer=20))
    server = Server(MIXED)
    for start in range(0, 130, 26):
        for name, seed in (("a", 1), ("b", 2)):
            _, k, v = (x[:, :, start : start + 26] for x in states(130, seed))
            server.add(name, k, v)
    for name, seed in (("a", 1), ("b", 2)):
        together.append(server.attend(name, states(130, seed)[0][:, :, -1:], buffer=20))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("plan", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tokens", [64, 192], ids=["kernel", "tensor code"])  # the kernel takes powers of two
def test_a_batch_gives_what_each_sequence_gives(plan, tokens):
    """Sequences that decode beside one that is read, one that has begun, and one that the window holds whole."""
    server, new = Server(plan, tokens=tokens, pages=16), {"a": 1, "b": 30, "c": 1, "d": 1, "e": 1}
    for seed, (name, length) in enumerate(zip(new, (150, 100, 1, 90, 20), strict=True)):
        server.add(name, *states(length, seed)[1:])
    q = states(sum(new.values()), 9)[0]
    kernel = pages_kernel(q[:, :, :1], server.packed.keys, server.packed.values)
    assert (kernel is None) == (tokens == 192 or not cpu.built())
    found, start = server.attend_together(q, new, buffer=20), 0
    for name, count in new.items():
        expected = server.attend(name, q[:, :, start : start + count], buffer=20)
        torch.testing.assert_close(found[:, :, start : start + count], expected, atol=2e-5, rtol=2e-5)
        start += count


@pytest.mark.parametrize("plan", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_holds_the_bytes_of_pack(plan, dtype):
    """Whatever order tokens come in: no byte of a page is left, none is written twice."""
    server = Server(plan, dtype=dtype, sinks=5)
    _, k, v = (x.to(dtype) for x in states(64))
    padded = [torch.cat([torch.full_like(x[:, :, :1], torch.inf), x.flip(2)], dim=2) for x in (k, v)]
    server.packed.write(torch.cat([torch.tensor([-1]), torch.arange(64).flip(0) + 64]), *padded)
    assert (server.packed.keys.planes[0].view(torch.uint8)[-1] == 255).all()  # nothing was written there
    for stored, x in ((server.packed.keys, k), (server.packed.values, v)):
        for rows, expected in zip(stored.tensors, pack(x, stored.format).tensors, strict=True):
            assert torch.equal(rows[1], expected[0])
    first = server.packed.first
    assert torch.equal(first.keys[1], k[0, :, :5]) and torch.equal(first.values[1], v[0, :, :5])
    total = sum(x.nbytes for x in (server.packed.keys, server.packed.values)) // 12
    sinks = 5 * KV_HEADS * 2 * D * dtype.itemsize
    assert 0 <= KV_HEADS * 64 * server.layout.slot_bytes - total - sinks < KV_HEADS * 64  # rounded up to a byte a token


def test_the_window_fits_into_the_bytes_of_a_packed_page():
    def tokens(bits, page=128, sinks=0, dtype=torch.bfloat16):
        return window_tokens(Plan((LayerPlan(*[Graded(((64, bits),))] * 2),) * 3, sinks=sinks), page, dtype)

    assert [tokens(bits) for bits in (2, 4, 8, 16)] == [16, 32, 64, 128]  # of 34, 66, 130 and 256 bytes
    assert tokens(4, dtype=torch.float32) == 16 and tokens(4, page=64) == 16
    assert tokens(8, sinks=64) == 128  # a page half of which is sinks


@pytest.mark.parametrize(("heads", "ranks"), [(4, 1), (4, 2), (4, 4), (2, 4), (1, 8)])
def test_ranks_share_the_heads(heads, ranks):
    shares = [range(heads)[heads_of(heads, rank, ranks)] for rank in range(ranks)]
    assert sorted({head for share in shares for head in share}) == list(range(heads))
    assert {len(share) for share in shares} == {max(heads // ranks, 1)}


def test_pages_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="multiple of 64 tokens, got 96"):
        PageLayout(MIXED, 96, torch.float32)
    with pytest.raises(ValueError, match="up to 64 sinks, got 65"):
        PageLayout(MIXED, 64, torch.float32, 65)
    with pytest.raises(ValueError, match="Graded layouts, got TopK"):
        PageLayout(LayerPlan(TopK(D, 8), MIXED.values), 64, torch.float32)
