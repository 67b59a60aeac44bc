"""Weights from the mapped checkpoint to a device, once, through two staging buffers.

A weight input of a native graph holds the bytes of its tensors one after the other: as they are
stored, or expert after expert. So nothing is converted: pages are copied to pinned memory in
bounded windows, and one window travels while the next is filled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from twotower_engines.manifest import ITEM_SIZES, WeightInput
from twotower_engines.resident.device import Device, Fence
from twotower_engines.weights import Progress, WeightStore

__all__ = ["WINDOW", "upload_weights", "weight_bytes"]

WINDOW = 64 << 20
"""Bytes of one staging buffer: long enough that a copy's start-up costs nothing."""


def weight_bytes(weight: WeightInput) -> int:
    """Return the size of a weight input on the device."""
    return math.prod(weight.shape) * ITEM_SIZES[weight.dtype]


def upload_weights(
    store: WeightStore,
    tower: str,
    device: Device,
    progress: Progress | None = None,
    window: int = WINDOW,
) -> dict[str, int]:
    """Copy all weights of a tower to a device.

    Args:
        store: The checkpoint, checked.
        tower: `context` or `denoiser`.
        device: Where to.
        progress: Told how many bytes are on their way.
        window: Bytes of each of the two staging buffers.

    Returns:
        Address of each weight input.

    Raises:
        RuntimeLoadError: The device has no room.
    """
    weights = store.manifest.weights[tower]
    total = sum(map(weight_bytes, weights.values()))
    buffers = [device.staging(window) for _ in range(2)]
    fences: list[Fence | None] = [None, None]
    addresses: dict[str, int] = {}
    done = turn = 0
    for name, weight in weights.items():
        target = addresses[name] = device.allocate(weight_bytes(weight))
        for piece in _pieces(store, weight, window):
            fence = fences[turn]
            if fence is not None:
                fence.wait()  # the buffer's last journey is over
            staged = buffers[turn][: piece.size]
            np.copyto(staged, piece)
            device.upload(target, staged)
            fences[turn] = device.fence()
            turn = 1 - turn
            target += piece.size
            done += piece.size
            if progress is not None:
                progress(done, total)
    device.synchronize()
    return addresses


def _pieces(
    store: WeightStore, weight: WeightInput, window: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the bytes of a weight input in order, no more than `window` at a time."""
    for source in weight.sources:
        content = store.raw(source).reshape(-1).view(np.uint8)
        for start in range(0, content.size, window):
            yield content[start : start + window]
