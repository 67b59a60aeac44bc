"""Weights from the checkpoint's shards to a device, once, through pinned windows.

A weight input of a native graph holds the bytes of its tensors one after the other: as they are
stored, or expert after expert. An engine may take a bank of experts row after row instead, see
`FLAT`. Little is converted: a router's matrix is widened to float32, FP8 codes are transposed, and
scales are brought to the model's dtype, see `input_forms`. A tower's weights are one allocation,
which is filled window by window: two threads read the windows' bytes from the shards, which may be
those of many small tensors, while windows that were read travel.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_contract.bfloat16 import to_bfloat16
from twotower_contract.errors import CheckpointError
from twotower_contract.layout import FLAT
from twotower_contract.manifest import Manifest, WeightInput
from twotower_contract.quantized import scale_names
from twotower_contract.shards import ITEM_SIZES, TensorEntry
from twotower_engines.artifacts.engine_interface import is_flat
from twotower_engines.artifacts.weights import Progress, WeightStore, widen
from twotower_engines.runtime.resident.device import Device, Fence, aligned

WINDOW = 64 << 20
"""Bytes of one staging buffer: large enough that the start-up of a copy costs nothing."""

READERS = 2
"""Threads that read: a single one does not fill a PCIe 5 link from the page cache."""

BUFFERS = READERS + 2
"""Windows that are being read, wait for upload, or are being uploaded."""


def input_sizes(manifest: Manifest, weight: WeightInput) -> dict[str, int]:
    """Return the bytes on the device of each input that a weight has, by name."""
    forms = weight.forms(manifest.model.tensor_dtype)
    return {name: math.prod(shape) * ITEM_SIZES[dtype] for name, (dtype, shape) in forms.items()}


def weight_sizes(manifest: Manifest, tower: str) -> list[int]:
    """Return the bytes on the device of each weight input of a tower."""
    weights = manifest.weights[tower].values()
    return [size for weight in weights for size in input_sizes(manifest, weight).values()]


def tower_bytes(manifest: Manifest, tower: str) -> int:
    """Return the size of all weights of a tower on the device, aligned."""
    return sum(map(aligned, weight_sizes(manifest, tower)))


def upload_weights(
    store: WeightStore,
    tower: str,
    device: Device,
    progress: Progress | None = None,
    window: int = WINDOW,
    inputs: Collection[str] = (),
) -> dict[str, int]:
    """Copy all weights of a tower to a device.

    Args:
        progress: Called with the bytes that are on their way, and their sum.
        window: Bytes of each staging buffer.
        inputs: Names of the engine's inputs, which say how it takes banks of experts; as a graph
            takes them where not given.

    Returns:
        Address of each weight input.

    Raises:
        RuntimeLoadError: The device has no room.
        CheckpointError: A shard cannot be read to its end.
    """
    weights = store.manifest.weights[tower]
    size = tower_bytes(store.manifest, tower)
    start = end = device.allocate(size)
    addresses = {}
    for weight in weights.values():
        for name, count in input_sizes(store.manifest, weight).items():
            addresses[name + FLAT if is_flat(weight, inputs) else name] = end
            end += aligned(count)
    windows = _windows(_pieces(store, weights.values(), inputs), window)
    with ExitStack() as stack:
        buffers = [device.staging(min(window, size)) for _ in range(BUFFERS)]
        for buffer in buffers:
            stack.callback(device.free_staging, buffer)
        stack.callback(device.synchronize)
        total = sum(weight_sizes(store.manifest, tower))
        _Journey(device, start, total, buffers, progress).run(windows, _Files(stack))
    return addresses


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a shard, and how many bytes after the tower's first they belong.

    Attributes:
        place, size: Place and number of bytes on the device.
        sources: Shard, and place of the first byte in it, of each tensor that takes part.
        tensor: The tensor where it is converted: the piece is a part of what becomes of it.
        row: Bytes of a row, where rows of the sources lie in turn on the device.
        begin: First byte of the piece: of a tensor as it is stored, of what becomes of it, or of
            all rows.
    """

    place: int
    size: int
    sources: tuple[tuple[Path, int], ...]
    tensor: TensorEntry | None = None
    row: int = 0
    begin: int = 0


@dataclass(frozen=True, slots=True)
class _Window:
    """Neighbouring bytes of the device, and the pieces that they are made of."""

    place: int
    size: int
    pieces: tuple[_Piece, ...]


def _pieces(
    store: WeightStore, weights: Iterable[WeightInput], inputs: Collection[str]
) -> Iterator[_Piece]:
    """Yield the tensors of a tower in the order of their places."""
    manifest, start = store.manifest, 0

    def source(tensor: TensorEntry) -> tuple[Path, int]:
        shard = manifest.shards[tensor.shard]
        return store.folder / shard.file, shard.data_start + tensor.begin

    for weight in weights:
        if is_flat(weight, inputs):
            (size,) = input_sizes(manifest, weight).values()
            tensors = [manifest.tensors[name] for name in weight.sources]
            row = size // math.prod(weight.shape[:2])
            yield _Piece(start, size, tuple(map(source, tensors)), row=row)
            start += aligned(size)
            continue
        parts = [(one, *scale_names(one, weight.dtype)) for one in weight.sources]
        sizes = input_sizes(manifest, weight).values()
        for size, names in zip(sizes, zip(*parts, strict=True), strict=True):
            for number, name in enumerate(names):
                tensor = manifest.tensors[name]
                each = size // len(names)
                is_turned = weight.format == "fp8" and name in weight.sources
                is_as_stored = not is_turned and each == tensor.end - tensor.begin
                yield _Piece(
                    start + number * each,
                    each,
                    (source(tensor),),
                    None if is_as_stored else tensor,
                )
            start += aligned(size)


def _windows(pieces: Iterable[_Piece], window: int) -> Iterator[_Window]:
    """Cut pieces at multiples of `window`, and put together what lies between two of them."""

    def cut() -> Iterator[_Piece]:
        for piece in pieces:
            done = 0
            while done < piece.size:
                place = piece.place + done
                size = min(piece.size - done, window - place % window)
                yield replace(piece, place=place, size=size, begin=done)
                done += size

    for _, group in groupby(cut(), key=lambda piece: piece.place // window):
        held = tuple(group)
        begin, last = held[0].place, held[-1]
        yield _Window(begin, last.place + last.size - begin, held)


class _Files:
    """Shards, opened once each."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._descriptors: dict[Path, int] = {}

    def open(self, path: Path) -> int:
        """Return a shard's descriptor."""
        if path not in self._descriptors:
            descriptor = os.open(path, os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._descriptors[path] = descriptor
        return self._descriptors[path]


class _Journey:
    """Uploads windows: threads read them, and they are sent in order."""

    def __init__(
        self,
        device: Device,
        start: int,
        total: int,
        buffers: Sequence[npt.NDArray[Any]],
        progress: Progress | None,
    ) -> None:
        self._device, self._start = device, start
        self._done, self._total = 0, total
        self._buffers, self._progress = buffers, progress
        self._fences: list[Fence | None] = [None] * len(buffers)
        self._reading: deque[tuple[Future[None], _Window, int]] = deque()

    def run(self, windows: Iterable[_Window], files: _Files) -> None:
        """Bring all windows to the device."""
        with ThreadPoolExecutor(READERS, "twotower-read") as readers:
            for number, window in enumerate(windows):
                if len(self._reading) == READERS:
                    self._send_next()
                turn = number % len(self._buffers)
                fence = self._fences[turn]
                if fence is not None:
                    fence.wait()  # the buffer's last upload is done
                parts = [
                    ([files.open(path) for path, _ in piece.sources], piece)
                    for piece in window.pieces
                ]
                read = readers.submit(_read, self._buffers[turn], window.place, parts)
                self._reading.append((read, window, turn))
            while self._reading:
                self._send_next()

    def _send_next(self) -> None:
        read, window, turn = self._reading.popleft()
        read.result()
        self._device.upload(self._start + window.place, self._buffers[turn][: window.size])
        self._fences[turn] = self._device.fence()
        self._done += sum(piece.size for piece in window.pieces)
        if self._progress is not None:
            self._progress(self._done, self._total)


def _read(
    buffer: npt.NDArray[Any], begin: int, parts: Sequence[tuple[Sequence[int], _Piece]]
) -> None:
    """Read pieces to their places in a window. Runs in a thread; reading lets others run."""
    for descriptors, piece in parts:
        target = buffer[piece.place - begin :][: piece.size]
        if piece.row:
            _fill_in_turn(target, descriptors, piece)
        elif piece.tensor is None:
            _fill(target.data, descriptors[0], piece, piece.begin)
        else:
            stored = np.empty(piece.tensor.end - piece.tensor.begin, np.uint8)
            _fill(stored.data, descriptors[0], piece, 0)
            target[:] = _converted(stored, piece.tensor)[piece.begin :][: piece.size]


def _fill_in_turn(target: npt.NDArray[np.uint8], descriptors: Sequence[int], piece: _Piece) -> None:
    """Read the rows of all sources that a piece has bytes of, a row of each in turn."""
    width = piece.row * len(descriptors)
    first, begin = divmod(piece.begin, width)
    count = -(-(begin + piece.size) // width)
    rows = np.empty((count, len(descriptors), piece.row), np.uint8)
    stored = np.empty((count, piece.row), np.uint8)
    for number, descriptor in enumerate(descriptors):
        _fill(stored.reshape(-1).data, descriptor, piece, first * piece.row, number)
        rows[:, number] = stored
    target[:] = rows.reshape(-1)[begin:][: piece.size]


def _fill(target: memoryview, descriptor: int, piece: _Piece, begin: int, number: int = 0) -> None:
    """Read bytes of one of a piece's sources, from its byte `begin` on."""
    path, offset = piece.sources[number]
    offset += begin
    while target:
        got = os.preadv(descriptor, [target], offset)
        if not got:
            raise CheckpointError(
                f"{path}: ends {len(target)} bytes before a tensor does: was changed "
                "while it was read; restore the file"
            )
        target, offset = target[got:], offset + got


def _converted(stored: npt.NDArray[np.uint8], tensor: TensorEntry) -> npt.NDArray[np.uint8]:
    """Return what becomes of a tensor, as bytes.

    Bfloat16 is widened to float32, FP8 codes are transposed, a float32 scale is rounded to
    bfloat16, ties to even.
    """
    if tensor.dtype == "BF16":
        widened = np.empty(stored.size // 2, np.float32)
        widen(stored.view(np.uint16), widened)
        return widened.view(np.uint8)
    if tensor.dtype == "F8_E4M3":
        return np.ascontiguousarray(stored.reshape(tensor.shape).T).reshape(-1)
    rounded: npt.NDArray[np.uint8] = to_bfloat16(stored.view(np.float32)).view(np.uint8)
    return rounded
