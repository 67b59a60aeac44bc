"""The calls that a resident runtime makes: their sizes, their tensors, and the memory of these.

Rows and tokens of a call are padded to a few sizes, so that there are few calls: the usual ones are
prepared when the engines are loaded, others on first need. Calls of one tower never overlap, and
the host waits for each, so they take turns in the same memory, which is allocated once, for the
largest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from twotower_contract.config import ModelConfig
from twotower_contract.engine_set import Limits
from twotower_contract.layout import ROW_LISTS
from twotower_engines.runtime.resident.device import Device, aligned
from twotower_engines.runtime.resident.engine import Shape

Array = npt.NDArray[Any]
Layout = Mapping[str, tuple[Shape, type]]
Verb = Literal["extend", "denoise", "predict"]

SMALLEST_BLOCK = 16
"""Tokens of the block that the released model was trained for, and that profiles are tuned for."""

REFINE_ROWS = ("steps_left", "policy", "seed", "threshold", "temperature")
FLOATS = ("threshold", "temperature")

LISTS: Mapping[Verb, frozenset[str]] = {
    "extend": frozenset(),
    "denoise": frozenset({"sampled_rows", "entropy_rows"}),
    "predict": frozenset({"logits_rows"}),
}
"""The lists of rows that a method may need."""


@dataclass(frozen=True, slots=True)
class CallSize:
    """The size that a call is prepared for.

    Attributes:
        verb: The runtime's method.
        rows: Neighbouring slots that it covers.
        tokens: Tokens of each row, padding included.
        lists: The lists of rows that name all of them; the others are empty.
    """

    verb: Verb
    rows: int
    tokens: int
    lists: frozenset[str] = frozenset()


def bucket(count: int, most: int, least: int = 1) -> int:
    """Return the smallest power of two that is neither below `count` nor `least`, or `most`."""
    return min(most, max(least, 1 << (count - 1).bit_length()))


def token_bucket(verb: Verb, tokens: int, limits: Limits) -> int:
    """Return how many tokens a row of a call is padded to.

    Blocks come in powers of two from 16 to the largest; context calls also in a single token and in
    a chunk of a prompt. Each context call is then of a size that a profile is tuned for.
    """
    if tokens == 1 and verb != "denoise":
        return 1
    most = limits.block_size_max
    if verb == "extend":
        most = min(most, limits.max_tokens_per_call)
        if tokens > most:
            return limits.max_tokens_per_call
    return bucket(tokens, most, SMALLEST_BLOCK)


def call_sizes(verb: Verb, limits: Limits, lists: Collection[str] = ()) -> list[CallSize]:
    """Return all sizes in which a method calls its engine with some lists, the largest first."""
    most = {
        "extend": limits.max_tokens_per_call,
        "denoise": limits.block_size_max,
        "predict": 1,
    }[verb]
    tokens = {token_bucket(verb, count, limits) for count in range(1, most + 1)}
    rows = {bucket(count, limits.slots) for count in range(1, limits.slots + 1)}
    named = frozenset(lists)
    sizes = [CallSize(verb, one, length, named) for one in rows for length in tokens]
    return sorted(sizes, key=lambda size: (size.rows * size.tokens, size.rows), reverse=True)


def usual_sizes(verb: Verb, limits: Limits, lists: Collection[str] = ()) -> list[CallSize]:
    """Return the sizes that most requests need: blocks of the usual size, and a prompt's chunk."""
    block = token_bucket(verb, min(SMALLEST_BLOCK, limits.block_size_max), limits)
    chunk = limits.max_tokens_per_call
    return [
        size
        for size in call_sizes(verb, limits, lists)
        if size.tokens == block or (verb == "extend" and (size.rows, size.tokens) == (1, chunk))
    ]


def input_layout(size: CallSize) -> Layout:
    """Return shape and dtype of the host's inputs: ids, a value per row, and lists of rows."""
    names = ["lengths", "context_lengths"]
    if size.verb != "extend":
        names += ["conditioned", *REFINE_ROWS]
    layout: dict[str, tuple[Shape, type]] = {"ids": ((size.rows, size.tokens), np.int32)}
    for name in names:
        layout[name] = ((size.rows,), np.float32 if name in FLOATS else np.int32)
    if size.verb != "extend":
        for name in ROW_LISTS:
            layout[name] = ((size.rows if name in size.lists else 0,), np.int32)
    return layout


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits of a tower.

    Attributes:
        count: Tokens of the vocabulary.
        item: Bytes of one of the denoiser's, which come as they were computed: 2 are bf16 bits.
    """

    count: int
    item: int


def output_layout(size: CallSize, logits: Logits) -> Layout:
    """Return shape and dtype of what the host reads."""
    if size.verb == "extend":
        return {"logits": ((size.rows, logits.count), np.float32)}
    all_outputs = _denoiser_outputs(size, logits)
    refined = ("new_ids", "still_masked", "confidence")
    seen = ("logits",) if size.verb == "predict" else refined
    return {name: all_outputs[name] for name in seen}


def unseen_sizes(size: CallSize, logits: Logits) -> dict[str, int]:
    """Return bytes of each of the denoiser's outputs that stay on the device."""
    seen = output_layout(size, logits)
    layout = _denoiser_outputs(size, logits)
    return {name: _bytes(*one) for name, one in layout.items() if name not in seen}


class Queries:
    """The attention layers' queries: outputs that nobody reads, all in the same place.

    TensorRT lays out what is an output as it was told, and then its attention reads the caches
    where they lie. Otherwise it would choose another order, and copy both caches into it.
    """

    def __init__(self, model: ModelConfig, item: int) -> None:
        self._names = [f"context.layers.{layer}.queries" for layer in model.layers_of_kind["*"]]
        self._token = model.num_attention_heads * model.head_dim * item

    def size(self, size: CallSize) -> int:
        """Return the bytes of their place in a call."""
        return size.rows * size.tokens * self._token if self._names else 0

    def addresses(self, start: int) -> dict[str, int]:
        """Return where each of them is written, by its name."""
        return dict.fromkeys(self._names, start)


def _denoiser_outputs(size: CallSize, logits: Logits) -> Layout:
    block = (size.rows, size.tokens)
    shown = size.rows if "logits_rows" in size.lists else 0
    return {
        "new_ids": (block, np.int32),
        "still_masked": ((size.rows,), np.int32),
        "confidence": (block, np.float32),
        "committed": (block, np.int32),
        "logits": (
            (shown, size.tokens, logits.count),
            np.float32 if logits.item == 4 else np.uint16,
        ),
    }


class Tensors:
    """The small inputs or outputs of one call, in one piece on host and device.

    There is one upload and one download per call, whatever the number of tensors. Other calls use
    the same piece, so nothing in it outlives a call.
    """

    def __init__(self, device: Device, host: Array, start: int, layout: Layout) -> None:
        self._device, self._start = device, start
        offsets, total = packed({name: _bytes(*one) for name, one in layout.items()})
        self._host = host[:total]
        self.addresses = {name: start + offset for name, offset in offsets.items()}
        self.arrays: dict[str, Array] = {
            name: host[offsets[name] :][: _bytes(shape, kind)].view(kind).reshape(shape)
            for name, (shape, kind) in layout.items()
        }

    def clear(self) -> None:
        """Fill with 0, for inactive rows must hold valid token ids, and lists with all rows."""
        self._host[:] = 0
        for name in self.arrays.keys() & ROW_LISTS.keys():
            self.arrays[name][:] = np.arange(self.arrays[name].size)

    def upload(self) -> None:
        """Copy all to the device."""
        self._device.upload(self._start, self._host)

    def download(self) -> None:
        """Copy all to the host, and wait for it."""
        self._device.download(self._host, self._start)


class CallMemory:
    """The memory in which all calls of one tower take turns.

    Args:
        device: Device of the tower.
        sizes: Sizes of all calls.
        logits: The tower's logits.
        unseen: Bytes that the largest call leaves on the device: new states, and logits that nobody
            reads.
    """

    def __init__(
        self, device: Device, sizes: Iterable[CallSize], logits: Logits, unseen: int
    ) -> None:
        self._device, self._logits = device, logits
        every = list(sizes)
        self._inputs = self._pair([input_layout(size) for size in every])
        self._outputs = self._pair([output_layout(size, logits) for size in every])
        self.unseen = device.allocate(unseen)

    def inputs(self, size: CallSize) -> Tensors:
        """Return the inputs of a call."""
        return Tensors(self._device, *self._inputs, input_layout(size))

    def outputs(self, size: CallSize) -> Tensors:
        """Return the outputs of a call that the host reads."""
        return Tensors(self._device, *self._outputs, output_layout(size, self._logits))

    def _pair(self, layouts: Iterable[Layout]) -> tuple[Array, int]:
        """Return host and device memory for any of some layouts."""
        total = max(
            packed({name: _bytes(*one) for name, one in layout.items()})[1] for layout in layouts
        )
        return self._device.staging(total), self._device.allocate(total)


def packed(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return an aligned offset for each size, one after the other, and the sum."""
    offsets, total = {}, 0
    for name, size in sizes.items():
        offsets[name] = total
        total += aligned(size)
    return offsets, total


def _bytes(shape: Shape, kind: type) -> int:
    return int(np.prod(shape)) * np.dtype(kind).itemsize
