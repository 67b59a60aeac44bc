"""What the resident runtime asks of a device: memory, copies in the order of one stream, capture.

Addresses are plain integers, as CUDA and TensorRT take them. Every copy is ordered with every other
and with the engines that run on the same device; only `synchronize` and `download` wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

__all__ = ["ALIGNMENT", "Box", "Device", "Fence", "aligned"]

ALIGNMENT = 256
"""Bytes to which allocations are aligned, and tensors inside them: what TensorRT asks for."""


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
        name: For messages, as `cuda:0`.
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
        """Copy a contiguous host array to an address; the array must stay as it is until then."""

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy to a contiguous host array, and wait for it."""

    def copy_box(
        self, target: Box, source: Box, width: int, rows: int, layers: int, to: Device
    ) -> None:
        """Copy `width` bytes of each of `rows` rows of `layers` layers, in one call.

        Args:
            target: On the device `to`.
            source: On this device, in whose order the copy happens.
            width: No more than either pitch.
            rows: No more than either height.
            layers: How many.
            to: This device or another.
        """

    def zero(self, target: int, pitch: int, width: int, rows: int) -> None:
        """Fill `width` bytes of each of `rows` rows, which begin `pitch` bytes apart, with 0."""

    def fence(self) -> Fence:
        """Mark this point of the stream."""

    def follow(self, other: Device) -> None:
        """Let what comes next here wait for what was asked of another device so far."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` asks of this device, and return what repeats it."""

    def drop_captures(self) -> None:
        """Free what `capture` recorded: before the engines go that it runs."""

    def synchronize(self) -> None:
        """Wait until all that was asked is done."""

    def close(self) -> None:
        """Free all memory, and the stream. Once; later calls do nothing."""
