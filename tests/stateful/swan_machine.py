"""`SwanCache` under any order of operations, an oracle beside each layer.

Layers are driven as transformers drives them, by `update` and the attention function, with queries, keys and values of
the test: so the oracles know what came, and no model has to run.
"""

import copy
import functools
import pickle
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from swan import Graded, KVCache, LayerPlan, Plan, SwanCache, TopK
from swan.calibration.capture import attention_layers
from swan.functional import rotate
from swan.integrations.transformers.attention import swan_attention_forward
from tests.stateful.checked import (
    assert_answer,
    assert_holds,
    assert_refused,
    assert_same,
    follow_choice,
    image,
    product_error,
)
from tests.stateful.layouts import U32, unit
from tests.stateful.machine import BUFFERS, KEEPS
from tests.stateful.oracle import Oracle
from tests.strategies import normal, seeds
from tests.tiny import attached

__all__ = ["SwanMachine"]

D, HEADS, KV_HEADS, LAYERS, LONGEST, COPIES = 16, 2, 1, 2, 260, 2
ROWS = st.lists(st.integers(0, 5), min_size=1, max_size=4)
RETENTIONS = [1.0, 0.6, 0.5, 0.33, 0.26, 0.21]
MIXED = LayerPlan(Graded(((4, 16), (8, 4), (4, 0))), TopK(16, 5, bits=4))
PLANS = {
    "two forms": (MIXED, LayerPlan(TopK(16, 7, bits=16), Graded.leading(16, 6))),
    "one window": (None, MIXED),
}


@functools.cache
def model_of(dtype: torch.dtype):
    sizes = {"hidden_size": HEADS * D, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return attached(effects=True, **sizes).to(dtype)


class SwanMachine(RuleBasedStateMachine):
    """One cache, an oracle for each layer, and copies of both that were left behind."""

    counted: ClassVar[list[int]] = [0]  # steps of all machines

    @initialize(data=st.data())
    def build(self, data):
        self.dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
        self.model = model_of(self.dtype)
        self.modules, self.batch = attention_layers(self.model), data.draw(st.integers(1, 3))
        kind = data.draw(st.sampled_from(["retention", "plan", "budget", "budget", "levels"]))
        buffer, sinks = data.draw(BUFFERS), data.draw(st.integers(0, 3))
        self.prefill = data.draw(st.sampled_from(["chunk", "windowed"]))
        settings = {"buffer": buffer, "sinks": sinks, "prefill": self.prefill}
        if kind in ("retention", "budget"):
            settings["exclude"] = data.draw(st.sampled_from([[], [], [0], [1]]))
        self.static = kind == "levels" or (kind == "plan" and data.draw(st.booleans()))
        if self.static:
            settings |= {"static": True, "max_length": data.draw(st.integers(1, 90))}
        self.keep = None
        if not self.static:
            self.keep = data.draw(st.none() | st.sampled_from(KEEPS))
        match kind:
            case "retention":
                settings |= {"retention": data.draw(st.sampled_from(RETENTIONS)), "keep": self.keep}
            case "plan":
                layers = data.draw(st.sampled_from(list(PLANS.values())))
                settings["plan"] = Plan(layers, buffer=buffer, sinks=sinks, keep=self.keep)
            case "budget":
                most = st.integers(4_000, 60_000)
                if self.keep is not None:  # queries take much: at the least level some more tokens than these fit
                    most |= st.integers(13_000, 20_000).map(lambda n: n * self.batch * self.dtype.itemsize // 2)
                settings["budget"] = data.draw(most)
                settings |= {"on_full": data.draw(st.sampled_from(["raise", "evict"])), "keep": self.keep}
            case "levels":
                settings["levels"] = data.draw(st.lists(st.sampled_from(RETENTIONS), min_size=1, max_size=3))
        self.longest = settings.get("max_length", LONGEST)
        self.cache = SwanCache(self.model, **settings)
        winnowed = self.cache.winnowed
        history = [i in winnowed and winnowed[i].plan_layer is not None for i in range(LAYERS)]
        # A layer that is excluded is one whose buffer never fills.
        sizes = [buffer if i in winnowed else 10**6 for i in range(LAYERS)]
        self.oracles = [
            Oracle(size, sinks, windowed=self.prefill == "windowed", history=packs, keep=self.keep if packs else None)
            for size, packs in zip(sizes, history, strict=True)
        ]
        self.seen_layouts = self.layouts()
        self.copies = []

    def layouts(self) -> list[LayerPlan | None]:
        return [self.cache.winnowed[i].plan_layer if i in self.cache.winnowed else None for i in range(LAYERS)]

    @property
    def length(self) -> int:
        return self.oracles[0].length

    # Tokens ---------------------------------------------------------------------------------------

    @rule(data=st.data(), seed=seeds)
    def one_token(self, data, seed):
        self.take_in(data, seed, 1)

    @rule(data=st.data(), seed=seeds, tokens=st.integers(2, 9))
    def some_tokens(self, data, seed, tokens):
        self.take_in(data, seed, tokens)

    @rule(data=st.data(), seed=seeds, tokens=st.integers(1, 110))
    def many_tokens(self, data, seed, tokens):
        self.take_in(data, seed, tokens)

    def take_in(self, data, seed, tokens):
        before, cache = self.length, self.cache
        if self.static and before + tokens > self.longest:
            q, k, v = self.qkv(seed, tokens, 0)
            self.refused("do not fit; build it with a larger max_length", lambda: cache.update(k, v, 0))
            return
        tokens = min(tokens, self.longest - before)
        if tokens == 0:
            return
        padding = self.oracles[0].padding
        if before == 0:
            padded = data.draw(st.booleans())
            padding = (
                data.draw(st.lists(st.integers(0, 12), min_size=self.batch, max_size=self.batch)) if padded else []
            )
        mask = self.mask(padding, before, tokens) if any(padding) else None
        shown, twins = self.shown(), self.budget_twins()
        for index, oracle in enumerate(self.oracles):
            q, k, v = self.qkv(seed + 10 * index, tokens, index)
            try:
                keys, values = cache.update(k, v, index)
            except ValueError as error:
                assert index == 0 and cache.budget is not None, f"{error}"
                assert "the budget of" in str(error) and self.shown() == shown, (
                    "a refused forward has changed something"
                )
                return
            if index == 0:
                self.follow_budget(shown, twins)
            if index in cache.winnowed:
                twin = None if oracle.keep is None else copy.deepcopy(cache.winnowed[index])
                out, _ = swan_attention_forward(self.modules[index], q, keys, values, mask, scaling=0.3)
                self.follow(index, (q, k, v), padding, mask, out.transpose(1, 2), twin)
            else:
                oracle.append(k, v, padding or None)
                assert torch.equal(keys.double(), oracle.keys) and torch.equal(values.double(), oracle.values)

    def follow(self, index, qkv, padding, mask, out, twin):
        """Have the oracle take in what a layer has, and compare; a twin that drops tokens does it page by page."""
        oracle, kv, start = self.oracles[index], self.cache.winnowed[index], 0
        before, given = oracle.length, None
        if any(padding):  # as far as the new tokens tell
            given = torch.tensor(padding).clamp(max=before + qkv[0].shape[2])
        # Rotated at once, as the cache has them: a product of fewer rows may differ in its last bit.
        queries, _ = self.stored(qkv[0], qkv[2], index)
        keys, values = self.stored(*qkv[1:], index)
        for size in oracle.pieces(qkv[0].shape[2]):
            length, left, new = oracle.length, oracle.left, slice(start, start + size)
            q, k, v = (t[:, :, new] for t in qkv)
            seen = None if twin is None else twin.update(keys[:, :, new], values[:, :, new], padding=given)
            oracle.append(self.rotated(k, index, "key"), self.rotated(v, index, "value"), padding or None)
            self.look(index, twin)
            answer = oracle.attend(self.rotated(q, index, "key"), length, left, 0.3)
            answer.out = answer.out @ self.basis(index, "value").mT
            assert_answer(out[:, :, new], answer, kv.plan_layer, impl="auto", d=D, rotated=True)
            if twin is not None and seen is not None:
                rows = None if mask is None else mask[:, :, new]
                twin.attend(queries[:, :, new], seen, mask=rows, scale=0.3)
                drop = oracle.look_back(
                    self.rotated(q, index, "key"), length, 0.3, functools.partial(self.product_error, index)
                )
                follow_choice(twin, oracle, drop)
            start += size
        if twin is not None:
            assert_same(kv, twin)

    def stored(self, k, v, index) -> list[Tensor]:
        """Rotate as swan does, in the dtype."""
        names = (k, "key"), (v, "value")
        return [rotate(t, getattr(self.modules[index], f"swan_{name}_basis").to(self.dtype)) for t, name in names]

    def product_error(self, index, largest) -> Tensor:
        plan_layer, length = self.cache.winnowed[index].plan_layer, self.oracles[index].length
        rotation = 2 * (unit(self.dtype) + D * U32) * largest
        return product_error(largest, length, plan_layer, self.dtype, D) + rotation

    def basis(self, index, name) -> Tensor:
        return getattr(self.modules[index], f"swan_{name}_basis").double()[0]

    def rotated(self, x: Tensor, index, name) -> Tensor:
        return x.double() @ self.basis(index, name)

    def qkv(self, seed, tokens, index) -> list[Tensor]:
        return [
            normal(seed + i, self.batch, heads, tokens, D, dtype=self.dtype)
            for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
        ]

    def mask(self, padding, before, tokens) -> Tensor:
        """The mask that transformers makes of an attention mask with left padding."""
        columns = torch.arange(self.longest if self.static else before + tokens)
        queries = torch.arange(before, before + tokens)[:, None]
        return ((columns <= queries) & (columns >= torch.tensor(padding)[:, None, None]))[:, None]

    def budget_twins(self) -> dict[int, KVCache]:
        """Copies in which is seen what a budget drops by score, before the history moves to another level."""
        return copy.deepcopy(self.cache.winnowed) if self.cache.budget is not None and self.keep is not None else {}

    def follow_budget(self, shown, twins):
        """A budget may have lowered the level, and at the least level dropped tokens."""
        if self.cache.budget is None:
            return
        _, retention, dropped, *_ = shown
        levels = self.cache.dial.levels
        assert self.cache.retention <= retention and self.cache.dropped >= dropped
        if self.cache.dropped > dropped:
            assert self.cache.on_full == "evict" and self.cache.plan == levels[-1]
            drop = self.cache.dropped - dropped
            for index, oracle in ((index, self.oracles[index]) for index in self.cache.winnowed):
                if drop <= oracle.scored:
                    twins[index].evict(drop)
                    follow_choice(twins[index], oracle, drop)
                else:
                    oracle.evict(drop)

    # Storage --------------------------------------------------------------------------------------

    @rule(data=st.data(), retention=st.sampled_from(RETENTIONS))
    def dial(self, data, retention):
        cache, windows = self.cache, [kv.plan_layer is None for kv in self.cache.winnowed.values()]
        if self.static:
            known = [*cache.dial.retentions, *(plan.retention for plan in cache.dial.levels)]
            if not any(abs(retention - each) < 1e-9 for each in known):
                return self.refused("has the levels", lambda: setattr(cache, "retention", retention))
        if any(windows):
            return self.refused("its retention is fixed", lambda: setattr(cache, "retention", retention))
        if cache.budget is None:
            cache.retention = retention
            return
        shown = self.shown()
        try:
            cache.retention = retention
        except ValueError as error:
            assert "would need" in str(error) and self.shown() == shown, "a refused retention has changed something"

    @rule(tokens=st.integers(0, 30))
    def crop(self, tokens):
        if 0 < self.length - tokens < max(oracle.chosen for oracle in self.oracles):
            return self.refused("were dropped for the sake of later ones", lambda: self.cache.crop(-tokens))
        self.cache.crop(-tokens)
        for oracle in self.oracles:
            oracle.crop(max(oracle.length - tokens, 0))

    @rule()
    @precondition(lambda self: self.length > 30)
    def reset(self):
        self.cache.reset()
        for oracle in self.oracles:
            oracle.forget()

    @rule(
        rows=st.lists(st.integers(0, 5), min_size=1, max_size=4),
        kind=st.sampled_from(["reorder", "reverse", "select", "repeat"]),
    )
    @precondition(lambda self: self.length > 0)
    def move_rows(self, rows, kind):
        rows = [row % self.batch for row in rows]
        if kind == "reverse":
            rows, kind = list(reversed(range(self.batch))), "reorder"
        shown, twins = self.shown(), self.budget_twins()
        if kind == "repeat":
            repeats = 2 if self.batch == 1 else 1
            rows = [row for row in range(self.batch) for _ in range(repeats)]
        calls = {
            "reorder": lambda: self.cache.reorder_cache(torch.tensor(rows)),
            "select": lambda: self.cache.batch_select_indices(torch.tensor(rows)),
            "repeat": lambda: self.cache.batch_repeat_interleave(len(rows) // self.batch),
        }
        try:
            with torch.no_grad():
                calls[kind]()
        except ValueError as error:
            assert self.cache.budget is not None and "the budget of" in str(error), f"{error}"
            assert self.shown() == shown, "refused rows have changed something"
            return
        self.follow_budget(shown, twins)
        for oracle in self.oracles:
            oracle.rows(rows)
        # What a budget packed anew was packed before the rows moved; each row is the same vector.
        self.batch = len(rows)

    @rule(layer=st.sampled_from([None, 0, 1]))
    def offload(self, layer):
        self.cache.offload(layer)

    # Copies ---------------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(["deepcopy", "pickle", "file"]))
    def fork(self, kind):
        """Leave the cache behind and go on with a copy."""
        self.copies = [*self.copies, self.all_of(copies=True)][-COPIES:]
        if kind == "deepcopy":
            self.cache = copy.deepcopy(self.cache)
        elif kind == "pickle":
            self.cache = pickle.loads(pickle.dumps(self.cache))
        else:
            with tempfile.TemporaryDirectory() as folder:
                self.cache.save(Path(folder) / "cache")
                self.cache = SwanCache.load(Path(folder) / "cache", self.model)

    def all_of(self, copies=False):
        oracles = [oracle.copy() for oracle in self.oracles] if copies else self.oracles
        return self.cache, oracles, list(self.seen_layouts), self.batch

    @rule(data=st.data())
    @precondition(lambda self: self.copies)
    def go_back(self, data):
        """Go on with a copy that was left behind: nothing may have changed it."""
        now = self.all_of()
        self.cache, self.oracles, self.seen_layouts, self.batch = self.copies.pop(
            data.draw(st.integers(0, len(self.copies) - 1))
        )
        self.copies.append(now)

    # What can be seen -----------------------------------------------------------------------------

    def shown(self):
        cache = self.cache
        images = [image(kv) for kv in cache.winnowed.values()]
        dense = [[t.tolist() for t in (layer.keys, layer.values) if t is not None]
                 for i, layer in enumerate(cache.layers) if i not in cache.winnowed]  # fmt: skip
        return images, cache.retention, cache.dropped, dense, cache.plan, cache.nbytes, int(cache.get_seq_length())

    def refused(self, message, call):
        assert_refused(call, message, self.shown)

    def look(self, index, twin=None):
        kv = self.cache.winnowed[index] if twin is None else twin
        uncertain = unit(self.dtype) + (D + 2) * U32 * D**0.5
        assert_holds(kv, self.oracles[index], self.seen_layouts[index], uncertain)
        self.seen_layouts[index] = kv.plan_layer

    @invariant()
    def holds(self):
        self.counted[0] += 1
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        for index in cache.winnowed:
            self.look(index)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [oracle.length for oracle in self.oracles]
        assert cache.budget is None or cache.nbytes <= cache.budget
        expected = sum(kv.nbytes for kv in cache.winnowed.values())
        for index, layer in enumerate(cache.layers):
            if index not in cache.winnowed and layer.keys is not None:
                expected += sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
        assert cache.nbytes == expected
