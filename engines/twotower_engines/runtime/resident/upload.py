"""Weights from the checkpoint's shards to a device, once, through pinned windows.

A weight input of a native graph holds the bytes of its tensors one after the other: as they are
stored, or expert after expert. Nothing is converted but what is quantized: FP8 codes are
transposed, and scales are brought to the model's dtype, see `input_forms`. A tower's weights are
one allocation, which is filled window by window: two threads read the windows' bytes from the
shards, which may be those of many small tensors, while windows that were read travel.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_contract.errors import CheckpointError
from twotower_contract.manifest import Manifest, WeightInput
from twotower_contract.quantized import scale_names
from twotower_contract.shards import ITEM_SIZES, TensorEntry
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


def weight_bytes(manifest: Manifest, tower: str) -> int:
    """Return the size of all weights of a tower."""
    return sum(
        size
        for weight in manifest.weights[tower].values()
        for size in input_sizes(manifest, weight).values()
    )


def tower_bytes(manifest: Manifest, tower: str) -> int:
    """Return the size of all weights of a tower on the device, aligned."""
    return sum(
        aligned(size)
        for weight in manifest.weights[tower].values()
        for size in input_sizes(manifest, weight).values()
    )


def upload_weights(
    store: WeightStore,
    tower: str,
    device: Device,
    progress: Progress | None = None,
    window: int = WINDOW,
) -> dict[str, int]:
    """Copy all weights of a tower to a device.

    Args:
        progress: Called with the bytes that are on their way, and their sum.
        window: Bytes of each staging buffer.

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
            addresses[name] = end
            end += aligned(count)
    windows = _windows(_pieces(store, weights.values()), window)
    with ExitStack() as stack:
        buffers = [device.staging(min(window, size)) for _ in range(BUFFERS)]
        for buffer in buffers:
            stack.callback(device.free_staging, buffer)
        stack.callback(device.synchronize)
        total = weight_bytes(store.manifest, tower)
        _Journey(device, start, total, buffers, progress).run(windows, _Files(stack))
    return addresses


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a shard, and how many bytes after the tower's first they belong.

    Attributes:
        place, size: Place and number of bytes on the device.
        offset: Place of the first byte in the shard; of the whole tensor where it is converted.
        tensor: The tensor where it is converted: the piece is a part of what becomes of it.
        begin: First byte of that part.
    """

    place: int
    path: Path
    offset: int
    size: int
    tensor: TensorEntry | None = None
    begin: int = 0


@dataclass(frozen=True, slots=True)
class _Window:
    """Neighbouring bytes of the device, and the pieces that they are made of."""

    place: int
    size: int
    pieces: tuple[_Piece, ...]


def _pieces(store: WeightStore, weights: Iterable[WeightInput]) -> Iterator[_Piece]:
    """Yield the tensors of a tower in the order of their places."""
    manifest, start = store.manifest, 0
    for weight in weights:
        parts = [(source, *scale_names(source, weight.dtype)) for source in weight.sources]
        sizes = input_sizes(manifest, weight).values()
        for size, names in zip(sizes, zip(*parts, strict=True), strict=True):
            for number, name in enumerate(names):
                tensor = manifest.tensors[name]
                shard = manifest.shards[tensor.shard]
                each = size // len(names)
                is_turned = weight.format == "fp8" and name in weight.sources
                is_as_stored = not is_turned and each == tensor.end - tensor.begin
                yield _Piece(
                    start + number * each,
                    store.folder / shard.file,
                    shard.data_start + tensor.begin,
                    each,
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
                if piece.tensor is None:
                    yield _Piece(place, piece.path, piece.offset + done, size)
                else:
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
                parts = [(files.open(piece.path), piece) for piece in window.pieces]
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


def _read(buffer: npt.NDArray[Any], begin: int, parts: Sequence[tuple[int, _Piece]]) -> None:
    """Read pieces to their places in a window. Runs in a thread; reading lets others run."""
    for descriptor, piece in parts:
        place = piece.place - begin
        if piece.tensor is None:
            _fill(buffer.data[place : place + piece.size], descriptor, piece)
            continue
        stored = np.empty(piece.tensor.end - piece.tensor.begin, np.uint8)
        _fill(stored.data, descriptor, piece)
        made = _converted(stored, piece.tensor)
        buffer[place : place + piece.size] = made[piece.begin : piece.begin + piece.size]


def _fill(target: memoryview, descriptor: int, piece: _Piece) -> None:
    """Read bytes of a piece's shard from its offset on."""
    offset = piece.offset
    while target:
        got = os.preadv(descriptor, [target], offset)
        if not got:
            raise CheckpointError(
                f"{piece.path}: ends {len(target)} bytes before a tensor does: was changed "
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
    bits = stored.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
