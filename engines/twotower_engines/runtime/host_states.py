"""The slots of the CPU flavour, and the states of prefixes that are kept beside them.

States of one shape are one array, [layers, rows, ...]: a row's states of all layers are copied at
once. A call takes the arrays of the layers under their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from twotower_contract.config import ModelConfig

Array = npt.NDArray[Any]
CAPACITY_STEP = 64  # tokens; keeps the number of different input shapes small


class States(NamedTuple):
    """The states of some rows.

    Attributes:
        mamba: (layers, rows, ...) float32: convolution states, SSM states.
        caches: (layers * 2, rows, kv_heads, capacity, head_dim) float32: keys and values.
    """

    mamba: tuple[Array, ...]
    caches: Array


@dataclass(frozen=True)
class StateShapes:
    """Names and shapes of a model's states.

    Attributes:
        mamba: Names of the layers' inputs, and shape per row, for each array of `States.mamba`.
        caches: Names of the layers' inputs of keys and values.
        heads: Of keys and values.
        size: Of a head.
    """

    mamba: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    caches: tuple[str, ...]
    heads: int
    size: int

    @classmethod
    def of(cls, model: ModelConfig) -> StateShapes:
        """Return those of a model; a head's SSM state is [N, P] here."""
        shapes = {
            "conv_state": (model.conv_kernel - 1, model.conv_dim),
            "ssm_state": (model.mamba_num_heads, model.ssm_state_size, model.mamba_head_dim),
        }
        layers = model.layers_of_kind
        mamba = tuple(
            (tuple(f"context.layers.{layer}.{kind}" for layer in layers["M"]), shape)
            for kind, shape in shapes.items()
        )
        caches = (f"context.layers.{layer}.{kind}_cache" for layer in layers["*"] for kind in "kv")
        return cls(mamba, tuple(caches), model.num_key_value_heads, model.head_dim)

    def empty(self, rows: int, capacity: int) -> States:
        """Return the states of rows without a token."""
        return States(self.empty_mamba(rows), self.empty_caches(rows, capacity))

    def empty_mamba(self, rows: int) -> tuple[Array, ...]:
        """Return the Mamba states of rows without a token."""
        return tuple(
            np.zeros((len(names), rows, *shape), np.float32) for names, shape in self.mamba
        )

    def empty_caches(self, rows: int, capacity: int) -> Array:
        """Return keys and values of rows without a token."""
        return np.zeros((len(self.caches), rows, self.heads, capacity, self.size), np.float32)

    def named(self, states: States) -> dict[str, Array]:
        """Return the states of each layer under its name."""
        return {**self.named_mamba(states.mamba), **self.named_caches(states.caches)}

    def named_mamba(self, arrays: Sequence[Array], end: str = "") -> dict[str, Array]:
        """Return the Mamba states of each layer under its name, to which `end` is added."""
        return {
            name + end: array
            for (names, _), layers in zip(self.mamba, arrays, strict=True)
            for name, array in zip(names, layers, strict=True)
        }

    def named_caches(self, caches: Array, end: str = "") -> dict[str, Array]:
        """Return the keys and values of each layer under its name, to which `end` is added."""
        return {name + end: array for name, array in zip(self.caches, caches, strict=True)}


@dataclass(slots=True)
class Slot:
    """The context of one request.

    Attributes:
        length: Tokens in the context.
        states: Those after `length` tokens, of one row.
        previous: The Mamba states after `length - 1` tokens, where they were kept.
        key: Tells this request from those that had the slot before.
    """

    length: int
    states: States
    previous: tuple[Array, ...] | None
    key: object = field(default_factory=object)

    def make_room(self, tokens: int, limit: int) -> None:
        """Let the caches hold so many tokens, at most `limit` if that is enough."""
        if tokens > self.states.caches.shape[3]:
            self.states = self.states._replace(caches=grown(self.states.caches, tokens, limit))


class _Held(NamedTuple):
    """A place of a batch: whose it is, tokens of its context, and end of all that is written."""

    key: object
    length: int
    end: int


class Batch:
    """States of several slots as a call takes them, in arrays that are kept from call to call.

    A slot that was extended since has only its new tokens copied, and its Mamba states.

    Args:
        places: Most slots of a call.
        shapes: Of the states.
    """

    def __init__(self, places: int, shapes: StateShapes) -> None:
        self._shapes, self._places = shapes, places
        self._states = shapes.empty(places, 0)
        self._held: list[_Held | None] = [None] * places

    def take(self, slots: Sequence[Slot], tokens: int) -> tuple[list[int], States]:
        """Return the place of each slot, and the states with a row for each place.

        Args:
            slots: Different slots.
            tokens: Tokens of a row in the call, which may be written behind each context.
        """
        needed = max(slot.length for slot in slots) + tokens
        if not self._fits(needed):
            capacity = -(-(needed * 17 // 16) // CAPACITY_STEP) * CAPACITY_STEP
            caches = self._shapes.empty_caches(self._places, capacity)
            self._states = self._states._replace(caches=caches)
            self._held = [None] * self._places
        return self._taken(self._find_places(slots), slots, tokens)

    def take_held(self, slots: Sequence[Slot], tokens: int) -> tuple[list[int], States] | None:
        """Return what `take` does where the slots lie side by side already, and None elsewhere.

        No other slot gives up its place, and a place is counted from the first of these.
        """
        keys = [None if held is None else held.key for held in self._held]
        if any(slot.key not in keys for slot in slots):
            return None
        places = [keys.index(slot.key) for slot in slots]
        needed = max(slot.length for slot in slots) + tokens
        is_apart = max(places) - min(places) >= len(slots)
        return None if is_apart or not self._fits(needed) else self._taken(places, slots, tokens)

    def _fits(self, needed: int) -> bool:
        # attention computes over the whole capacity, so that little of it may be left over
        capacity = self._states.caches.shape[3]
        return needed <= capacity <= needed * 5 // 4 + 2 * CAPACITY_STEP

    def _taken(
        self, places: Sequence[int], slots: Sequence[Slot], tokens: int
    ) -> tuple[list[int], States]:
        """Bring places up to date; returns them, counted from the first, and their states."""
        for place, slot in zip(places, slots, strict=True):
            self._copy(place, slot, tokens)
        first = min(places)
        part = slice(first, first + len(slots))
        mamba = tuple(array[:, part] for array in self._states.mamba)
        return [place - first for place in places], States(mamba, self._states.caches[:, part])

    def _find_places(self, slots: Sequence[Slot]) -> list[int]:
        """Return a place of each slot below their number: where it was, if it can."""
        held = [None if held is None else held.key for held in self._held[: len(slots)]]
        where = {slot.key: held.index(slot.key) for slot in slots if slot.key in held}
        free = iter(sorted(set(range(len(slots))) - set(where.values())))
        return [where[slot.key] if slot.key in where else next(free) for slot in slots]

    def _copy(self, place: int, slot: Slot, tokens: int) -> None:
        """Bring a place up to date with its slot."""
        held, end = self._held[place], slot.length + tokens
        if held == (slot.key, slot.length, end) and slot.length:
            return
        start = held.length if held is not None and held.key is slot.key else 0
        if start != slot.length or start == 0:
            for array, own in zip(self._states.mamba, slot.states.mamba, strict=True):
                array[:, place] = own[:, 0]
        row = self._states.caches[:, place]
        row[:, :, start : slot.length] = slot.states.caches[:, 0, :, start : slot.length]
        if held is not None and held.end > end:
            # masked, but it must be finite, and what another call wrote may be no number
            row[:, :, slot.length : held.end] = 0
        self._held[place] = _Held(slot.key, slot.length, end)


class HostStates:
    """Kept states in host memory; see `runtime.interface.StateStore`.

    Args:
        slots: The runtime's slots.
        size: Bytes that it may take.
        tokens: Tokens whose keys and values a place holds.
        context: Tokens that a slot may grow to.
    """

    def __init__(self, slots: list[Slot], size: int, tokens: int, context: int) -> None:
        self._slots, self._tokens, self._context = slots, tokens, context
        mamba, caches = slots[0].states
        self.place_bytes = sum(array.nbytes for array in mamba) + caches[..., 0, :].nbytes * tokens
        self.places = size // self.place_bytes if self.place_bytes else 0
        self._kept: dict[int, States] = {}

    def save(self, place: int, slot: int, tokens: int) -> None:
        """Copy a slot's Mamba states, and the keys and values of its last tokens, to a place."""
        (mamba, caches), end = self._slots[slot].states, self._slots[slot].length
        copies = tuple(array.copy() for array in mamba)
        self._kept[place] = States(copies, caches[..., end - tokens : end, :].copy())

    def restore(self, slot: int, places: Sequence[int]) -> None:
        """Fill an empty slot: the keys and values of all places, the Mamba states of the last."""
        filled = self._slots[slot]
        filled.length = len(places) * self._tokens
        filled.make_room(filled.length, self._context)
        filled.states = filled.states._replace(mamba=self._kept[places[-1]].mamba)
        kept = [self._kept[place].caches for place in places]
        filled.states.caches[..., : filled.length, :] = np.concatenate(kept, axis=3)


def grown(caches: Array, needed: int, limit: int) -> Array:
    """Return a larger copy of keys and values: half as much again, at least `needed`."""
    capacity = min(max(needed, caches.shape[3] * 3 // 2), max(limit, needed))
    capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
    larger = np.zeros((*caches.shape[:3], capacity, caches.shape[4]), caches.dtype)
    larger[..., : caches.shape[3], :] = caches
    return larger
