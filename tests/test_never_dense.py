"""Nothing on the way from a packed history to an output allocates history x d in a dense dtype, or in any other.

What an operator takes inside C++ only the operating system sees: of the kernels the memory of a process is measured.
"""

import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from swan import Graded, KVCache, LayerPlan, TopK, pack, packed_attention
from swan.functional.attention import TILE
from swan.functional.dispatch import Impl
from tests.compilers import needs_cxx
from tests.strategies import normal, one_thread  # noqa: F401

D, KV_HEADS, HEADS, HISTORY, BUFFER, SINKS = 64, 2, 4, 20_000, 32, 4
CHUNK = 200
PLANS = {
    "topk 8": LayerPlan(TopK(D, 24), TopK(D, 16, positions="index")),
    "topk 16": LayerPlan(TopK(D, 24, bits=16), TopK(D, 16, bits=16)),
    "graded": LayerPlan(Graded.leading(D, 32), Graded(((16, 16), (32, 0), (16, 16)))),
    "all of it": LayerPlan(TopK(D, D, bits=16), TopK(D, D)),
    # Of these a byte, and an integer all the more, for each coordinate would be as large as the dense history.
    "few bits": LayerPlan(Graded(((16, 5), (40, 3), (8, 0))), Graded(((D, 1),))),
    "topk 4": LayerPlan(TopK(D, 8, bits=4), TopK(D, 12, bits=4, positions="index")),
}
every_plan = pytest.mark.parametrize("plan_layer", PLANS.values(), ids=PLANS)


class Allocations(TorchDispatchMode):
    """Records the number of elements of every new tensor that an operation returns: numbers, and masks apart."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, int] = {}
        self.masks: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        held = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in held:
                sizes = self.masks if t.dtype == torch.bool else self.sizes
                sizes[str(func)] = max(sizes.get(str(func), 0), t.untyped_storage().nbytes() // t.itemsize)
        return result

    @property
    def largest(self) -> int:
        return max(self.sizes.values())


def filled_cache(plan_layer: LayerPlan, static: bool) -> KVCache:
    room = {"static": True, "max_length": HISTORY + 4 * CHUNK} if static else {}
    cache = KVCache(plan_layer, buffer=BUFFER, sinks=SINKS, prefill="windowed", **room)
    cache.update(*normal(0, 2, 1, KV_HEADS, HISTORY, D))
    # Once more, so that the growing history has room: its own growth is stored bytes, not dense ones.
    cache.update(*normal(1, 2, 1, KV_HEADS, 1, D))
    return cache


def step(cache: KVCache, tokens: int, impl: Impl) -> None:
    cache(normal(3, 1, HEADS, tokens, D), *normal(2, 2, 1, KV_HEADS, tokens, D), impl=impl)


def tile_bound(tokens: int) -> int:
    """A tile of keys or values; the scores or mask of all queries against one; outputs that wait to be merged."""
    return max(KV_HEADS * TILE * D, HEADS * tokens * TILE, HEADS * (TILE + tokens) * D)


@every_plan
@pytest.mark.parametrize("tokens", [1, CHUNK], ids=["decode", "windowed prefill"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("impl", ["auto", "compiled"])
@torch.no_grad()
def test_steps_stay_within_a_tile(impl, static, tokens, plan_layer):
    cache = filled_cache(plan_layer, static)
    with Allocations() as seen:
        for _ in range(2):
            step(cache, tokens, impl)
    bound = tile_bound(tokens)
    assert bound < HISTORY * KV_HEADS * D / 3  # the bound says something
    if impl == "compiled" and "all of it" not in str(plan_layer):
        assert seen.largest >= KV_HEADS * D * TILE  # tiles were seen at work
    assert seen.largest <= bound, seen.sizes
    columns = HISTORY + 4 * CHUNK  # of a query, to which a static history has room
    assert max(seen.masks.values(), default=0) <= max(tokens * columns, bound), seen.masks


@every_plan
@torch.no_grad()
def test_repacking_stays_within_a_tile(plan_layer):
    lower = LayerPlan(TopK(D, 8), TopK(D, 8))
    cache = filled_cache(plan_layer, static=False)
    with Allocations() as seen:
        cache.repack(lower)
    # Besides a tile it takes the new history, whose vectors are 8 values, 8 bytes of positions and a scale.
    bound = max(KV_HEADS * 1024 * D, max(t.numel() for t in cache.tensors))
    assert bound <= KV_HEADS * 1.1 * HISTORY * 8
    assert seen.largest <= bound, seen.sizes


@torch.no_grad()
def test_the_oracle_is_exempt():
    """And the recorder sees what it should: the reference does unpack everything."""
    k, v = (pack(normal(i, 1, KV_HEADS, 5000, D), TopK(D, 16)) for i in (0, 1))
    with Allocations() as seen:
        packed_attention(normal(2, 1, HEADS, 1, D), k, v, impl="reference")
    assert seen.largest >= 5000 * D * KV_HEADS


# Prints by how many bytes the largest memory of the process grows with attention to packed histories of 192k tokens.
# The memory that it has had before is filled up first, so that every page more shows.
PEAKS = """
import resource
import torch
from swan import Graded, TopK, pack, swan_attention
from swan.kernels import cpu

LAYOUTS = {
    "coded": (Graded(((32, 3), (96, 1))), Graded(((128, 1),))),
    "ragged": (Graded(((5, 3), (4, 16), (119, 1))), Graded(((128, 2),))),
    "topk": (TopK(128, 8, bits=4), TopK(128, 8)),
}

def growth(layouts, repeats, impl):
    blocks = [pack(torch.randn(1, 2, 64, 128).bfloat16(), layout) for layout in layouts]
    q, recent = torch.randn(1, 4, 1, 128).bfloat16(), torch.randn(1, 2, 16, 128).bfloat16()
    histories = [[block.map(lambda t: t.repeat(1, 1, n, 1)) for block in blocks] for n in (2, repeats)]
    filler = None
    for history in histories:  # the first, short one brings in what is loaded once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with open("/proc/self/statm") as file:
            filler = [filler, bytearray(max(before - int(file.read().split()[1]) * resource.getpagesize(), 0))]
        for seen in (None, torch.arange(history[0].shape[2]).gt(100)[None, None, None]):
            assert swan_attention(q, *history, recent, recent, history_mask=seen, impl=impl).isfinite().all()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before

cpu.build()
torch.set_num_threads(2)
with torch.no_grad():
    for name, layouts in LAYOUTS.items():
        print(name, growth(layouts, 3000, "cpp"))
    print("reference", growth(LAYOUTS["coded"], 500, "reference"))
"""


@needs_cxx
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kernels_take_no_memory_by_the_token():
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}
    byte_each = 192_000 * 2 * 128  # if keys or values had one for each coordinate
    assert grown.pop("reference") > byte_each / 6, "of a sixth of the tokens: the measure sees nothing"
    assert len(grown) == 3
    assert max(grown.values()) < byte_each / 6, grown
