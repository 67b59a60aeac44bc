"""The slots of the CPU flavour, and the states of prefixes that are kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """

    length: int
    mamba: dict[str, Array]
    previous: dict[str, Array] | None
    attention: dict[str, Array]


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
