"""`KVCache` under any order of operations, beside its oracle."""

import copy
import functools
import io
import pickle
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from swan import ByHead, Graded, KVCache, LayerPlan, TopK
from tests.stateful.checked import (
    assert_answer,
    assert_holds,
    assert_refused,
    assert_same,
    follow_choice,
    follow_dtype,
    image,
    product_error,
)
from tests.stateful.oracle import PAGE, Oracle
from tests.strategies import coded_layouts, normal, seeds

__all__ = ["BUFFERS", "KEEPS", "CacheMachine"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LONGEST, LONGEST_CHOSEN, COPIES = 150, 500, 3
BUFFERS = st.integers(1, 8) | st.sampled_from([12, 20, 33])  # the last ones grow, some of them more than once
KEEPS = [0.3, 0.6, 0.9, 1.0]
ROWS = st.lists(st.integers(0, 5), min_size=1, max_size=3)


def layouts(d: int) -> st.SearchStrategy[Any]:
    """Layouts of every form."""
    known = [
        Graded(((d, 4),)),
        Graded(((d // 2, 6), (d // 2, 3))),
        Graded(((d // 4, 8), (d // 4, 2), (d // 2, 1))),
        Graded(((3, 16), (d - 5, 5), (2, 0))),
        Graded.leading(d, d // 2),
        Graded(((d, 16),)),
        TopK(d, d // 2),
        TopK(d, d // 3, bits=16, positions="index"),
        TopK(d, d // 2 + 1, bits=4),
        TopK(d, d, bits=16),
    ]
    return st.sampled_from(known) | coded_layouts(d)


def plans(d: int, dv: int, kv_heads: int) -> st.SearchStrategy[LayerPlan]:
    """Layouts of keys and values, of all heads or of each head."""

    def sides(n: int) -> st.SearchStrategy[Any]:
        graded = layouts(n).filter(lambda layout: isinstance(layout, Graded))
        heads = st.lists(graded, min_size=kv_heads, max_size=kv_heads)
        return layouts(n) | heads.map(lambda each: ByHead(tuple(each)))

    return st.builds(LayerPlan, sides(d), sides(dv))


class CacheMachine(RuleBasedStateMachine):
    """One cache and its oracle, and copies of both that were left behind."""

    counted: ClassVar[list[int]] = [0]  # steps of all machines

    @initialize(data=st.data())
    def build(self, data):
        self.d, self.dv = data.draw(st.sampled_from([(16, 16), (16, 8), (32, 32)]))
        self.heads, self.kv_heads = data.draw(st.sampled_from([(2, 1), (2, 2)]))
        self.dtype = data.draw(st.sampled_from(DTYPES))
        plan_layer = data.draw(
            st.integers(0, 7).flatmap(lambda n: plans(self.d, self.dv, self.kv_heads) if n else st.none())
        )
        buffer, sinks = data.draw(BUFFERS), data.draw(st.integers(0, 3))
        self.prefill = data.draw(st.sampled_from(["chunk", "windowed"]))
        self.static = data.draw(st.booleans())
        self.longest = data.draw(st.integers(1, 80)) if self.static else LONGEST
        self.keep = None
        if plan_layer is not None and not self.static:
            self.keep = data.draw(st.none() | st.sampled_from(KEEPS))
            self.longest = LONGEST if self.keep is None else LONGEST_CHOSEN
        self.cache = self.new(plan_layer, buffer, sinks)
        windowed, history = self.prefill == "windowed", plan_layer is not None
        self.oracle = Oracle(buffer, sinks, windowed=windowed, history=history, keep=self.keep)
        self.seen_layouts = plan_layer
        self.batch = data.draw(st.integers(1, 3))
        self.copies = []

    def new(self, plan_layer, buffer, sinks) -> KVCache:
        room = {"static": True, "max_length": self.longest} if self.static else {}
        return KVCache(plan_layer, buffer=buffer, sinks=sinks, prefill=self.prefill, keep=self.keep, **room)

    # Tokens ---------------------------------------------------------------------------------------

    @rule(data=st.data(), seed=seeds)
    def one_token(self, data, seed):
        self.take_in(data, seed, 1)

    @rule(data=st.data(), seed=seeds, tokens=st.integers(2, 9))
    def some_tokens(self, data, seed, tokens):
        self.take_in(data, seed, tokens)

    @rule(data=st.data(), seed=seeds, tokens=st.integers(1, 70))
    def many_tokens(self, data, seed, tokens):
        self.take_in(data, seed, tokens if self.keep is None else 6 * tokens)

    @rule(data=st.data(), seed=seeds, more=st.integers(-1, 1))
    @precondition(lambda self: self.oracle.keep is not None)
    def to_the_end_of_a_page(self, data, seed, more):
        self.take_in(data, seed, PAGE - self.oracle.length % PAGE + more)

    def take_in(self, data, seed, tokens):
        oracle, cache = self.oracle, self.cache
        before = oracle.length
        tokens = min(tokens, self.longest - before)
        if tokens == 0:
            return self.refuse_one_more(seed)
        q, k, v = self.qkv(seed, tokens)
        padding = self.draw_padding(data, before)
        mask = self.draw_mask(data, seed, tokens)
        hides_chosen = False
        if mask is not None and self.keep is not None:
            shown = self.showing_chosen(mask, padding)
            hides_chosen = bool((mask != shown).any()) and data.draw(st.integers(0, 3)) == 0
            mask = mask if hides_chosen else shown
        scale = data.draw(st.sampled_from([None, 0.1, 0.5]))
        impls = ["auto", "auto", "compiled", "reference", *["sdpa"] * self.sdpa_serves()]
        impl = data.draw(st.sampled_from(impls))
        packer = data.draw(st.sampled_from(["auto", "compiled"]))
        given = None if padding is None else torch.tensor(padding)
        settings = {"mask": mask, "scale": scale, "impl": impl}
        if hides_chosen:
            call = functools.partial(cache, q, k, v, padding=given, **settings)
            return self.refused("a mask can hide left padding", call)
        whole, watched = None, cache
        if packer == "auto":
            watched = None if self.keep is None else copy.deepcopy(cache)
            whole = cache(q, k, v, padding=given, **settings)
        factor, outs = self.d**-0.5 if scale is None else scale, []
        for size in oracle.pieces(tokens):
            length, left = oracle.length, oracle.left
            new = slice(length - before, length - before + size)
            if mask is not None:
                settings["mask"] = mask[:, :, new]
            visible = (
                None if watched is None else watched.update(k[:, :, new], v[:, :, new], padding=given, impl=packer)
            )
            oracle.append(k[:, :, new], v[:, :, new], padding)
            self.look(watched)
            if watched is None or visible is None:
                assert whole is not None
                found = whole
            else:
                found = watched.attend(q[:, :, new], visible, **settings)
            outs.append(found)
            assert found.dtype == self.dtype
            answer = oracle.attend(q[:, :, new], length, left, factor, settings["mask"])
            assert_answer(found, answer, cache.plan_layer, impl=impl, d=self.d)
            drop = oracle.look_back(q[:, :, new], length, factor, self.product_error)
            follow_choice(cache if watched is None else watched, oracle, drop)
        if whole is not None and watched is not None:
            assert torch.equal(whole, torch.cat(outs, dim=2)), "tokens in one call are those of its pages"
            assert_same(cache, watched)

    def product_error(self, largest) -> Tensor:
        return product_error(largest, self.oracle.length, self.cache.plan_layer, self.dtype, self.d)

    def sdpa_serves(self) -> bool:
        return self.d == self.dv and self.dtype != torch.float64

    def qkv(self, seed, tokens) -> list[Tensor]:
        shapes = (self.heads, self.d), (self.kv_heads, self.d), (self.kv_heads, self.dv)
        return [normal(seed + i, self.batch, heads, tokens, d, dtype=self.dtype) for i, (heads, d) in enumerate(shapes)]

    def draw_padding(self, data, before) -> list[int] | None:
        """Left padding comes with the first tokens, and may come again until each row has begun."""
        if before == 0 and data.draw(st.booleans()):
            return data.draw(st.lists(st.integers(0, 12), min_size=self.batch, max_size=self.batch))
        waiting = before > 0 and max(self.oracle.padding) > before
        return self.oracle.padding if waiting and data.draw(st.booleans()) else None

    def draw_mask(self, data, seed, tokens) -> Tensor | None:
        kind = data.draw(st.sampled_from(["none", "none", "none", "one", "rows", "heads"]))
        if kind == "none":
            return None
        batch, heads = self.batch if kind == "rows" else 1, self.heads if kind == "heads" else 1
        columns = self.oracle.length + tokens + data.draw(st.integers(0, 3))
        return normal(seed + 3, batch, heads, tokens, columns) < 0.5

    def showing_chosen(self, mask, padding) -> Tensor:
        """Return a mask that hides padding only where it is no longer known which token is which."""
        oracle, start, mask = self.oracle, 0, mask.expand(self.batch, -1, -1, -1).clone()
        first = torch.tensor(padding or oracle.padding or [0] * self.batch)[:, None, None, None]
        tokens = mask.shape[2]
        for size, chosen in zip(oracle.pieces(tokens), oracle.choices(tokens), strict=True):
            columns = torch.arange(oracle.sinks, max(chosen, oracle.sinks))
            mask[:, :, start : start + size, oracle.sinks : max(chosen, oracle.sinks)] = columns >= first
            start += size
        return mask

    def refuse_one_more(self, seed):
        if self.static:
            self.refused("more do not fit", lambda: self.cache(*self.qkv(seed, 1)))

    # Storage --------------------------------------------------------------------------------------

    @rule(data=st.data())
    def repack(self, data):
        plan_layer = data.draw(plans(self.d, self.dv, self.kv_heads))
        if self.cache.plan_layer is None:
            return self.refused("has none", lambda: self.cache.repack(plan_layer))
        self.cache.repack(plan_layer)

    @rule(tokens=st.integers(0, 20))
    def evict(self, tokens):
        if self.static:
            return self.refused("keeps all its tokens", lambda: self.cache.evict(tokens))
        self.cache.evict(tokens)
        if tokens <= self.oracle.scored:
            return follow_choice(self.cache, self.oracle, tokens)
        self.oracle.evict(tokens)

    @rule(data=st.data())
    def crop(self, data):
        self.crop_to(data.draw(st.integers(0, self.oracle.length)))

    @rule(tokens=st.integers(0, 6))
    def take_back(self, tokens):
        self.crop_to(max(self.oracle.length - tokens, 0))

    def crop_to(self, length):
        if 0 < length < self.oracle.chosen:
            return self.refused("were dropped for the sake of later ones", lambda: self.cache.crop(length))
        self.cache.crop(length)
        self.oracle.crop(length)

    @rule()
    @precondition(lambda self: self.oracle.length > 20)
    def reset(self):
        self.cache.reset()
        self.oracle.forget()

    @rule(rows=ROWS, kind=st.sampled_from(["select", "reverse", "index", "repeat"]))
    def move_rows(self, rows, kind):
        rows = list(reversed(range(self.batch))) if kind == "reverse" else [row % self.batch for row in rows]
        if kind == "repeat":
            rows = [0, 0] if self.batch == 1 else list(range(self.batch))
            repeats = len(rows) // self.batch
            self.cache.map_batch(lambda t: t.repeat_interleave(repeats, dim=0))
        elif kind == "select":
            self.cache.map_batch(lambda t: t.index_select(0, torch.tensor(rows)))
        else:
            self.cache.map_batch(lambda t: t[torch.tensor(rows)])
        if self.oracle.length:
            self.oracle.rows(rows)
        if self.oracle.length or self.cache.state.k_recent is not None:
            self.batch = len(rows)

    @rule(dtype=st.sampled_from(DTYPES))
    def convert(self, dtype):
        self.look()
        self.cache.to(dtype)
        self.oracle.to(dtype)
        follow_dtype(self.cache, self.oracle)
        self.dtype = dtype

    # Copies ---------------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(["deepcopy", "pickle", "state", "file"]))
    def fork(self, kind):
        """Leave the cache behind and go on with a copy."""
        kept = self.cache, self.oracle.copy(), self.seen_layouts, self.batch, self.dtype
        self.copies = [*self.copies, kept][-COPIES:]
        if kind == "deepcopy":
            self.cache = copy.deepcopy(self.cache)
        elif kind == "pickle":
            self.cache = pickle.loads(pickle.dumps(self.cache))
        else:
            state = self.cache.state_dict()
            if kind == "file":
                torch.save(state, file := io.BytesIO())
                state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            self.cache = self.new(self.cache.plan_layer, self.oracle.buffer, self.oracle.sinks)
            self.cache.load_state_dict(state)

    @rule(data=st.data())
    @precondition(lambda self: self.copies)
    def go_back(self, data):
        """Go on with a copy that was left behind: nothing may have changed it."""
        kept = self.cache, self.oracle, self.seen_layouts, self.batch, self.dtype
        index = data.draw(st.integers(0, len(self.copies) - 1))
        self.cache, self.oracle, self.seen_layouts, self.batch, self.dtype = self.copies.pop(index)
        self.copies.append(kept)

    # Refusals -------------------------------------------------------------------------------------

    def refused(self, message, call):
        assert_refused(call, message, lambda: image(self.cache))

    @rule(data=st.data(), seed=seeds, tokens=st.integers(1, 4))
    def refuse(self, data, seed, tokens):
        cache, length = self.cache, self.oracle.length
        tokens = min(tokens, self.longest - length)
        if self.keep is not None:  # more would be refused for the end of a page
            tokens = min(tokens, PAGE - length % PAGE)
        if tokens == 0:
            return self.refuse_one_more(seed)
        q, k, v = self.qkv(seed, tokens)
        other = torch.float32 if self.dtype == torch.float16 else torch.float16
        mask = torch.ones(1, 1, tokens, length + tokens, dtype=torch.bool)
        long = torch.tensor([0] * (self.batch + 1))
        calls = {
            "cannot crop": lambda: cache.crop(length + 1),
            "cannot crop to -1": lambda: cache.crop(-1),
            "one floating-point dtype": lambda: cache(q, k, v.to(other)),
            "floating-point": lambda: cache.update(k.int(), v.int()),
            "at least one": lambda: cache(q[:, :, :0], k[:, :, :0], v[:, :, :0]),
            "expected keys": lambda: cache.update(k, v[:, :, :, 0]),
            "left padding": lambda: cache.update(k, v, padding=long),
            "tokens were taken in": lambda: cache(q[:, :, :-1], k, v),
            "or more columns": lambda: cache(q, k, v, mask=mask[..., :-1]),
            "must be boolean": lambda: cache(q, k, v, mask=mask.float()),
            "expected q": lambda: cache(q[..., :-1], k, v),
            "q, k and v must have one dtype": lambda: cache(q.to(other), k, v),
            r"expected q \[": lambda: cache(torch.cat([q, q]), k, v),
            "must be one of": lambda: cache(q, k, v, impl="fast"),
        }
        if self.kv_heads == 2:
            calls["heads a multiple|query heads"] = lambda: cache(torch.cat([q, q[:, :1]], 1), k, v)
        if cache.plan_layer is not None:
            calls["NVIDIA GPU"] = lambda: cache.update(k, v, impl="cuda")
            calls["cannot read packed"] = lambda: cache(q, k, v, impl="flex")
            if not self.sdpa_serves():
                calls["gives a log-sum-exp"] = lambda: cache(q, k, v, impl="sdpa")
            calls["coordinates"] = lambda: cache.update(k[..., :-1], v)
            calls["the new layouts are for"] = lambda: cache.repack(LayerPlan(TopK(24, 3), TopK(24, 3)))
        if self.keep is not None and length:
            calls["query heads"] = lambda: cache(torch.cat([q, q], 1), k, v)
        if length:
            calls["the cache holds torch"] = lambda: cache(q.to(other), k.to(other), v.to(other))
            calls["of batch and heads"] = lambda: cache(*(torch.cat([t, t]) for t in (q, k, v)))
        if not self.static:
            calls["cannot evict"] = lambda: cache.evict(-1)
        if self.static and length:
            calls["takes its memory at once"] = lambda: cache.allocate(k, v)
        message = data.draw(st.sampled_from(sorted(calls)))
        self.refused(message, calls[message])

    # What can be seen -----------------------------------------------------------------------------

    def look(self, cache=None):
        assert_holds(self.cache if cache is None else cache, self.oracle, self.seen_layouts)
        self.seen_layouts = self.cache.plan_layer

    @invariant()
    def holds(self):
        self.counted[0] += 1
        if hasattr(self, "cache"):
            self.look()
