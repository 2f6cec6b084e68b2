"""Batches whose second half recalls the first."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from swan.calibration.batches import PIECE, recalling


@given(st.integers(1, 700), st.integers(1, 260), st.integers(0, 5))
def test_recalling_repeats_pieces_in_another_order(count, least, seed):
    ids = torch.arange(2 * count).reshape(2, count)
    pieces = (count - 1) // 2 // PIECE
    found = recalling(ids, least, random.Random(seed))
    if pieces * PIECE < least:
        assert found is None
        return
    half = ids[:, count - pieces * PIECE :]
    assert torch.equal(found[:, : 1 + half.shape[1]], torch.cat([ids[:, :1], half], 1))
    order = [piece[0, 0].item() for piece in found[:, 1 + half.shape[1] :].split(PIECE, 1)]
    repeated = torch.cat([half[:, start - int(half[0, 0]) :][:, :PIECE] for start in order], 1)
    assert torch.equal(found[:, 1 + half.shape[1] :], repeated)
    assert sorted(order) == half[0, ::PIECE].tolist()


def test_recalling_is_shuffled():
    ids = torch.arange(1025)[None]
    orders = [recalling(ids, 128, random.Random(seed))[0, 513:] for seed in range(3)]
    assert not any(torch.equal(order, ids[0, 513:]) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_recalling_takes_what_can_be_reordered():
    ids, rng = torch.arange(1, 301)[None], random.Random(0)
    mask = torch.ones_like(ids)
    found = recalling({"input_ids": ids, "attention_mask": mask, "labels": None}, 128, rng)
    assert found["labels"] is None and found["input_ids"].shape == found["attention_mask"].shape == (1, 257)
    embedded = torch.randn(1, 300, 8)
    assert recalling(embedded, 128, rng).shape == (1, 257, 8)
    mask[0, 0] = 0
    for others in ({"attention_mask": mask}, {"position_ids": ids}, {"attention_mask": torch.ones(1, 1, 300, 300)}):
        assert recalling({"input_ids": ids, **others}, 128, rng) is None
    assert recalling({"ids": ids}, 128, rng) is None  # of a model of one's own
