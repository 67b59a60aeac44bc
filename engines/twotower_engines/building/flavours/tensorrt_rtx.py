"""TensorRT-RTX: engines for RTX GPUs, built ahead of time on any machine, without a GPU.

NVIDIA's package of the extra [rtx] builds the engines and runs them. Custom ops are function bodies
here: this flavour must never meet a plugin without a GPU, the library ends the process then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower_contract.machine import available_bytes, cores
from twotower_engines.building.flavours.flavour import Flavour, Order, Target
from twotower_engines.building.flavours.jobs import (
    check_arch,
    engine_job,
    engine_recipe,
    engine_report,
    installed,
)
from twotower_engines.building.flavours.process import Library, Progress, build_engine_files
from twotower_engines.building.flavours.profiles import wide_profiles
from twotower_engines.errors import BuildError

PACKAGES = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
"""Distributions that bring the module `tensorrt_rtx`; the first is that of the extra [rtx]."""

LIBRARY = Library("TensorRT-RTX", "tensorrt_rtx", "install it with `pip install 'twotower[rtx]'`")

CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Targets that the builder of 1.7 has and that compute in bfloat16: Ampere, Ada and consumer
Blackwell. It has 7.5 besides. Its support matrix lacks 8.0, for which it builds all the same."""

BUILDER_MEMORY = 3 << 29
"""Bytes that one full-size tower takes, rounded up: 1.0 GB was seen."""

CAPTURE = {"REQUIRE_USER_ALLOCATION": True}
"""Builder flags without which the runtime does not let a CUDA graph capture an engine's call."""


class TensorRtRtxFlavour(Flavour):
    """See `flavour.Flavour`."""

    name = "tensorrt-rtx"

    def versions(self) -> dict[str, str]:
        """Return the version of TensorRT-RTX, without loading it."""
        found = installed(PACKAGES)
        if found is None:
            raise BuildError(f"{LIBRARY.title} is not installed; {LIBRARY.install}")
        return {LIBRARY.module: found}

    def check(self, target: Target) -> None:
        """Refuse a GPU that TensorRT-RTX does not serve, or whose machines have another CPU.

        NVIDIA promises engines that are portable between GPUs, not between CPU architectures.
        """
        capability = target.sku.compute_capability
        if capability not in CAPABILITIES:
            raise BuildError(
                f"TensorRT-RTX does not serve {target.sku.title} (compute capability {capability}),"
                f" only {', '.join(CAPABILITIES)}; build with --flavour tensorrt on that GPU"
            )
        check_arch(target.sku, "any such machine will do, without a GPU")

    def recipe(self, tower: str, target: Target) -> dict[str, Any]:
        """One wide profile, for the SKU's own compute capability."""
        recipe = engine_recipe(wide_profiles(tower, target.limits))
        return {**recipe, "flags": {**recipe["flags"], **CAPTURE}, **self.loader(target)}

    def build(
        self, orders: Mapping[str, Order], target: Target, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """Build engines, both towers at once where there are two cores and the memory for it."""
        jobs = {tower: engine_job(order) for tower, order in orders.items()}
        results = build_engine_files(LIBRARY, jobs, _at_once(), progress)
        return {tower: engine_report(result) for tower, result in results.items()}


def _at_once() -> int:
    return 2 if cores() > 1 and available_bytes() > 2 * BUILDER_MEMORY else 1
