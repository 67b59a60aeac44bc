"""States of the beginnings of prompts, kept for prompts that begin alike.

Prompts are cut into chunks of one size, and what is kept are the states after each full chunk: a
prompt that begins with the same chunks goes on from the last of them. Because every prompt is cut
at the same places, its answer is the one that it would get without, to the bit.

An entry stands for a chunk that follows another entry, so prompts share what they share. Each holds
the Mamba states after it and the keys and values of its own tokens. The entry that was used least
recently goes first; since using one uses all before it, that is never one that others follow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower_engines.runtime.interface import StateStore

ROOT = 0
"""The entry before the first chunk."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A chunk: the number of the one before, its tokens, and its place in the store."""

    before: int
    tokens: bytes
    place: int


class Prefixes:
    """The kept prefixes of one runtime.

    Args:
        store: Room for the states.
        chunk: Tokens of an entry.

    Attributes:
        evicted: Entries that made room for others so far.
    """

    def __init__(self, store: StateStore, chunk: int) -> None:
        self._store, self._chunk = store, chunk
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by number, last used last
        self._numbers: dict[tuple[int, bytes], int] = {}
        self._free = list(range(store.places))
        self._next = ROOT + 1
        self.evicted = 0

    @property
    def used_bytes(self) -> int:
        """Memory of the entries that there are."""
        return len(self._entries) * self._store.place_bytes

    @property
    def total_bytes(self) -> int:
        """Memory of as many entries as there can be."""
        return self._store.places * self._store.place_bytes

    def restore(self, slot: int, prompt: npt.NDArray[np.int32]) -> list[int]:
        """Fill an empty slot with the states of a prompt's beginning, as far as they are kept.

        At least one token is left, for which the engines are asked.

        Returns:
            Numbers of the entries, from the first chunk on.
        """
        chain: list[int] = []
        for end in range(self._chunk, prompt.size, self._chunk):
            tokens = prompt[end - self._chunk : end].tobytes()
            number = self._numbers.get((chain[-1] if chain else ROOT, tokens))
            if number is None:
                break
            chain.append(number)
        if chain:
            self._use(chain)
            self._store.restore(slot, [self._entries[number].place for number in chain])
        return chain

    def save(self, slot: int, chain: list[int], tokens: npt.NDArray[np.int32]) -> None:
        """Keep the states of a slot that has just read a chunk, and append the entry to its chain.

        Args:
            slot: The slot.
            chain: Entries of the chunks before this one, from the first on.
            tokens: (chunk,) int32.
        """
        before = chain[-1] if chain else ROOT
        if before != ROOT and before not in self._entries:
            return  # it had to go while this prompt was read
        key = (before, tokens.tobytes())
        number = self._numbers.get(key)
        if number is None:
            self._use(chain)
            place = self._place(keep=chain)
            if place is None:
                return
            number, self._next = self._next, self._next + 1
            self._store.save(place, slot, self._chunk)
            self._entries[number] = _Entry(*key, place)
            self._numbers[key] = number
        chain.append(number)
        self._use(chain)

    def _use(self, chain: Sequence[int]) -> None:
        """Make a chain the newest: the last chunk first, so that those before are newer."""
        for number in reversed(chain):
            self._entries.move_to_end(number)

    def _place(self, keep: Sequence[int]) -> int | None:
        """Return a free place; None where only `keep` could make room."""
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._entries))
        if oldest in keep:
            return None
        entry = self._entries.pop(oldest)
        del self._numbers[entry.before, entry.tokens]
        self.evicted += 1
        return entry.place
