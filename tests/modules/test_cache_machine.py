"""A dynamic cache under any order of operations, against an oracle of plain Python numbers."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swan import KVCache, LayerPlan, TopK
from swan.functional import reference
from tests.strategies import assert_within, attention_bound, plan_layers, qkv, seeds, small_blocks  # noqa: F401

D, DV, KV_HEADS, GROUPS, LONGEST = 6, 4, 2, 2, 40
plans = plan_layers(D, DV, bits=[16])


def attend_one(q, keys, values) -> list[float]:
    """Attention of one query over lists of numbers."""
    scores = [sum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(D) for key in keys]
    if not scores:
        return [0.0] * DV
    weights = [math.exp(score - max(scores)) for score in scores]
    total = sum(weights)
    return [sum(w * value[i] for w, value in zip(weights, values, strict=True)) / total for i in range(DV)]


class Token:
    """One column of one row and KV head: what it was, and what is left of it once it was packed."""

    def __init__(self, key, value):
        self.key, self.value, self.packed = key, value, None

    def pack(self, plan_layer):
        vectors = self.packed or (self.key, self.value)
        self.packed = tuple(
            reference.prune(torch.tensor(vector, dtype=torch.float64)[None], layout)[0].tolist()
            for vector, layout in zip(vectors, (plan_layer.keys, plan_layer.values), strict=True)
        )


class CacheMachine(RuleBasedStateMachine):
    """The oracle is `rows[row][head]`, a list of `Token`; those before `first` and not sinks are packed."""

    @initialize(
        plan_layer=st.none() | plans,
        buffer=st.integers(1, 6),
        sinks=st.integers(0, 3),
        prefill=st.sampled_from(["chunk", "windowed"]),
    )
    def build(self, plan_layer, buffer, sinks, prefill):
        self.cache = KVCache(plan_layer, buffer=buffer, sinks=sinks, prefill=prefill)
        self.plan_layer, self.buffer, self.sinks, self.prefill = plan_layer, buffer, sinks, prefill
        self.forget()

    def forget(self):
        self.rows = [[[] for _ in range(KV_HEADS)] for _ in range(2)]
        self.padding, self.length, self.first, self.dropped = [0, 0], 0, 0, 0

    @rule(seed=seeds, tokens=st.integers(1, 9), padding=st.lists(st.integers(0, 5), min_size=2, max_size=2))
    @precondition(lambda self: self.length < LONGEST)
    def take_in_and_attend(self, seed, tokens, padding):
        heads = GROUPS * KV_HEADS, KV_HEADS
        q, k, v = qkv(seed, len(self.rows), heads, tokens, tokens, D, DV, torch.float32)
        given = None
        if self.length == 0 and any(padding):
            self.padding = (padding * 2)[: len(self.rows)]
            given = torch.tensor(self.padding)
        visible = self.cache.update(k, v, padding=given)
        before, first = self.length, self.first
        self.length += tokens
        self.first = max(self.first, self.length - self.buffer)
        for row, row_heads in enumerate(self.rows):
            for head, column_tokens in enumerate(row_heads):
                new = zip(k[row, head].tolist(), v[row, head].tolist(), strict=True)
                column_tokens.extend(Token(*pair) for pair in new)
                if self.plan_layer is not None:
                    for token in column_tokens[max(first, self.sinks) : max(self.first, self.sinks)]:
                        token.pack(self.plan_layer)
        expected = [
            [
                [self.output(row, head, q[row, head, i].tolist(), before, i, first) for i in range(tokens)]
                for head in range(GROUPS * KV_HEADS)
            ]
            for row in range(len(self.rows))
        ]
        found = self.cache.attend(q, visible)
        all_tokens = [token for row in self.rows for head in row for token in head]
        keys, values = ([getattr(token, name) for token in all_tokens] for name in ("key", "value"))
        bound = attention_bound(q, torch.tensor(keys)[None, None], torch.tensor(values)[None, None])
        assert_within(found, torch.tensor(expected, dtype=torch.float64), bound)

    def output(self, row, head, q, before, i, first):
        """Attention of query `i` of a chunk that begins at column `before`."""
        tokens, start = self.rows[row][head // GROUPS], self.padding[row]
        window = max(before - self.buffer + 1 + (i if self.prefill == "windowed" else 0), first)
        keys, values = [], []
        for column in range(start, before + i + 1):
            token = tokens[column]
            if column >= window or column < start + self.sinks:
                keys.append(token.key)
                values.append(token.value)
            elif self.plan_layer is not None and column >= self.sinks + self.dropped:
                keys.append(token.packed[0])
                values.append(token.packed[1])
        return attend_one(q, keys, values)

    @rule(data=st.data())
    def crop(self, data):
        self.length = data.draw(st.integers(0, self.length))
        self.cache.crop(self.length)
        if self.length == 0:
            return self.forget()
        owed = max(self.dropped - max(self.first - self.sinks, 0), 0)
        self.first = min(self.first, self.length)
        # Columns that come again are kept, but for as many as are still owed.
        self.dropped = min(self.dropped, max(self.first - self.sinks, 0)) + owed
        self.rows = [[head[: self.length] for head in row] for row in self.rows]

    @rule(plan_layer=plans)
    def repack(self, plan_layer):
        if self.plan_layer is None:
            with pytest.raises(ValueError, match="a cache without history has none"):
                self.cache.repack(plan_layer)
            return
        self.cache.repack(plan_layer)
        self.plan_layer = plan_layer
        for row in self.rows:
            for head in row:
                for token in head[self.sinks : self.first]:
                    token.pack(plan_layer)

    @rule(tokens=st.integers(0, 12))
    def drop(self, tokens):
        """Also more than the history holds: then the next ones that leave the buffer."""
        self.cache.evict(tokens)
        self.dropped += tokens

    @rule(rows=st.lists(st.integers(0, 10), min_size=1, max_size=3))
    @precondition(lambda self: self.length > 0)
    def reorder(self, rows):
        rows = [row % len(self.rows) for row in rows]
        index = torch.tensor(rows)
        self.cache.map_batch(lambda t: t.index_select(0, index))
        self.rows = [[[copy_of(token) for token in head] for head in self.rows[row]] for row in rows]
        self.padding = [self.padding[row] for row in rows]

    @rule()
    def reset(self):
        self.cache.reset()
        self.forget()

    @rule(seed=seeds)
    def refuse(self, seed):
        """An update that does not fit changes nothing: whatever follows shows it."""
        _, k, v = qkv(seed, len(self.rows), (4, KV_HEADS), 1, 1, D, DV, torch.float32)
        with pytest.raises((ValueError, TypeError)):
            self.cache.update(k, v[..., 0])
        with pytest.raises((ValueError, TypeError)):
            self.cache.update(k, v.bfloat16())

    @invariant()
    def counts(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.length == self.length
        stored = max(self.first - self.sinks - self.dropped, 0) if self.plan_layer is not None else 0
        assert self.cache.history_length == stored
        if self.cache.state.k_history is not None:
            assert self.cache.state.k_history.format == self.plan_layer.keys
            assert self.cache.state.k_history.shape[2] >= stored
        assert self.cache.dropped == self.dropped


def copy_of(token: Token) -> Token:
    copy = Token(token.key, token.value)
    copy.packed = token.packed
    return copy


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=4 * settings().max_examples)


def test_the_oracle_knows_the_reference():
    """Once, so that the oracle itself stands on something: token by token it is `reference.windowed_attention`."""
    q, k, v = qkv(0, 2, (GROUPS * KV_HEADS, KV_HEADS), 12, 12, D, DV, torch.float32)
    machine = CacheMachine()
    plan_layer = LayerPlan(TopK(D, 2, bits=16), TopK(DV, 3, bits=16))
    machine.build(plan_layer, 3, 1, "windowed")
    for i in range(12):
        for row in range(2):
            for head in range(KV_HEADS):
                machine.rows[row][head].append(Token(k[row, head, i].tolist(), v[row, head, i].tolist()))
                for token in machine.rows[row][head][1 : max(i + 1 - 3, 1)]:
                    token.pack(plan_layer)
    found = [
        [[machine.output(r, h, q[r, h, i].tolist(), i, 0, max(0, i - 3)) for i in range(12)] for h in range(4)]
        for r in range(2)
    ]
    pruned = reference.prune(k.double(), plan_layer.keys), reference.prune(v.double(), plan_layer.values)
    expected = reference.windowed_attention(q.double(), k.double(), v.double(), *pruned, buffer=3, sinks=1)
    assert_within(torch.tensor(found, dtype=torch.float64), expected, attention_bound(q.double(), k, v.double()))
