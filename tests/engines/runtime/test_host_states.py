"""States of several slots as one array, brought up to date before each call."""

from __future__ import annotations

import numpy as np
import pytest

from twotower_engines.runtime.host_states import CAPACITY_STEP, Batch, Slot

HEADS, SIZE, SLOTS = 2, 4, 5


def empty_slot(capacity=400):
    cache = np.zeros((1, HEADS, capacity, SIZE), np.float32)
    return Slot(0, {"ssm": np.zeros((1, 3), np.float32)}, None, {"k": cache})


def extend(slot, draw, tokens):
    end = slot.length + tokens
    slot.mamba = {"ssm": draw.standard_normal((1, 3)).astype(np.float32)}
    slot.attention["k"][0, :, slot.length : end] = draw.standard_normal((HEADS, tokens, SIZE))
    slot.length = end


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_its_slots_whatever_came_before(seed):
    """Slots join, leave, are extended and emptied; a call writes what is no number behind each."""
    draw = np.random.default_rng(seed)
    batch = Batch(SLOTS, {"ssm": (3,)}, {"k": (HEADS, SIZE)})
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
        assert states["k"].flags.c_contiguous
        needed = max(slot.length for slot in chosen) + tokens
        assert needed <= states["k"].shape[2] <= needed * 5 // 4 + 2 * CAPACITY_STEP
        for place, slot in zip(places, chosen, strict=True):
            np.testing.assert_array_equal(states["ssm"][place], slot.mamba["ssm"][0])
            row, end = states["k"][place], slot.length + tokens
            expected = slot.attention["k"][0, :, : slot.length]
            np.testing.assert_array_equal(row[:, : slot.length], expected)
            assert np.isfinite(row[:, end:]).all()
            row[:, slot.length : end] = np.nan  # the call


def test_slots_that_lie_side_by_side_are_taken_as_they_lie():
    draw = np.random.default_rng(0)
    batch = Batch(SLOTS, {"ssm": (3,)}, {"k": (HEADS, SIZE)})
    slots = [empty_slot() for _ in range(4)]
    for slot in slots:
        extend(slot, draw, 200)
    assert batch.take_held(slots, 16) is None
    _, states = batch.take(slots, 16)
    extend(slots[1], draw, 16)
    states["k"][:, :, :200] = 7  # a place that is copied again loses the mark
    places, part = batch.take_held([slots[2], slots[1]], 16)
    assert places == [1, 0]
    assert np.shares_memory(part["k"], states["k"][1:3])
    assert (part["k"][:, :, :200] == 7).all()
    np.testing.assert_array_equal(part["k"][0, :, 200:216], slots[1].attention["k"][0, :, 200:216])
    np.testing.assert_array_equal(part["ssm"][0], slots[1].mamba["ssm"][0])
    assert batch.take_held([slots[0], slots[2]], 16) is None, "another lies between"
    assert batch.take_held([slots[0], empty_slot()], 16) is None
    assert batch.take_held(slots[:1], 200) is None, "there is no room behind it"


def test_only_what_is_new_is_copied():
    draw = np.random.default_rng(0)
    batch = Batch(SLOTS, {"ssm": (3,)}, {"k": (HEADS, SIZE)})
    slots = [empty_slot() for _ in range(3)]
    for slot in slots:
        extend(slot, draw, 50)
    places, states = batch.take(slots, 16)
    states["k"][:] = 7  # a place that is copied again loses the mark
    extend(slots[1], draw, 16)
    again, states = batch.take([slots[2], slots[1], slots[0]], 16)
    assert again == places[::-1]
    changed = states["k"][places[1]] != 7
    assert changed[:, 50:66].all()
    assert not changed[:, :50].any()
    assert (states["k"][[places[0], places[2]]] == 7).all()
