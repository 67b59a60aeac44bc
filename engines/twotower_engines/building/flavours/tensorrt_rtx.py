"""TensorRT-RTX: plans for RTX GPUs, built ahead of time on any machine, without a GPU.

Custom ops are function bodies here: this flavour must never meet a plugin without a GPU, the
library ends the process then.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

from twotower_engines.building.flavours.flavour import Needs, Order, Target
from twotower_engines.building.flavours.jobs import (
    check_arch,
    engine_job,
    engine_recipe,
    engine_report,
)
from twotower_engines.building.flavours.process import Progress, build_engine_files
from twotower_engines.building.flavours.profiles import wide_profiles
from twotower_engines.building.flavours.rtx_library import LIBRARY_VERSION, find_library
from twotower_engines.errors import BuildError

__all__ = ["TensorRtRtxFlavour"]

CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""What a plan runs on where no target is chosen: Ampere, Ada and consumer Blackwell."""

BUILDER_MEMORY = 3 << 29
"""Bytes that one full-size tower takes, rounded up: 1.2 GB was seen."""

CAPTURE_FLAGS = ("REQUIRE_USER_ALLOCATION",)
"""Builder flags without which NVIDIA's runtime does not let a CUDA graph capture an engine's call.
They are of its own `tensorrt_rtx` API; the bindings from PyPI lack them, and plans that those build
are launched call by call."""


class TensorRtRtxFlavour:
    """See `flavour.Flavour`."""

    name = "tensorrt-rtx"
    suffix = ".plan"
    is_cached = True

    def versions(self) -> dict[str, str]:
        """Return the versions of the API and of the library, without loading either."""
        library = find_library()
        if library.module == "tensorrt_rtx":
            return {"tensorrt_rtx": _nvidias_version()}
        bindings = importlib.metadata.version("tensorrt-cu13-bindings")
        return {"tensorrt_rtx": LIBRARY_VERSION, "tensorrt_bindings": bindings}

    def has_kernels(self) -> bool:
        """No: the library takes no plugin without a GPU."""
        return False

    def graphs(self, precision: str) -> str:
        """The checkpoint's own dtype."""
        return "native"

    def check(self, target: Target) -> None:
        """Refuse a GPU that TensorRT-RTX does not serve, or whose machines have another CPU.

        NVIDIA promises plans that are portable between GPUs, not between CPU architectures.
        """
        capability = target.sku.compute_capability
        if capability not in CAPABILITIES:
            raise BuildError(
                f"TensorRT-RTX does not serve {target.sku.title} (compute capability {capability}),"
                f" only {', '.join(CAPABILITIES)}; build with --flavour tensorrt on that GPU"
            )
        check_arch(target.sku, "any such machine will do, without a GPU")

    def recipe(self, tower: str, target: Target) -> dict[str, Any]:
        """One wide profile; the GPU itself only where the API can aim at it."""
        recipe = engine_recipe(wide_profiles(tower, target.limits))
        aimed = _aimed_at(target)
        return {**recipe, "compute_capabilities": aimed, "flags_if_known": list(CAPTURE_FLAGS)}

    def build(
        self, orders: Mapping[str, Order], target: Target, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """Build plans, both towers at once where there are two cores and the memory for it."""
        jobs = {tower: engine_job(order) for tower, order in orders.items()}
        results = build_engine_files(find_library(), jobs, _at_once(), progress)
        return {tower: engine_report(result) for tower, result in results.items()}

    def needs(self, target: Target) -> Needs:
        """Return this machine's CPU architecture; kernels are compiled at run time."""
        return Needs(platform.machine())

    def loader(self, target: Target) -> dict[str, Any]:
        """Return the GPUs that the plans run on."""
        return {"compute_capabilities": _aimed_at(target) or list(CAPABILITIES)}


def _nvidias_version() -> str:
    """Return the version of NVIDIA's own package, whatever distribution brought it."""
    try:
        return importlib.metadata.version("tensorrt_rtx")
    except importlib.metadata.PackageNotFoundError:
        found = importlib.metadata.packages_distributions().get("tensorrt_rtx", [])
        return importlib.metadata.version(found[0]) if found else "unknown"


def _aimed_at(target: Target) -> list[str]:
    """Return the compute capabilities to build for; none means all that the library knows.

    Choosing them is part of NVIDIA's own `tensorrt_rtx` API and not of the bindings from PyPI.
    """
    capability = target.sku.compute_capability
    is_nvidias = find_library().module == "tensorrt_rtx"
    return [capability] if is_nvidias and capability is not None else []


def _at_once() -> int:
    cores = len(os.sched_getaffinity(0))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 if cores > 1 and free > 2 * BUILDER_MEMORY else 1
