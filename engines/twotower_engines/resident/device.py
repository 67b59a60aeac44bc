"""What the resident runtime asks of a device: memory, copies in the order of one stream, capture.

Addresses are plain integers, as CUDA and TensorRT take them. Every copy is ordered with every other
and with the engines that run on the same device; only `synchronize` and `download` wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt

__all__ = ["Device", "Fence"]


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
        """Return the address of `size` new bytes, aligned to 256.

        Raises:
            RuntimeLoadError: The device has no such room.
        """

    def staging(self, size: int) -> npt.NDArray[Any]:
        """Return host memory, (size,) uint8, from which uploads need no copy of their own."""

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        """Copy a contiguous host array to an address; the array must stay as it is until then."""

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy to a contiguous host array, and wait for it."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes between addresses of this device, or to one of another."""

    def copy_strided(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copy `rows` runs of `width` bytes, each `pitch` bytes after the one before."""

    def zero(self, target: int, size: int) -> None:
        """Fill bytes with 0."""

    def fence(self) -> Fence:
        """Mark this point of the stream."""

    def follow(self, other: Device) -> None:
        """Let what comes next here wait for what was asked of another device so far."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` asks of this device, and return what repeats it."""

    def synchronize(self) -> None:
        """Wait until all that was asked is done."""

    def close(self) -> None:
        """Free all memory, and the stream."""
