"""The interface of an engine: calls with fixed shapes and bound addresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Shape = tuple[int, ...]


class Call(Protocol):
    """An engine prepared for one choice of shapes."""

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Set the addresses of inputs and outputs; earlier bindings stay."""

    def can_capture(self) -> bool:
        """Return whether the bound call can become part of a CUDA graph."""

    def enqueue(self) -> None:
        """Run on the device's stream, without waiting."""


class Engine(Protocol):
    """A loaded engine.

    Attributes:
        inputs: Names of all inputs: weights, states and the rest.
        outputs: Names of all outputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def prepare(self, shapes: Mapping[str, Shape]) -> Call:
        """Return a call for these shapes of the inputs that are not weights.

        Raises:
            RuntimeLoadError: No profile of the engine takes them.
        """

    def close(self) -> None:
        """Free the engine."""
