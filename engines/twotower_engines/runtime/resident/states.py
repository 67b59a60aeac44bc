"""The context's states of all slots, resident on a device.

States of one kind (SSM, convolution, keys and values) have one shape in all layers, so each kind is
one allocation, [layers][slots][a slot's row], and an engine reads the rows of neighbouring slots
where they lie.

Keys and values are updated there as well: an engine takes a cache and gives it back at the same
address, with the tokens of the call written behind the context's; the denoiser writes its block at
the cache's end. Each slot has room for one call beside its context.

A context call writes its new Mamba states to a landing buffer of the same layout, and the active
rows are copied to their slots from there: 46 MB of SSM states per row of the full model, 20
microseconds on an H200, against some 5 ms of the call. (Two buffers taking turns would save that
copy, but a call covers only some of the slots, and the others would be left behind in the wrong
buffer.)

Because all layers of a kind lie in one allocation, a strided copy takes a row of every layer home
at once. An extension takes one copy of each Mamba kind for each run of neighbouring slots; where
the denoiser's GPU has the states as well, as many more, and one of keys and values for each slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twotower_contract.config import ModelConfig
from twotower_contract.engine_set import Limits
from twotower_engines.runtime.resident.device import ALIGNMENT, Box, Device, aligned
from twotower_engines.runtime.resident.engine import Shape

SSM_ITEM = 4  # float32 in every graph


@dataclass(frozen=True, slots=True)
class StateKind:
    """State inputs of one shape: the same state of all layers that have it.

    Attributes:
        names: Names of the inputs, in the order of the layers, as `context.layers.0.ssm_state`.
        row: Shape of one slot's row.
        item: Bytes per element.
        grows: True for keys and values, [heads, tokens, size], which a call extends in place.
    """

    names: tuple[str, ...]
    row: Shape
    item: int
    grows: bool

    @property
    def parts(self) -> int:
        """Pieces of a row, each with a range of tokens of its own: heads of keys and values."""
        return self.row[0] if self.grows else 1

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one head."""
        return self.row[-1] * self.item

    @property
    def pitch(self) -> int:
        """Bytes of one part of a row."""
        return math.prod(self.row) * self.item // self.parts

    def box(self, start: int, rows: int) -> Box:
        """Return the box of all layers, where it begins at `start`; each layer is aligned."""
        step = ALIGNMENT // math.gcd(self.pitch, ALIGNMENT)
        return Box(start, self.pitch, -(-rows * self.parts // step) * step)


def state_kinds(model: ModelConfig, limits: Limits, item: int) -> tuple[StateKind, ...]:
    """Return all states of a model; `item` is the size of the graph's dtype in bytes."""
    mamba, attention = (
        [f"context.layers.{layer}" for layer in layers]
        for layers in (model.layers_of_kind["M"], model.layers_of_kind["*"])
    )
    conv = (model.conv_kernel - 1, model.conv_dim)
    ssm = (model.mamba_num_heads, model.mamba_head_dim, model.ssm_state_size)
    cache = (model.num_key_value_heads, limits.cache_tokens, model.head_dim)
    caches = [f"{layer}.{one}_cache" for layer in attention for one in "kv"]
    kinds = (
        StateKind(tuple(f"{layer}.conv_state" for layer in mamba), conv, item, grows=False),
        StateKind(tuple(f"{layer}.ssm_state" for layer in mamba), ssm, SSM_ITEM, grows=False),
        StateKind(tuple(caches), cache, item, grows=True),
    )
    return tuple(kind for kind in kinds if kind.names)


def window_step(kinds: Sequence[StateKind]) -> int:
    """Return the slot stride at which the states of a call are aligned.

    It is 1 for the full-size model; a tiny one has rows of fewer than 256 bytes.
    """
    rows = (kind.pitch * kind.parts for kind in kinds)
    return math.lcm(*(ALIGNMENT // math.gcd(row, ALIGNMENT) for row in rows))


@dataclass(frozen=True, slots=True)
class Taken:
    """A row of a context call, and the slot that it extended.

    Attributes:
        length: Tokens of the slot's context before the call.
        valid: Tokens of this row in the call.
    """

    row: int
    slot: int
    length: int
    valid: int


class Landing:
    """Where the new Mamba states of a context call are written."""

    def __init__(self, kinds: Sequence[StateKind], rows: int) -> None:
        self._boxes: list[tuple[StateKind, Box]] = []
        self.size = 0
        for kind in kinds:
            if not kind.grows:
                box = kind.box(self.size, rows)
                self._boxes.append((kind, box))
                self.size += aligned(box.layer * len(kind.names))

    def boxes(self, start: int) -> dict[StateKind, Box]:
        """Return the box of each kind, where the landing place begins at `start`."""
        return {kind: box.moved(start) for kind, box in self._boxes}

    def addresses(self, start: int) -> dict[str, int]:
        """Return where each output begins, by its name."""
        return {
            f"{name}_new": box.address + layer * box.layer
            for kind, box in self.boxes(start).items()
            for layer, name in enumerate(kind.names)
        }


class SlotStates:
    """The states of every slot on one device.

    Args:
        keeps_previous: Whether there is a second set of Mamba states, for `keep_previous`.
    """

    def __init__(
        self, device: Device, kinds: Sequence[StateKind], slots: int, *, keeps_previous: bool
    ) -> None:
        self.device = device
        self.kinds = tuple(kinds)
        self._slots = slots
        self._boxes = {kind: self._allocate(kind) for kind in kinds}
        self._previous = {
            kind: self._allocate(kind) for kind in kinds if keeps_previous and not kind.grows
        }

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The box of each of `kinds`."""
        return tuple(self._boxes[kind] for kind in self.kinds)

    def reset(self, slot: int) -> None:
        """Set a slot's states to zero.

        Keys and values past a length count for nothing, but only while they are finite: attention
        multiplies them by 0, and what a slot was given up with may be NaN.
        """
        for boxes in (self._boxes, self._previous):
            for kind, box in boxes.items():
                row = kind.parts * box.pitch
                self.device.zero(box.address + slot * row, box.layer, row, len(kind.names))

    def addresses(self, first: int = 0, *, previous: bool = False) -> dict[str, int]:
        """Return where the rows from slot `first` on begin, by name of the input.

        Keys and values are outputs as well, at the same addresses.

        Args:
            first: The first row of the call; a multiple of `window_step`.
            previous: The Mamba states of `keep_previous` instead of the newest.
        """
        boxes = {**self._boxes, **self._previous} if previous else self._boxes
        return {
            name: box.address + layer * box.layer + first * kind.parts * box.pitch
            for kind, box in boxes.items()
            for layer, given in enumerate(kind.names)
            for name in ((given, f"{given}_new") if kind.grows else (given,))
        }

    def keep_previous(self, slots: Sequence[int]) -> None:
        """Keep the Mamba states of some slots as they are now, before a call renews them."""
        rows = [Taken(slot, slot, 0, 0) for slot in slots]
        for kind, kept in self._previous.items():
            self._move(self.device, kind, kept, self._boxes[kind], rows)

    def take(self, source: Device, landed: dict[StateKind, Box], rows: Sequence[Taken]) -> None:
        """Copy new Mamba states of a context call into the slots of its rows.

        Args:
            source: The device of the call, in whose order the copies happen.
            landed: Where each kind landed.
            rows: Active rows, in order.
        """
        for kind, new in landed.items():
            self._move(source, kind, self._boxes[kind], new, rows)

    def take_tokens(self, other: SlotStates, rows: Sequence[Taken]) -> None:
        """Copy what a call added to the keys and values of another device's slots."""
        for kind, home in self._boxes.items():
            if not kind.grows:
                continue
            for one in rows:
                begin = one.slot * kind.parts * home.pitch + one.length * kind.token_bytes
                other.device.copy_box(
                    home.moved(begin),
                    other._boxes[kind].moved(begin),
                    one.valid * kind.token_bytes,
                    kind.parts,
                    len(kind.names),
                    self.device,
                )

    def _allocate(self, kind: StateKind) -> Box:
        box = kind.box(0, self._slots)
        rows = box.height * len(kind.names)
        address = self.device.allocate(box.pitch * rows)
        self.device.zero(address, box.pitch, box.pitch, rows)
        return box.moved(address)

    def _move(
        self, source: Device, kind: StateKind, home: Box, new: Box, rows: Sequence[Taken]
    ) -> None:
        """Copy whole rows to their slots: a run of neighbours and all layers at once."""
        for row, slot, count in _runs(rows):
            target, begin = home.moved(slot * home.pitch), new.moved(row * new.pitch)
            source.copy_box(target, begin, home.pitch, count, len(kind.names), self.device)


def _runs(rows: Sequence[Taken]) -> Iterator[tuple[int, int, int]]:
    """Yield first row, first slot and length of each run of neighbouring rows and slots."""
    start = 0
    for end in range(1, len(rows) + 1):
        last = rows[end - 1]
        if end == len(rows) or (rows[end].row, rows[end].slot) != (last.row + 1, last.slot + 1):
            yield rows[start].row, rows[start].slot, end - start
            start = end
