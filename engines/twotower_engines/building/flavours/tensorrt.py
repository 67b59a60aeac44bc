"""TensorRT: engines for data-centre GPUs, tuned and built on the GPU itself.

For TensorRT 10.15, the first to update caches in place, to 11. What this shares with TensorRT-RTX
(parsing, profiles, the worker process, progress, interruption) is exercised through that flavour on
any machine; what is here alone (timing caches, hardware compatibility, the search for the GPU)
needs a GPU to be seen at work.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Mapping
from typing import Any

from twotower_contract.skus import Sku, known_skus
from twotower_engines.artifacts.cache_root import in_cache
from twotower_engines.building.code_digest import code_digest
from twotower_engines.building.flavours.flavour import Flavour, Needs, Order, Target, layers_file
from twotower_engines.building.flavours.jobs import (
    check_arch,
    engine_job,
    engine_recipe,
    engine_report,
    installed,
)
from twotower_engines.building.flavours.process import Library, Progress, build_engine_files
from twotower_engines.building.flavours.profiles import narrow_profiles
from twotower_engines.errors import BuildError
from twotower_engines.kernels.targets import target as kernel_target
from twotower_engines.planning.local_gpu import local_gpu
from twotower_engines.planning.precisions import is_built

TITLE = "TensorRT"
OLDEST, NEWEST = (10, 15), (11, 99)
PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
KERNEL_CODE = (
    "twotower_engines/kernels/*.py",
    "twotower_contract/policies.py",
)
"""Sources of what our plugins embed in a plan."""

INSTALL = "install it from NVIDIA's index with `pip install 'twotower[tensorrt]'`"


class TensorRtFlavour(Flavour):
    """See `flavour.Flavour`."""

    name = "tensorrt"

    def versions(self) -> dict[str, str]:
        """Return the version of TensorRT, without loading it."""
        found = installed(PACKAGES)
        if found is None:
            raise BuildError(f"{TITLE} is not installed; {INSTALL}")
        if not OLDEST <= _minor(found) <= NEWEST:
            raise BuildError(f"{TITLE} {found} is installed, 10.15 to 11.x is needed; {INSTALL}")
        kernels = {"triton": importlib.metadata.version("triton")} if self.has_kernels() else {}
        return {"tensorrt": found, **kernels}

    def has_kernels(self) -> bool:
        """Whether the compiler of our kernels is installed; engines run the ops' bodies else."""
        return importlib.util.find_spec("triton") is not None

    def check(self, target: Target) -> None:
        """Refuse a machine that has no GPU which can build for the target."""
        sku = target.sku
        option = " --same-capability" if target.is_shared else ""
        where = (
            "copy the bundle, which holds no weights, to a machine with "
            f"{_builders(sku) if target.is_shared else sku.title} and run "
            f"`twotower build BUNDLE --sku {sku.name} ENGINES{option}` there"
        )
        if "tensorrt-rtx" in sku.flavours and is_built("tensorrt-rtx", target.precision):
            where += ", or build here with --flavour tensorrt-rtx"
        check_arch(sku, where)
        gpu = local_gpu()
        if gpu is None:
            raise BuildError(
                f"engines for {sku.name} are tuned on the GPU itself, and no NVIDIA GPU was found "
                f"here; {where}"
            )
        same = gpu.compute_capability == sku.compute_capability
        if not same or not (gpu.is_a(sku) or target.is_shared):
            here = ", or build here with --same-capability, or for --sku local" if same else ""
            raise BuildError(
                f"engines for {sku.name} (compute capability {sku.compute_capability}) cannot be "
                f"built on this machine's {gpu}; {where}{here}"
            )

    def recipe(self, tower: str, target: Target) -> dict[str, Any]:
        """Return profiles for each kind of call, and the GPUs that the engine is tuned for.

        With the extra `[kernels]` installed, the three ops become plugins whose PTX the engine
        carries; a server needs neither the plugins nor the extra.
        """
        sku, has_kernels = target.sku, self.has_kernels()
        return {
            **engine_recipe(narrow_profiles(tower, target.limits)),
            # our kernels in place of the ops' bodies: see plugins.py
            "kernels": sku.compute_capability if has_kernels else None,
            "graph_for": sku.compute_capability,
            "kernels_sha256": code_digest(*KERNEL_CODE) if has_kernels else None,
            "hardware": "SAME_COMPUTE_CAPABILITY" if target.is_shared else None,
            # not an argument of the builder, but of what it makes
            "built_for": sku.compute_capability if target.is_shared else sku.name,
        }

    def build(
        self, orders: Mapping[str, Order], target: Target, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """Build engines one after the other: two at once would disturb each other's timings."""
        cache = in_cache("timing") / f"{_timed_on()}-{self.versions()['tensorrt']}.cache"
        jobs = {
            tower: {
                **engine_job(order),
                "timing_cache": str(cache),
                "layers": str(layers_file(order.engine)),
            }
            for tower, order in orders.items()
        }
        library = Library(TITLE, "tensorrt", INSTALL)
        results = build_engine_files(library, jobs, 1, progress)
        return {tower: engine_report(result) for tower, result in results.items()}

    def needs(self, target: Target) -> Needs:
        """Return the CPU architecture of this machine, and a driver that takes the kernels' PTX."""
        capability = target.sku.compute_capability
        if not self.has_kernels() or capability is None:
            return Needs(platform.machine())
        return Needs(platform.machine(), kernel_target(capability).cuda)


def _timed_on() -> str:
    """Return the GPU that timings are measured on, which need not be the one that is built for."""
    gpu = local_gpu()
    name = "unknown" if gpu is None else gpu.name
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _relatives(sku: Sku) -> list[str]:
    """Return the titles of the other GPUs of a compute capability and CPU architecture."""
    same = (sku.compute_capability, sku.arch)
    return [
        one.title
        for one in known_skus().values()
        if (one.compute_capability, one.arch) == same and one.name != sku.name
    ]


def _builders(sku: Sku) -> str:
    """Name the GPUs that can build for one: their engines serve each other."""
    *others, last = [sku.title, *_relatives(sku)]
    return f"{', '.join(others)} or {last}" if others else last
