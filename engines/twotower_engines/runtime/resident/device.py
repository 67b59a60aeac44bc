"""The interface of a device: memory, copies in the order of one stream, and capture.

Addresses are plain integers, as CUDA and TensorRT take them. Every copy is ordered with every other
and with the engines that run on the same device; only `synchronize` and `download` wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

ALIGNMENT = 256
"""Alignment in bytes of allocations, and of tensors inside them: TensorRT's requirement."""


def aligned(size: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Box:
    """Bytes in three dimensions: layers of rows of bytes.

    Attributes:
        address: The first byte.
        pitch: Bytes from one row to the next.
        height: Rows from one layer to the next, whether they take part in a copy or not.
    """

    address: int
    pitch: int
    height: int

    @property
    def layer(self) -> int:
        """Bytes from one layer to the next."""
        return self.pitch * self.height

    def moved(self, size: int) -> Box:
        """Return a box that begins `size` bytes later."""
        return Box(self.address + size, self.pitch, self.height)


class Fence(Protocol):
    """A point in a device's stream."""

    def wait(self) -> None:
        """Wait on the host until the stream has passed this point."""


class Device(Protocol):
    """One device and its stream.

    Attributes:
        name: Name in messages, as `cuda:0`.
    """

    name: str

    def free_memory(self) -> int:
        """Return how many bytes can still be allocated."""

    def allocate(self, size: int) -> int:
        """Return the address of `size` new bytes, aligned.

        Raises:
            RuntimeLoadError: The device has no such room.
        """

    def staging(self, size: int) -> npt.NDArray[Any]:
        """Return host memory, (size,) uint8, from which uploads need no copy of their own."""

    def free_staging(self, memory: npt.NDArray[Any]) -> None:
        """Free what `staging` returned, before the device is closed."""

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        """Copy a contiguous host array to an address; the array must not change until then."""

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy to a contiguous host array, and wait for it."""

    def copy_box(
        self, target: Box, source: Box, width: int, rows: int, layers: int, to: Device
    ) -> None:
        """Copy `width` bytes of each of `rows` rows of `layers` layers, in one call.

        Args:
            target: Box on the device `to`.
            source: Box on this device, in whose order the copy happens.
            width: Bytes of a row, at most either pitch.
            rows: Rows of a layer, at most either height.
            layers: Number of layers.
            to: This device or another.
        """

    def zero(self, target: int, pitch: int, width: int, rows: int) -> None:
        """Fill `width` bytes of each of `rows` rows, which begin `pitch` bytes apart, with 0."""

    def fence(self) -> Fence:
        """Mark this point of the stream."""

    def follow(self, other: Device) -> None:
        """Let later work of this device wait for the work queued on another device so far."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` queues on this device, and return a function that repeats it."""

    def drop_captures(self) -> None:
        """Free what `capture` recorded; call it before the engines are freed."""

    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    def close(self) -> None:
        """Free all memory, and the stream; a second call does nothing."""
