"""The context's states of all slots, resident on a device.

One buffer per state input, one row per slot, so that an engine reads the rows of neighbouring slots
where they lie. A context call writes its new states to a landing place and the rows that took part
are copied home from there: 46 MB of SSM states per row of the full-size model, 20 microseconds on
an H200, against some 5 ms of the call. (Two buffers taking turns would save that copy, but a call
covers only some of the slots, and the others would be left behind in the wrong buffer.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from twotower_engines.engine_set import Limits
from twotower_engines.manifest import ModelConfig
from twotower_engines.resident.device import Device
from twotower_engines.resident.engine import Shape

__all__ = ["SlotStates", "StateBuffer", "state_buffers"]

SSM_ITEM = 4  # float32 in every graph


@dataclass(frozen=True, slots=True)
class StateBuffer:
    """One state input of the engines.

    Attributes:
        name: Of the input, as `context.layers.0.ssm_state`.
        row: Shape of one slot's row.
        item: Bytes per element.
        grows: True for keys and values, of which a call returns only its own tokens.
    """

    name: str
    row: Shape
    item: int
    grows: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot."""
        return math.prod(self.row) * self.item

    @property
    def new_name(self) -> str:
        """The output that renews or extends it."""
        return self.name.removesuffix("cache") + "new" if self.grows else f"{self.name}_new"

    def new_row_bytes(self, tokens: int) -> int:
        """Bytes of one row of that output in a call of `tokens` tokens."""
        if not self.grows:
            return self.row_bytes
        heads, _, size = self.row
        return heads * tokens * size * self.item


def state_buffers(model: ModelConfig, limits: Limits, item: int) -> tuple[StateBuffer, ...]:
    """Return all states of a model; `item` is the size of the graph's dtype in bytes."""
    buffers = []
    for layer, kind in enumerate(model.pattern):
        name = f"context.layers.{layer}"
        if kind == "M":
            conv = (model.conv_kernel - 1, model.conv_dim)
            ssm = (model.mamba_num_heads, model.mamba_head_dim, model.ssm_state_size)
            buffers.append(StateBuffer(f"{name}.conv_state", conv, item, grows=False))
            buffers.append(StateBuffer(f"{name}.ssm_state", ssm, SSM_ITEM, grows=False))
        elif kind == "*":
            cache = (model.num_key_value_heads, limits.context, model.head_dim)
            buffers.append(StateBuffer(f"{name}.k_cache", cache, item, grows=True))
            buffers.append(StateBuffer(f"{name}.v_cache", cache, item, grows=True))
    return tuple(buffers)


class SlotStates:
    """The states of every slot on one device.

    Args:
        device: Where they live.
        buffers: Which there are.
        slots: Rows of each.
    """

    def __init__(self, device: Device, buffers: tuple[StateBuffer, ...], slots: int) -> None:
        self.device = device
        self.buffers = buffers
        self.slots = slots
        self._pools = {one.name: device.allocate(one.row_bytes * slots) for one in buffers}
        for one in buffers:
            device.zero(self._pools[one.name], one.row_bytes * slots)
        self._previous: dict[str, int] = {}

    def reset(self, slot: int) -> None:
        """Set a slot's Mamba states to zero. Keys and values past a length are never seen."""
        for one in self.buffers:
            if not one.grows:
                self.device.zero(self._pools[one.name] + slot * one.row_bytes, one.row_bytes)
                if self._previous:
                    start = self._previous[one.name] + slot * one.row_bytes
                    self.device.zero(start, one.row_bytes)

    def addresses(self, first: int = 0, *, previous: bool = False) -> dict[str, int]:
        """Return where the rows from slot `first` on begin, by name of the input.

        Args:
            first: The first row of the call.
            previous: The Mamba states of `keep_previous` instead of the newest.
        """
        if previous:
            self._make_previous()
        pools = {**self._pools, **self._previous} if previous else self._pools
        return {one.name: pools[one.name] + first * one.row_bytes for one in self.buffers}

    def keep_previous(self, slot: int) -> None:
        """Keep a slot's Mamba states as they are now, before a call renews them."""
        self._make_previous()
        for one in self.buffers:
            if not one.grows:
                offset = slot * one.row_bytes
                self.device.copy(
                    self._previous[one.name] + offset, self._pools[one.name] + offset, one.row_bytes
                )

    def take(
        self,
        source: Device,
        landed: Mapping[str, int],
        *,
        row: int,
        slot: int,
        tokens: int,
        length: int,
        valid: int,
    ) -> None:
        """Copy what a context call returned for one row into its slot.

        Args:
            source: The device of the call, in whose order the copies happen.
            landed: Where each output begins.
            row: Which row of the call.
            slot: Which slot it stands for.
            tokens: Tokens per row of the call, padding included.
            length: Tokens of the slot's context before the call.
            valid: Tokens of this row in the call.
        """
        for one in self.buffers:
            new = landed[one.new_name] + row * one.new_row_bytes(tokens)
            home = self._pools[one.name] + slot * one.row_bytes
            if not one.grows:
                source.copy(home, new, one.row_bytes)
                continue
            heads, capacity, size = one.row
            token = size * one.item
            source.copy_strided(
                home + length * token, capacity * token, new, tokens * token, valid * token, heads
            )

    def _make_previous(self) -> None:
        """Allocate the second set of Mamba states when mock-AR first asks for it."""
        if not self._previous:
            for one in self.buffers:
                if not one.grows:
                    address = self.device.allocate(one.row_bytes * self.slots)
                    self.device.zero(address, one.row_bytes * self.slots)
                    self._previous[one.name] = address
