"""The slots of the CPU flavour, and the states of prefixes that are kept beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
CAPACITY_STEP = 64  # tokens; keeps the number of different input shapes small


@dataclass(slots=True)
class Slot:
    """The context of one request.

    Attributes:
        length: Tokens in the context.
        mamba: Input name to (1, ...) float32: convolution and SSM states after `length` tokens.
        previous: The same after `length - 1` tokens, where they were kept.
        attention: Input name to (1, kv_heads, capacity, head_dim) float32: keys and values.
        key: Tells this request from those that had the slot before.
    """

    length: int
    mamba: dict[str, Array]
    previous: dict[str, Array] | None
    attention: dict[str, Array]
    key: object = field(default_factory=object)


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
        mamba: Shape per slot of each Mamba state, by input name.
        attention: (kv_heads, head_dim) of keys and values, by input name.
    """

    def __init__(
        self,
        places: int,
        mamba: Mapping[str, tuple[int, ...]],
        attention: Mapping[str, tuple[int, int]],
    ) -> None:
        self._attention = attention
        self._mamba = {n: np.zeros((places, *shape), np.float32) for n, shape in mamba.items()}
        self._caches: dict[str, Array] = {}
        self._places = places
        self._capacity = 0
        self._held: list[_Held | None] = [None] * places

    def take(self, slots: Sequence[Slot], tokens: int) -> tuple[list[int], dict[str, Array]]:
        """Return the place of each slot, and the states with a row for each place.

        Args:
            slots: Different slots.
            tokens: Tokens of a row in the call, which may be written behind each context.
        """
        needed = max(slot.length for slot in slots) + tokens
        if not self._fits(needed):
            self._capacity = -(-(needed * 17 // 16) // CAPACITY_STEP) * CAPACITY_STEP
            self._caches = {
                name: np.zeros((self._places, heads, self._capacity, size), np.float32)
                for name, (heads, size) in self._attention.items()
            }
            self._held = [None] * self._places
        return self._taken(self._find_places(slots), slots, tokens)

    def take_held(
        self, slots: Sequence[Slot], tokens: int
    ) -> tuple[list[int], dict[str, Array]] | None:
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
        return needed <= self._capacity <= needed * 5 // 4 + 2 * CAPACITY_STEP

    def _taken(
        self, places: Sequence[int], slots: Sequence[Slot], tokens: int
    ) -> tuple[list[int], dict[str, Array]]:
        """Bring places up to date; returns them, counted from the first, and their arrays."""
        for place, slot in zip(places, slots, strict=True):
            self._copy(place, slot, tokens)
        first = min(places)
        part = slice(first, first + len(slots))
        arrays = self._mamba | self._caches
        return [place - first for place in places], {name: a[part] for name, a in arrays.items()}

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
            for name, array in self._mamba.items():
                array[place] = slot.mamba[name][0]
        for name, cache in self._caches.items():
            row = cache[place]
            row[:, start : slot.length] = slot.attention[name][0, :, start : slot.length]
            if held is not None and held.end > end:
                # masked, but it must be finite, and what another call wrote may be no number
                row[:, slot.length : held.end] = 0
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
        self.place_bytes = sum(array.nbytes for array in slots[0].mamba.values())
        self.place_bytes += (
            sum(cache[:, :, 0].nbytes for cache in slots[0].attention.values()) * tokens
        )
        self.places = size // self.place_bytes if self.place_bytes else 0
        self._kept: dict[int, tuple[dict[str, Array], dict[str, Array]]] = {}

    def save(self, place: int, slot: int, tokens: int) -> None:
        """Copy a slot's Mamba states, and the keys and values of its last tokens, to a place."""
        states = self._slots[slot]
        mamba = {name: array.copy() for name, array in states.mamba.items()}
        part = slice(states.length - tokens, states.length)
        caches = {name: cache[:, :, part].copy() for name, cache in states.attention.items()}
        self._kept[place] = mamba, caches

    def restore(self, slot: int, places: Sequence[int]) -> None:
        """Fill an empty slot: the keys and values of all places, the Mamba states of the last."""
        states = self._slots[slot]
        states.mamba = dict(self._kept[places[-1]][0])
        states.length = len(places) * self._tokens
        for name, cache in states.attention.items():
            kept = np.concatenate([self._kept[place][1][name] for place in places], axis=2)
            larger = grown(cache, states.length, self._context)
            larger[:, :, : states.length] = kept
            states.attention[name] = larger


def grown(cache: Array, needed: int, limit: int) -> Array:
    """Return a larger copy of keys or values: half as much again, at least `needed`."""
    capacity = min(max(needed, cache.shape[2] * 3 // 2), max(limit, needed))
    capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
    larger = np.zeros((*cache.shape[:2], capacity, cache.shape[3]), cache.dtype)
    larger[:, :, : cache.shape[2]] = cache
    return larger
