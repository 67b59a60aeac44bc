"""What every flavour of engine can do for `build.py`, and what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twotower_engines.engine_set import Limits
from twotower_engines.flavours.process import Progress
from twotower_engines.skus import Sku

__all__ = ["Flavour", "Order", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """What engines are built for.

    Attributes:
        sku: The GPU, or `cpu`.
        limits: What the engines must take.
        precision: Of the weights: `float32` or `bf16`.
    """

    sku: Sku
    limits: Limits
    precision: str


@dataclass(frozen=True, slots=True)
class Order:
    """One plan to build.

    Attributes:
        graph: The ONNX file.
        plan: Where the plan goes.
        recipe: What `Flavour.recipe` returned for its tower.
    """

    graph: Path
    plan: Path
    recipe: Mapping[str, Any]


class Flavour(Protocol):
    """A way to make engines.

    Attributes:
        name: As `--flavour` takes it.
        suffix: Of its plans.
        is_cached: Whether a plan is worth keeping for the next build.
    """

    name: str
    suffix: str
    is_cached: bool

    def versions(self) -> dict[str, str]:
        """Return what takes part in a build, without loading it.

        Raises:
            BuildError: Something is not installed.
        """

    def graphs(self, precision: str) -> str:
        """Return which of the bundle's graphs it builds from: `native` or `float32`."""

    def check(self, target: Target) -> None:
        """Refuse, before anything is built, what cannot be built on this machine.

        Raises:
            BuildError: Says what is missing, and where to run what instead.
        """

    def recipe(self, tower: str, target: Target) -> dict[str, Any]:
        """Return everything but graph and versions that decides the bytes of a plan, as JSON."""

    def build(
        self, orders: Mapping[str, Order], target: Target, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """Build plans, by tower; returns for each what build.json says of it.

        Raises:
            BuildError: The builder is missing, refuses a graph, or crashed.
        """

    def loader(self, target: Target) -> dict[str, Any]:
        """Return what the runtime must know to load the plans (`extra` of build.json)."""
