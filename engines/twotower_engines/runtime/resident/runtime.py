"""The GPU runtime: fixed slots and row buckets; a denoise step copies only token ids to the host.

A call covers a window of neighbouring slots, so that states are read where they lie; inactive slots
inside the window have length 0. Rows and tokens of calls come in a few sizes, and all calls are
prepared when the runtime is made. Denoiser calls begin at slot 0, so that each can be captured once
and replayed later: one launch per step instead of some hundreds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from twotower_contract.engine_set import Limits
from twotower_contract.manifest import Manifest
from twotower_engines.artifacts.weights import Progress
from twotower_engines.runtime.interface import CLOSED, Denoised, DenoiseRow, ExtendRow, PredictRow
from twotower_engines.runtime.resident.calls import (
    REFINE_ROWS,
    CallMemory,
    CallSize,
    Queries,
    Tensors,
    bucket,
    call_sizes,
    packed,
    token_bucket,
    unseen_sizes,
)
from twotower_engines.runtime.resident.device import Box, Device
from twotower_engines.runtime.resident.engine import Call, Engine, Shape
from twotower_engines.runtime.resident.kept import KeptStates
from twotower_engines.runtime.resident.states import (
    Landing,
    SlotStates,
    StateKind,
    Taken,
    state_kinds,
    window_step,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tower:
    """A loaded tower: its engine, where it runs, and where its weights lie."""

    engine: Engine
    device: Device
    weights: Mapping[str, int]


@dataclass(frozen=True)
class _Prepared:
    """A call, its small tensors, how to run it, and where its new states land."""

    call: Call
    inputs: Tensors
    outputs: Tensors
    launch: Callable[[], None]
    landed: dict[StateKind, Box] = field(default_factory=dict)
    is_captured: bool = False


class ResidentRuntime:
    """A runtime on one or two devices; see `runtime.interface.Runtime` for its methods.

    Args:
        manifest: Manifest of the engine set.
        limits: Limits of the engine set.
        context: The context tower; the states of its slots live on its device.
        denoiser: The denoiser tower, or None. On another device it gets a copy of the states.
        progress: Called with the number of calls that are prepared, and of all calls.

    Raises:
        RuntimeLoadError: A device has no room, or no profile of an engine takes a call.
    """

    def __init__(
        self,
        manifest: Manifest,
        limits: Limits,
        context: Tower,
        denoiser: Tower | None,
        progress: Progress | None = None,
    ) -> None:
        self.limits = limits
        self.vocab_size = manifest.model.vocab_size
        self.mask_token_id = manifest.model.mask_token_id
        self.eos_token_ids = manifest.model.eos_token_ids
        self.has_denoiser = denoiser is not None
        self._context, self._denoiser = context, denoiser
        item = manifest.model.item_bytes
        self._kinds = state_kinds(manifest.model, limits, item)
        self._step = window_step(self._kinds)
        self._queries = Queries(manifest.model, item)
        has_mirror = denoiser is not None and denoiser.device is not context.device
        self._states = SlotStates(
            context.device,
            self._kinds,
            limits.slots,
            keeps_previous=denoiser is not None and not has_mirror,
        )
        self._mirror = self._states
        if denoiser is not None and has_mirror:
            self._mirror = SlotStates(
                denoiser.device, self._kinds, limits.slots, keeps_previous=True
            )
        self._lengths = [0] * limits.slots
        self._calls: dict[CallSize, _Prepared] = {}
        self._is_closed = False
        self._prepare_all(progress)

    def reset(self, slot: int) -> None:
        """Empty a slot: no tokens, zero states."""
        self._check_open()
        self._lengths[slot] = 0
        for states in self._all_states():
            states.reset(slot)

    def extend(self, rows: Sequence[ExtendRow]) -> list[npt.NDArray[np.float32] | None]:
        """Append tokens to the context of some slots, in one call of the context engine."""
        self._check_open()
        first, count = self._window(row.slot for row in rows)
        tokens = token_bucket("extend", max(row.ids.size for row in rows), self.limits)
        prepared = self._calls[CallSize("extend", count, tokens)]
        arrays = prepared.inputs.arrays
        prepared.inputs.clear()
        arrays["context_lengths"][:] = self._lengths[first : first + count]
        for row in rows:
            arrays["ids"][row.slot - first, : row.ids.size] = row.ids
            arrays["lengths"][row.slot - first] = row.ids.size
        self._mirror.keep_previous(sorted(row.slot for row in rows if row.keep_previous))
        prepared.call.bind(self._states.addresses(first))
        prepared.inputs.upload()
        if self._denoiser is not None:
            self._context.device.follow(self._denoiser.device)
        prepared.launch()
        self._take(prepared, first, rows)
        if any(row.logits for row in rows):
            prepared.outputs.download()
        else:
            # the next call writes the staging memory, and the denoiser's GPU reads the states
            self._context.device.synchronize()
        logits = prepared.outputs.arrays["logits"]
        return [logits[row.slot - first].copy() if row.logits else None for row in rows]

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Denoised]:
        """Refine one block of each row, in one call of the denoiser engine."""
        self._check_open()
        count = bucket(max(row.slot for row in rows) + 1, self.limits.slots)
        tokens = token_bucket("denoise", max(row.ids.size for row in rows), self.limits)
        prepared = self._calls[CallSize("denoise", count, tokens)]
        arrays = prepared.inputs.arrays
        prepared.inputs.clear()
        arrays["conditioned"][:] = 1
        arrays["context_lengths"][:] = self._lengths[:count]
        for row in rows:
            arrays["ids"][row.slot, : row.ids.size] = row.ids
            arrays["lengths"][row.slot] = row.ids.size
            for name in REFINE_ROWS:
                arrays[name][row.slot] = getattr(row, name)
        self._run(prepared)
        seen = prepared.outputs.arrays
        return [
            Denoised(
                seen["new_ids"][row.slot, : row.ids.size].copy(),
                int(seen["still_masked"][row.slot]),
                seen["confidence"][row.slot, : row.ids.size].copy(),
            )
            for row in rows
        ]

    def predict(self, rows: Sequence[PredictRow]) -> npt.NDArray[np.float32]:
        """Run the denoiser tower on each slot's last token to predict the next."""
        self._check_open()
        count = bucket(max(row.slot for row in rows) + 1, self.limits.slots)
        prepared = self._calls[CallSize("predict", count, 1)]
        arrays = prepared.inputs.arrays
        prepared.inputs.clear()
        arrays["steps_left"][:] = 1
        arrays["context_lengths"][:] = [max(0, length - 1) for length in self._lengths[:count]]
        for row in rows:
            arrays["ids"][row.slot, 0] = row.id
            arrays["lengths"][row.slot] = 1
        self._run(prepared)
        logits = prepared.outputs.arrays["logits"]
        return np.stack([logits[row.slot, 0] for row in rows])

    def state_store(self, size: int, tokens: int) -> KeptStates:
        """Return room for prefixes on the context tower's device.

        Raises:
            RuntimeLoadError: The device has no such room.
        """
        return KeptStates(self._all_states(), self._lengths, size, tokens)

    def close(self) -> None:
        """Free the engines, the weights and the states; a second time does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._calls.clear()
        towers = [self._context, *([self._denoiser] if self._denoiser else [])]
        devices = list({id(tower.device): tower.device for tower in towers}.values())
        for device in devices:
            device.drop_captures()
        for tower in towers:
            tower.engine.close()
        for device in devices:
            device.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(CLOSED)

    def _all_states(self) -> list[SlotStates]:
        return [self._states] if self._mirror is self._states else [self._states, self._mirror]

    def _window(self, slots: Iterable[int]) -> tuple[int, int]:
        """Return the first slot and the number of rows of a call that covers all of `slots`.

        The first slot's states are aligned; for a tiny model that may leave slot 0 alone.
        """
        asked = list(slots)
        low, high = min(asked), max(asked)
        count = bucket(high - low + 1, self.limits.slots)
        first = min(low, self.limits.slots - count) // self._step * self._step
        if first + count <= high:
            return 0, bucket(high + 1, self.limits.slots)
        return first, count

    def _take(self, prepared: _Prepared, first: int, rows: Sequence[ExtendRow]) -> None:
        """Copy a context call's new states to their slots, on each device that has them."""
        taken = [
            Taken(row.slot - first, row.slot, self._lengths[row.slot], row.ids.size)
            for row in sorted(rows, key=lambda row: row.slot)
        ]
        for states in self._all_states():
            states.take(self._context.device, prepared.landed, taken)
        if self._mirror is not self._states:
            self._mirror.take_tokens(self._states, taken)
        for row in rows:
            self._lengths[row.slot] += row.ids.size

    def _run(self, prepared: _Prepared) -> None:
        """Run a denoiser call, and wait for its outputs."""
        prepared.inputs.upload()
        prepared.launch()
        prepared.outputs.download()

    def _prepare_all(self, progress: Progress | None) -> None:
        """Prepare every call that a request can ask for, so that none pays for it."""
        extends = call_sizes("extend", self.limits)
        landings = {size: Landing(self._kinds, size.rows) for size in extends}
        unseen = max(landing.size + self._queries.size(size) for size, landing in landings.items())
        memory = CallMemory(self._context.device, extends, self.vocab_size, unseen)
        refines: list[CallSize] = []
        if self._denoiser is not None:
            refines = call_sizes("denoise", self.limits) + call_sizes("predict", self.limits)
        total = len(extends) + len(refines)
        for size in extends:
            self._calls[size] = self._prepare_extend(size, memory, landings[size])
            _tell(progress, len(self._calls), total)
        if self._denoiser is None:
            return
        stay = {size: packed(unseen_sizes(size, self.vocab_size)) for size in refines}
        unseen = max(end + self._queries.size(size) for size, (_, end) in stay.items())
        memory = CallMemory(self._denoiser.device, refines, self.vocab_size, unseen)
        for size in refines:
            self._calls[size] = self._prepare_refine(self._denoiser, size, memory, *stay[size])
            _tell(progress, len(self._calls), total)
        if not all(self._calls[size].is_captured for size in refines):
            log.warning(
                "%s: TensorRT says that this denoiser cannot be captured as a CUDA graph, so its "
                "kernels are launched one by one: the same answers, slower",
                self._denoiser.device.name,
            )

    def _prepare_extend(self, size: CallSize, memory: CallMemory, landing: Landing) -> _Prepared:
        """Prepare a context call; its states are bound anew each time, so it is not captured."""
        tower = self._context
        inputs, outputs = memory.inputs(size), memory.outputs(size)
        call = tower.engine.prepare(self._shapes(inputs, size.rows))
        landed = landing.addresses(memory.unseen)
        landed |= self._queries.addresses(memory.unseen + landing.size)
        call.bind({**tower.weights, **inputs.addresses, **outputs.addresses, **landed})
        call.bind(self._states.addresses())
        inputs.clear()
        inputs.upload()
        call.enqueue()  # warm up now, so that no request pays for lazy set-up
        tower.device.synchronize()
        return _Prepared(call, inputs, outputs, call.enqueue, landing.boxes(memory.unseen))

    def _prepare_refine(
        self,
        tower: Tower,
        size: CallSize,
        memory: CallMemory,
        unseen: Mapping[str, int],
        unseen_end: int,
    ) -> _Prepared:
        """Prepare a denoiser call and capture it, where the engine lets it be captured."""
        inputs, outputs = memory.inputs(size), memory.outputs(size)
        call = tower.engine.prepare(self._shapes(inputs, size.rows))
        states = self._mirror.addresses(previous=size.verb == "predict")
        stay = {name: memory.unseen + offset for name, offset in unseen.items()}
        stay |= self._queries.addresses(memory.unseen + unseen_end)
        call.bind({**tower.weights, **states, **inputs.addresses, **outputs.addresses, **stay})
        inputs.clear()  # capturing runs the call once, and it must read valid ids
        inputs.upload()
        is_captured = call.can_capture()
        if is_captured:
            launch = tower.device.capture(call.enqueue)
        else:
            launch = call.enqueue
            launch()
        tower.device.synchronize()
        return _Prepared(call, inputs, outputs, launch, is_captured=is_captured)

    def _shapes(self, inputs: Tensors, rows: int) -> dict[str, Shape]:
        """Return the shapes of all inputs that are not weights."""
        small = {name: tuple(array.shape) for name, array in inputs.arrays.items()}
        return small | {name: (rows, *kind.row) for kind in self._kinds for name in kind.names}


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
