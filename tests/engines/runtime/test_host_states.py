"""States of several slots as one array, brought up to date before each call."""

from __future__ import annotations

import numpy as np
import pytest

from twotower_engines.runtime.host_states import CAPACITY_STEP, Batch, Slot, StateShapes

LAYERS, HEADS, SIZE, SLOTS = 3, 2, 4, 5
SHAPES = StateShapes(((("a", "b"), (3,)),), ("k", "v", "w"), HEADS, SIZE)


def empty_slot():
    return Slot(0, SHAPES.empty(1, 400), None)


def extend(slot, draw, tokens):
    end = slot.length + tokens
    slot.states = slot.states._replace(mamba=(draw.standard_normal((2, 1, 3)).astype(np.float32),))
    new = draw.standard_normal((LAYERS, HEADS, tokens, SIZE))
    slot.states.caches[:, 0, :, slot.length : end] = new
    slot.length = end


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_its_slots_whatever_came_before(seed):
    """Slots join, leave, are extended and emptied; a call writes what is no number behind each."""
    draw = np.random.default_rng(seed)
    batch = Batch(SLOTS, SHAPES)
    slots = [empty_slot() for _ in range(SLOTS)]
    for _ in range(60):
        for index in range(SLOTS):
            if draw.random() < 0.1 or slots[index].length > 360:
                slots[index] = empty_slot()
            if draw.random() < 0.4:
                extend(slots[index], draw, int(draw.integers(1, 30)))
        chosen = [slots[i] for i in draw.permutation(SLOTS)[: draw.integers(1, SLOTS + 1)]]
        tokens = int(draw.integers(1, 17))
        held = batch.take_held(chosen, tokens) if draw.random() < 0.5 else None
        places, states = held or batch.take(chosen, tokens)
        assert sorted(places) == list(range(len(chosen)))
        assert all(array.flags.c_contiguous for array in SHAPES.named(states).values())
        needed = max(slot.length for slot in chosen) + tokens
        assert needed <= states.caches.shape[3] <= needed * 5 // 4 + 2 * CAPACITY_STEP
        for place, slot in zip(places, chosen, strict=True):
            np.testing.assert_array_equal(states.mamba[0][:, place], slot.states.mamba[0][:, 0])
            row, end = states.caches[:, place], slot.length + tokens
            expected = slot.states.caches[:, 0, :, : slot.length]
            np.testing.assert_array_equal(row[:, :, : slot.length], expected)
            assert np.isfinite(row[:, :, end:]).all()
            row[:, :, slot.length : end] = np.nan  # the call


def test_slots_that_lie_side_by_side_are_taken_as_they_lie():
    draw = np.random.default_rng(0)
    batch = Batch(SLOTS, SHAPES)
    slots = [empty_slot() for _ in range(4)]
    for slot in slots:
        extend(slot, draw, 200)
    assert batch.take_held(slots, 16) is None
    _, states = batch.take(slots, 16)
    extend(slots[1], draw, 16)
    states.caches[..., :200, :] = 7  # a place that is copied again loses the mark
    places, part = batch.take_held([slots[2], slots[1]], 16)
    assert places == [1, 0]
    assert np.shares_memory(part.caches, states.caches[:, 1:3])
    assert (part.caches[..., :200, :] == 7).all()
    new = slots[1].states.caches[:, 0, :, 200:216]
    np.testing.assert_array_equal(part.caches[:, 0, :, 200:216], new)
    np.testing.assert_array_equal(part.mamba[0][:, 0], slots[1].states.mamba[0][:, 0])
    assert batch.take_held([slots[0], slots[2]], 16) is None, "another lies between"
    assert batch.take_held([slots[0], empty_slot()], 16) is None
    assert batch.take_held(slots[:1], 200) is None, "there is no room behind it"


def test_only_what_is_new_is_copied():
    draw = np.random.default_rng(0)
    batch = Batch(SLOTS, SHAPES)
    slots = [empty_slot() for _ in range(3)]
    for slot in slots:
        extend(slot, draw, 50)
    places, states = batch.take(slots, 16)
    states.caches[:] = 7  # a place that is copied again loses the mark
    extend(slots[1], draw, 16)
    again, states = batch.take([slots[2], slots[1], slots[0]], 16)
    assert again == places[::-1]
    changed = states.caches[:, places[1]] != 7
    assert changed[:, :, 50:66].all()
    assert not changed[:, :, :50].any()
    assert (states.caches[:, [places[0], places[2]]] == 7).all()
