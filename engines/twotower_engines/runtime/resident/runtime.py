"""The GPU runtime: fixed slots and row buckets; a denoise step copies only token ids to the host.

A call covers a window of neighbouring slots, so that states are read where they lie; inactive slots
inside the window have length 0. Rows and tokens of calls come in a few sizes, and a window begins
at a multiple of its rows, so that each call can be captured once and replayed later: one launch in
place of some hundreds. Calls of the usual sizes are prepared when the runtime is made, the others
when a request first needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from twotower_contract.engine_set import Limits
from twotower_contract.layout import ROW_LISTS
from twotower_contract.manifest import Manifest
from twotower_contract.policies import POLICIES
from twotower_engines.artifacts.weights import Progress, widen
from twotower_engines.runtime.interface import CLOSED, Denoised, DenoiseRow, ExtendRow, PredictRow
from twotower_engines.runtime.resident.calls import (
    LISTS,
    REFINE_ROWS,
    CallMemory,
    CallSize,
    Logits,
    Queries,
    Tensors,
    Verb,
    bucket,
    call_sizes,
    packed,
    token_bucket,
    unseen_sizes,
    usual_sizes,
)
from twotower_engines.runtime.resident.device import Box, Device
from twotower_engines.runtime.resident.engine import Engine, Shape
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
    """A call's small tensors, how to run it, and where its new states land."""

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
        self._logits = Logits(self.vocab_size, item)
        # what an engine has no list for, it computes for all rows
        given = ROW_LISTS if denoiser is None else denoiser.engine.inputs
        self._always = frozenset(ROW_LISTS.keys() - set(given))
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
        self._calls: dict[tuple[CallSize, int], _Prepared] = {}
        self._is_closed = False
        self._memory = {"extend": self._call_memory(context, ("extend",))}
        if denoiser is not None:
            memory = self._call_memory(denoiser, ("denoise", "predict"))
            self._memory |= {"denoise": memory, "predict": memory}
        self._prepare_usual(progress)

    def reset(self, slot: int) -> None:
        """Empty a slot: no tokens, zero states."""
        self._check_open()
        self._lengths[slot] = 0
        for states in self._all_states():
            states.reset(slot)

    def extend(self, rows: Sequence[ExtendRow]) -> list[npt.NDArray[np.float32] | None]:
        """Append tokens to the context of some slots, in one call of the context engine."""
        prepared, first = self._filled("extend", rows)
        self._mirror.keep_previous(sorted(row.slot for row in rows if row.keep_previous))
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
        lists = set()
        if any(row.temperature > 0 for row in rows):
            lists.add("sampled_rows")
        if any(row.policy == POLICIES["entropy"] for row in rows):
            lists.add("entropy_rows")
        prepared, first = self._filled("denoise", rows, lists)
        arrays = prepared.inputs.arrays
        arrays["conditioned"][:] = 1
        for row in rows:
            for name in REFINE_ROWS:
                arrays[name][row.slot - first] = getattr(row, name)
        self._run(prepared)
        seen = prepared.outputs.arrays
        return [
            Denoised(
                seen["new_ids"][row.slot - first, : row.ids.size].copy(),
                int(seen["still_masked"][row.slot - first]),
                seen["confidence"][row.slot - first, : row.ids.size].copy(),
            )
            for row in rows
        ]

    def predict(self, rows: Sequence[PredictRow]) -> npt.NDArray[np.float32]:
        """Run the denoiser tower on each slot's last token to predict the next."""
        self._check_open()
        slots = [row.slot for row in rows]
        prepared, first = self._call("predict", slots, 1, LISTS["predict"])
        arrays = prepared.inputs.arrays
        prepared.inputs.clear()
        arrays["steps_left"][:] = 1
        lengths = self._lengths[first : first + arrays["lengths"].size]
        arrays["context_lengths"][:] = [max(0, length - 1) for length in lengths]
        for row in rows:
            arrays["ids"][row.slot - first, 0] = row.id
            arrays["lengths"][row.slot - first] = 1
        self._run(prepared)
        logits = prepared.outputs.arrays["logits"]
        found = np.empty((len(rows), self.vocab_size), np.float32)
        for target, row in zip(found, rows, strict=True):
            widen(logits[row.slot - first, 0], target)
        return found

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

    def _call(
        self, verb: Verb, slots: Sequence[int], tokens: int, lists: Collection[str]
    ) -> tuple[_Prepared, int]:
        """Return the call that covers some slots, prepared now if it is the first of its kind.

        Args:
            lists: The lists of rows that it needs; they name all that it covers.

        Returns:
            The call, and the first slot that it covers.
        """
        first, rows = self._window(slots)
        named = self._named(verb, lists)
        size = CallSize(verb, rows, token_bucket(verb, tokens, self.limits), named)
        if (size, first) not in self._calls:
            self._prepare(size, first)
        return self._calls[size, first], first

    def _named(self, verb: Verb, lists: Collection[str]) -> frozenset[str]:
        """Return the lists that name all rows of a call, given those that it needs."""
        return frozenset() if verb == "extend" else self._always.union(lists)

    def _filled(
        self,
        verb: Verb,
        rows: Sequence[ExtendRow] | Sequence[DenoiseRow],
        lists: Collection[str] = (),
    ) -> tuple[_Prepared, int]:
        """Return the call that covers some rows, their tokens filled in, and its first slot."""
        self._check_open()
        most = max(row.ids.size for row in rows)
        prepared, first = self._call(verb, [row.slot for row in rows], most, lists)
        arrays = prepared.inputs.arrays
        prepared.inputs.clear()
        count = arrays["lengths"].size
        arrays["context_lengths"][:] = self._lengths[first : first + count]
        for row in rows:
            arrays["ids"][row.slot - first, : row.ids.size] = row.ids
            arrays["lengths"][row.slot - first] = row.ids.size
        return prepared, first

    def _window(self, slots: Sequence[int]) -> tuple[int, int]:
        """Return the first slot and the number of rows of the smallest window with all of `slots`.

        The first slot's states are aligned; for a tiny model that may leave slot 0 alone.
        """
        low, high = min(slots), max(slots)
        rows = bucket(high - low + 1, self.limits.slots)
        while True:
            first = min(low // rows * rows, self.limits.slots - rows) // self._step * self._step
            if high < first + rows:
                return first, rows
            rows = min(2 * rows, self.limits.slots)

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

    def _call_memory(self, tower: Tower, verbs: Sequence[Verb]) -> CallMemory:
        """Return the memory in which all calls of a tower take turns."""
        sizes = [
            size
            for verb in verbs
            for size in call_sizes(verb, self.limits, self._named(verb, LISTS[verb]))
        ]
        unseen = max(self._unseen_bytes(size) + self._queries.size(size) for size in sizes)
        return CallMemory(tower.device, sizes, self._logits, unseen)

    def _unseen_bytes(self, size: CallSize) -> int:
        """Return the bytes of what a call leaves on the device, its queries left out."""
        if size.verb == "extend":
            return Landing(self._kinds, size.rows).size
        return packed(unseen_sizes(size, self._logits))[1]

    def _prepare_usual(self, progress: Progress | None) -> None:
        """Prepare the calls that most requests ask for, so that none of these pays for it."""
        verbs: list[Verb] = ["extend", "denoise"] if self.has_denoiser else ["extend"]
        usual = [
            size for verb in verbs for size in usual_sizes(verb, self.limits, self._named(verb, ()))
        ]
        for done, size in enumerate(usual, start=1):
            self._prepare(size, 0)
            if progress is not None:
                progress(done, len(usual))
        if not all(call.is_captured for call in self._calls.values()):
            names = {tower.device.name: None for tower in (self._context, self._denoiser) if tower}
            log.warning(
                "%s: TensorRT says that these engines cannot be captured as CUDA graphs, so their "
                "kernels are launched one by one: the same answers, slower",
                ", ".join(names),
            )

    def _prepare(self, size: CallSize, first: int) -> None:
        """Prepare a call for a window of slots, and capture it where the engine allows that.

        Preparing runs the call, on rows without tokens: it writes into the room past each slot's
        context, and where every call writes.
        """
        is_extend = size.verb == "extend"
        tower = self._context if is_extend else self._denoiser
        assert tower is not None, "only a denoiser refines"
        memory = self._memory[size.verb]
        inputs, outputs = memory.inputs(size), memory.outputs(size)
        call = tower.engine.prepare(self._shapes(inputs, size.rows))
        landed: dict[StateKind, Box] = {}
        if is_extend:
            landing = Landing(self._kinds, size.rows)
            landed = landing.boxes(memory.unseen)
            unseen = landing.addresses(memory.unseen)
            states = self._states.addresses(first)
        else:
            offsets, _ = packed(unseen_sizes(size, self._logits))
            unseen = {name: memory.unseen + offset for name, offset in offsets.items()}
            states = self._mirror.addresses(first, previous=size.verb == "predict")
        unseen |= self._queries.addresses(memory.unseen + self._unseen_bytes(size))
        call.bind({**tower.weights, **states, **inputs.addresses, **outputs.addresses, **unseen})
        inputs.clear()  # the ids that it reads now must be valid
        inputs.arrays["context_lengths"][:] = self._lengths[first : first + size.rows]
        inputs.upload()
        is_captured = call.can_capture()
        if is_captured:
            launch = tower.device.capture(call.enqueue)
        else:
            launch = call.enqueue
            launch()
        tower.device.synchronize()
        self._calls[size, first] = _Prepared(inputs, outputs, launch, landed, is_captured)

    def _shapes(self, inputs: Tensors, rows: int) -> dict[str, Shape]:
        """Return the shapes of all inputs that are not weights."""
        small = {name: tuple(array.shape) for name, array in inputs.arrays.items()}
        return small | {name: (rows, *kind.row) for kind in self._kinds for name in kind.names}
