"""The interface of a flavour of engines, as `build.py` uses it."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower_contract.engine_set import Limits
from twotower_contract.skus import Sku
from twotower_engines.building.flavours.process import Progress


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a build.

    Attributes:
        sku: The GPU, or `cpu`.
        limits: The limits that the engines must accept.
        precision: Precision of the weights: a name of `PRECISIONS`.
        is_shared: Whether one engine must serve every GPU of the compute capability.
    """

    sku: Sku
    limits: Limits
    precision: str
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Needs:
    """A machine's prerequisites for loading the engines; build.json has them at its top level.

    Attributes:
        machine: CPU architecture as `platform.machine()` says it; None for any.
        cuda: CUDA version that the driver must know, as `12.0`; None where unknown.
    """

    machine: str | None = None
    cuda: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """One engine to build.

    Attributes:
        graph: The ONNX file.
        engine: Path of the engine file to write.
        recipe: The result of `Flavour.recipe` for its tower.
    """

    graph: Path
    engine: Path
    recipe: Mapping[str, Any]


def layers_file(engine: Path) -> Path:
    """Return where an engine's layers are described, in the form of TensorRT's inspector."""
    return engine.with_suffix(".layers.json")


def traffic_file(engine: Path) -> Path:
    """Return where an engine's kernels are listed, in the form of `twotower_contract.traffic`."""
    return engine.with_suffix(".traffic.json")


class Flavour(ABC):
    """A way to make engines; what it does not say is that of an engine for a GPU, without kernels.

    Attributes:
        name: As `--flavour` takes it.
        suffix: File suffix of its plans.
        is_cached: True where an engine is worth keeping for the next build.
        graphs: Which of the bundle's graphs it builds from: `native` or `float32`.
    """

    name: str
    suffix = ".plan"
    is_cached = True
    graphs = "native"

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return what takes part in a build, without loading it.

        Raises:
            BuildError: Something is not installed.
        """

    def has_kernels(self) -> bool:
        """Whether engines built here run our kernels rather than the ops' function bodies."""
        return False

    @abstractmethod
    def check(self, target: Target) -> None:
        """Refuse, before anything is built, what cannot be built on this machine.

        Raises:
            BuildError: Says what is missing, and where to run what instead.
        """

    @abstractmethod
    def recipe(self, tower: str, target: Target) -> dict[str, Any]:
        """Return everything but graph and versions that decides the bytes of an engine, as JSON."""

    @abstractmethod
    def build(
        self, orders: Mapping[str, Order], target: Target, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """Build engines, by tower; returns for each what build.json says of it.

        Beside an engine its layers and its kernels may be written, as `layers_file` and
        `traffic_file` name them.

        Raises:
            BuildError: The builder is missing, refuses a graph, or crashed.
        """

    def needs(self, target: Target) -> Needs:
        """Return what a machine must have to load the plans.

        Raises:
            BuildError: There are no kernels for the target's compute capability.
        """
        return Needs(platform.machine())

    def loader(self, target: Target) -> dict[str, Any]:
        """Return what the runtime must know to load the engines (`extra` of build.json)."""
        return {"compute_capabilities": [target.sku.compute_capability]}
