"""The memory that finished engines need, against the plan of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower_engines.building.build_cache import CachedEngine
from twotower_engines.errors import BuildError
from twotower_engines.planning.fit import gib
from twotower_engines.planning.plan import MemoryPlan


def check_device_memory(plan: MemoryPlan, built: Mapping[str, CachedEngine]) -> None:
    """Check the memory that the builder reports for intermediates against the memory plan.

    Raises:
        BuildError: A GPU would not hold it all; never where the builder says nothing of memory.
    """
    for gpu in plan.gpus:
        taken = {
            tower: size
            for tower in gpu.towers
            if (size := _intermediates(built[tower].report)) is not None
        }
        more = sum(size - gpu.workspace[tower] for tower, size in taken.items())
        if more > gpu.free:
            sizes = ", ".join(
                f"{tower} {gib(size)} (planned {gib(gpu.workspace[tower])})"
                for tower, size in taken.items()
            )
            raise BuildError(
                f"the engines for {plan.sku.name} take more device memory for intermediates than "
                f"was planned: {sizes}, and only {gib(gpu.free)} were left free; build with fewer "
                "--slots, a shorter --context or a smaller --block-size-max"
            )


def _intermediates(report: Mapping[str, Any]) -> int | None:
    """Return the bytes that an engine needs: as its GPU says, else as the builder did."""
    opened = report.get("engine") or {}
    size: int | None = opened.get("device_memory", report.get("scratch"))
    return size
