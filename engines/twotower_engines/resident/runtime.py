"""The runtime of a device: fixed slots, row buckets, and nothing but ids crossing to the host.

A call covers a window of neighbouring slots, so that states are read where they lie; slots inside
the window that take no part have length 0. Denoise calls always begin at slot 0 and come in a few
sizes (row buckets), so that each is captured once and replayed: one launch per step instead of some
thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_engines.engine_set import Limits
from twotower_engines.manifest import ITEM_SIZES, Manifest
from twotower_engines.resident.device import Device
from twotower_engines.resident.engine import Call, Engine, Shape
from twotower_engines.resident.states import SlotStates, state_buffers
from twotower_engines.runtime import Denoised, DenoiseRow, ExtendRow, PredictRow

__all__ = ["ResidentRuntime", "Tower", "bucket"]

FLOATS = ("threshold", "temperature")
REFINE_ROWS = ("steps_left", "policy", "seed", "threshold", "temperature")
Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tower:
    """A loaded tower: its engine, where it runs, and where its weights lie."""

    engine: Engine
    device: Device
    weights: Mapping[str, int]


def bucket(count: int, most: int) -> int:
    """Return the smallest power of two that holds `count` rows, at most `most`."""
    return min(most, 1 << (count - 1).bit_length())


class _Rows:
    """The small inputs and outputs of one kind of call, in one piece on host and device.

    One upload and one download per call, whatever the number of tensors.
    """

    def __init__(self, device: Device, layout: Mapping[str, tuple[Shape, type]]) -> None:
        self._device = device
        sizes = {name: _bytes(shape, kind) for name, (shape, kind) in layout.items()}
        offsets, total = _packed(sizes)
        self._host = device.staging(total)
        self._start = device.allocate(total)
        self.addresses = {name: self._start + offset for name, offset in offsets.items()}
        self.arrays: dict[str, Array] = {
            name: self._host[offsets[name] : offsets[name] + sizes[name]].view(kind).reshape(shape)
            for name, (shape, kind) in layout.items()
        }

    def upload(self) -> None:
        self._device.upload(self._start, self._host)

    def download(self) -> None:
        self._device.download(self._host, self._start)


class _Scratch:
    """Memory for outputs that are read, if at all, before the next call of the same device.

    All calls share it, since calls of one stream never overlap. A call that needs more than any
    before makes a new piece; earlier calls keep the old one, whose address they were captured with,
    and as calls come in powers of two, all pieces together are at most twice the largest.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._start = self._size = 0

    def place(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return an address for each output, by its size in bytes."""
        offsets, total = _packed(sizes)
        if total > self._size:
            self._start, self._size = self._device.allocate(total), total
        return {name: self._start + offset for name, offset in offsets.items()}


def _packed(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return an offset for each size, one after the other, and the sum.

    Aligned to 256 bytes, as engines ask of every tensor.
    """
    ends = np.cumsum([0, *(-(-size // 256) * 256 for size in sizes.values())]).tolist()
    return dict(zip(sizes, ends[:-1], strict=True)), ends[-1]


@dataclass(frozen=True)
class _Prepared:
    """A call, its small tensors, and where its states land."""

    call: Call
    inputs: _Rows
    outputs: _Rows
    landed: Mapping[str, int]
    launch: Callable[[], None]


class ResidentRuntime:
    """A runtime on one or two devices; see `twotower_engines.runtime.Runtime` for its methods.

    Args:
        manifest: Of the engine set.
        limits: Of the engine set.
        context: The context tower; the states of its slots live on its device.
        denoiser: The denoiser tower, or None. On another device it gets a copy of the states.
    """

    def __init__(
        self, manifest: Manifest, limits: Limits, context: Tower, denoiser: Tower | None
    ) -> None:
        self.limits = limits
        self.vocab_size = manifest.model.vocab_size
        self.mask_token_id = manifest.mask_token_id
        self.has_denoiser = denoiser is not None
        self._context, self._denoiser = context, denoiser
        item = ITEM_SIZES["BF16" if manifest.dtype == "bfloat16" else "F32"]
        buffers = state_buffers(manifest.model, limits, item)
        self._states = SlotStates(context.device, buffers, limits.slots)
        self._mirror = self._states
        if denoiser is not None and denoiser.device is not context.device:
            self._mirror = SlotStates(denoiser.device, buffers, limits.slots)
        self._landing = _Scratch(context.device)
        self._unseen = _Scratch(self._mirror.device)
        self._lengths = [0] * limits.slots
        self._extends: dict[tuple[int, int], _Prepared] = {}
        self._denoises: dict[tuple[int, int], _Prepared] = {}
        self._predicts: dict[int, _Prepared] = {}

    def reset(self, slot: int) -> None:
        """Empty a slot: no tokens, zero states."""
        self._lengths[slot] = 0
        for states in self._all_states():
            states.reset(slot)

    def context_length(self, slot: int) -> int:
        """Return how many tokens a slot's context holds."""
        return self._lengths[slot]

    def extend(self, rows: Sequence[ExtendRow]) -> list[npt.NDArray[np.float32] | None]:
        """Append tokens to the context of some slots, in one call of the context engine."""
        first, count = self._window(row.slot for row in rows)
        tokens = self._token_bucket(max(row.ids.size for row in rows))
        prepared = self._extends.get((count, tokens)) or self._prepare_extend(count, tokens)
        arrays = prepared.inputs.arrays
        arrays["lengths"][:] = 0
        arrays["context_lengths"][:] = self._lengths[first : first + count]
        for row in rows:
            arrays["ids"][row.slot - first, : row.ids.size] = row.ids
            arrays["lengths"][row.slot - first] = row.ids.size
            if row.keep_previous:
                for states in self._all_states():
                    states.keep_previous(row.slot)
        prepared.call.bind(self._states.addresses(first))
        prepared.inputs.upload()
        if self._denoiser is not None:
            self._context.device.follow(self._denoiser.device)
        prepared.launch()
        for row in rows:
            for states in self._all_states():
                states.take(
                    self._context.device,
                    prepared.landed,
                    row=row.slot - first,
                    slot=row.slot,
                    tokens=tokens,
                    length=self._lengths[row.slot],
                    valid=row.ids.size,
                )
            self._lengths[row.slot] += row.ids.size
        if self._denoiser is not None:
            self._denoiser.device.follow(self._context.device)
        if any(row.logits for row in rows):
            prepared.outputs.download()
        else:
            self._context.device.synchronize()  # the staging memory is written again next time
        logits = prepared.outputs.arrays["logits"]
        return [logits[row.slot - first].copy() if row.logits else None for row in rows]

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Denoised]:
        """Refine one block of each row, in one call of the denoiser engine."""
        count = bucket(max(row.slot for row in rows) + 1, self.limits.slots)
        block = max(row.ids.size for row in rows)
        prepared = self._denoises.get((count, block)) or self._prepare_denoise(count, block)
        arrays = prepared.inputs.arrays
        arrays["lengths"][:] = 0
        arrays["context_lengths"][:] = self._lengths[:count]
        for row in rows:
            arrays["ids"][row.slot, : row.ids.size] = row.ids
            arrays["lengths"][row.slot] = row.ids.size
            for name in REFINE_ROWS:
                arrays[name][row.slot] = getattr(row, name)
        prepared.inputs.upload()
        prepared.launch()
        prepared.outputs.download()
        ids, still = (prepared.outputs.arrays[name] for name in ("new_ids", "still_masked"))
        return [
            Denoised(ids[row.slot, : row.ids.size].copy(), int(still[row.slot])) for row in rows
        ]

    def predict(self, rows: Sequence[PredictRow]) -> npt.NDArray[np.float32]:
        """Run the denoiser tower on each slot's last token to predict the next."""
        count = bucket(max(row.slot for row in rows) + 1, self.limits.slots)
        prepared = self._predicts.get(count) or self._prepare_predict(count)
        arrays = prepared.inputs.arrays
        arrays["lengths"][:] = 0
        arrays["context_lengths"][:] = [max(0, length - 1) for length in self._lengths[:count]]
        for row in rows:
            arrays["ids"][row.slot, 0] = row.id
            arrays["lengths"][row.slot] = 1
        prepared.inputs.upload()
        prepared.launch()
        prepared.outputs.download()
        logits = prepared.outputs.arrays["logits"]
        return np.stack([logits[row.slot, 0] for row in rows])

    def close(self) -> None:
        """Free the engines, the weights and the states."""
        towers = [self._context, *([self._denoiser] if self._denoiser else [])]
        for prepared in (self._extends, self._denoises, self._predicts):
            prepared.clear()
        for tower in towers:
            tower.engine.close()
        for tower in towers:
            tower.device.close()

    def _all_states(self) -> list[SlotStates]:
        return [self._states] if self._mirror is self._states else [self._states, self._mirror]

    def _window(self, slots: Iterable[int]) -> tuple[int, int]:
        """Return the first slot and the number of rows of a call that covers all of `slots`."""
        asked = list(slots)
        low, high = min(asked), max(asked)
        count = bucket(high - low + 1, self.limits.slots)
        return min(low, self.limits.slots - count), count

    def _token_bucket(self, tokens: int) -> int:
        """Return the number of tokens that a context call is padded to."""
        sizes = (1, self.limits.block_size_max, self.limits.max_tokens_per_call)
        return next(size for size in sorted(sizes) if size >= tokens)

    def _prepare_extend(self, count: int, tokens: int) -> _Prepared:
        tower = self._context
        inputs = _Rows(tower.device, _row_layout(count, tokens, ("lengths", "context_lengths")))
        layout: dict[str, tuple[Shape, type]] = {"logits": ((count, self.vocab_size), np.float32)}
        outputs = _Rows(tower.device, layout)
        landed = self._landing.place(
            {one.new_name: count * one.new_row_bytes(tokens) for one in self._states.buffers}
        )
        call = tower.engine.prepare(self._shapes(inputs, count, self._states))
        call.bind({**tower.weights, **inputs.addresses, **outputs.addresses, **landed})
        made = _Prepared(call, inputs, outputs, landed, call.enqueue)
        self._extends[count, tokens] = made
        return made

    def _prepare_denoise(self, count: int, block: int) -> _Prepared:
        layout: dict[str, tuple[Shape, type]] = {
            "new_ids": ((count, block), np.int32),
            "still_masked": ((count,), np.int32),
        }
        extra: dict[str, tuple[Shape, type]] = {
            "confidence": ((count, block), np.float32),
            "committed": ((count, block), np.int32),
            "logits": ((count, block, self.vocab_size), np.float32),
        }
        made = self._prepare_denoiser(count, block, layout, extra, previous=False)
        made.inputs.arrays["conditioned"][:] = 1
        self._denoises[count, block] = made
        return made

    def _prepare_predict(self, count: int) -> _Prepared:
        extra: dict[str, tuple[Shape, type]] = {
            "new_ids": ((count, 1), np.int32),
            "still_masked": ((count,), np.int32),
            "confidence": ((count, 1), np.float32),
            "committed": ((count, 1), np.int32),
        }
        layout: dict[str, tuple[Shape, type]] = {
            "logits": ((count, 1, self.vocab_size), np.float32)
        }
        made = self._prepare_denoiser(count, 1, layout, extra, previous=True)
        made.inputs.arrays["conditioned"][:] = 0
        made.inputs.arrays["steps_left"][:] = 1
        self._predicts[count] = made
        return made

    def _prepare_denoiser(
        self,
        count: int,
        block: int,
        wanted: Mapping[str, tuple[Shape, type]],
        extra: Mapping[str, tuple[Shape, type]],
        *,
        previous: bool,
    ) -> _Prepared:
        """Prepare and capture a denoiser call; outputs in `extra` stay on the device."""
        tower = self._denoiser
        assert tower is not None, "an engine set of the context tower alone cannot denoise"
        names = ("lengths", "context_lengths", "conditioned", *REFINE_ROWS)
        inputs = _Rows(tower.device, _row_layout(count, block, names))
        outputs = _Rows(tower.device, wanted)
        unseen = self._unseen.place(
            {name: _bytes(shape, kind) for name, (shape, kind) in extra.items()}
        )
        call = tower.engine.prepare(self._shapes(inputs, count, self._mirror))
        states = self._mirror.addresses(previous=previous)
        call.bind({**tower.weights, **states, **inputs.addresses, **outputs.addresses, **unseen})
        inputs.upload()  # zeros: capturing runs the call once, and it must not read just anything
        launch = tower.device.capture(call.enqueue)
        return _Prepared(call, inputs, outputs, {}, launch)

    def _shapes(self, inputs: _Rows, count: int, states: SlotStates) -> dict[str, Shape]:
        """Return the shapes of all inputs that are not weights."""
        small = {name: tuple(array.shape) for name, array in inputs.arrays.items()}
        return small | {one.name: (count, *one.row) for one in states.buffers}


def _bytes(shape: Shape, kind: type) -> int:
    return int(np.prod(shape)) * np.dtype(kind).itemsize


def _row_layout(count: int, tokens: int, names: Iterable[str]) -> dict[str, tuple[Shape, type]]:
    """Return shape and dtype of the ids and of the inputs with one value per row."""
    layout: dict[str, tuple[Shape, type]] = {"ids": ((count, tokens), np.int32)}
    for name in names:
        layout[name] = ((count,), np.float32 if name in FLOATS else np.int32)
    return layout
