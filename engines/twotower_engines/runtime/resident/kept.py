"""States of prefixes, kept on the context tower's device beside the slots.

A place is a slot of its own, with room for the keys and values of one chunk only. Copied states
stay on the device; a denoiser on another device gets its copy of what is restored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from twotower_engines.runtime.resident.device import Device
from twotower_engines.runtime.resident.states import SlotStates


class KeptStates:
    """Room for prefixes; see `runtime.interface.StateStore`.

    Args:
        homes: The slots' states; on the context tower's device first.
        lengths: Tokens of each slot; what is restored sets them.
        size: Bytes that it may take.
        tokens: Tokens whose keys and values a place holds.
    """

    def __init__(
        self, homes: Sequence[SlotStates], lengths: list[int], size: int, tokens: int
    ) -> None:
        self._homes, self._lengths, self._tokens = homes, lengths, tokens
        kinds = [
            replace(kind, row=(kind.row[0], tokens, kind.row[2])) if kind.grows else kind
            for kind in homes[0].kinds
        ]
        self.place_bytes = sum(math.prod(kind.row) * kind.item * len(kind.names) for kind in kinds)
        self.places = size // self.place_bytes if self.place_bytes else 0
        if self.places:
            self._kept = SlotStates(self._device, kinds, self.places, keeps_previous=False)

    def save(self, place: int, slot: int, tokens: int) -> None:
        """Copy a slot's Mamba states, and the keys and values of its last tokens, to a place."""
        self._copy(self._homes[0], slot, self._lengths[slot] - tokens, self._kept, place, 0, True)

    def restore(self, slot: int, places: Sequence[int]) -> None:
        """Fill an empty slot: the keys and values of all places, the Mamba states of the last."""
        for home in self._homes:
            if home.device is not self._device:
                self._device.follow(home.device)  # it may read the slot's states still
            for number, place in enumerate(places):
                is_last = number == len(places) - 1
                self._copy(self._kept, place, 0, home, slot, number * self._tokens, is_last)
        self._device.synchronize()
        self._lengths[slot] = len(places) * self._tokens

    @property
    def _device(self) -> Device:
        return self._homes[0].device

    def _copy(
        self,
        source: SlotStates,
        row: int,
        begin: int,
        target: SlotStates,
        to_row: int,
        to_begin: int,
        with_mamba: bool,
    ) -> None:
        """Copy keys and values of a chunk, from token `begin` to `to_begin`, and Mamba states."""
        for kind, old, new in zip(source.kinds, source.boxes, target.boxes, strict=True):
            if not (kind.grows or with_mamba):
                continue
            width = self._tokens * kind.token_bytes if kind.grows else old.pitch
            token = kind.token_bytes if kind.grows else 0
            self._device.copy_box(
                new.moved(to_row * kind.parts * new.pitch + to_begin * token),
                old.moved(row * kind.parts * old.pitch + begin * token),
                width,
                kind.parts,
                len(kind.names),
                target.device,
            )
