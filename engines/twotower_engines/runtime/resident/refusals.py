"""Checks before an engine is deserialized, each with an error of its own.

TensorRT answers an engine that was built for another machine with a vague error, or it crashes.
"""

from __future__ import annotations

import platform
import re

from twotower_contract.engine_set import BuildRecord
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime.resident.cuda_device import CudaDevice, cuda_version, usable_gpus
from twotower_engines.runtime.resident.tensorrt_engine import MODULES

BUILD_AGAIN = "build them for this GPU with `twotower build BUNDLE --sku local ENGINES`"
VERSION_PARTS = {"tensorrt": 4, "tensorrt-rtx": 2}
"""Leading numbers of the version that must be equal: TensorRT promises no wider compatibility."""


def placement(build: BuildRecord) -> dict[str, int]:
    """Return on which GPU each tower runs, as `twotower build` placed it."""
    placed = build.extra.get("placement", {})
    return {tower: int(placed.get(tower, 0)) for tower in build.plans}


def check_gpus(build: BuildRecord) -> None:
    """Refuse a machine with fewer GPUs than the engine set was placed on.

    Raises:
        RuntimeLoadError: Says how many there are and how many are needed.
    """
    needed, usable = max(placement(build).values()) + 1, usable_gpus()
    if usable >= needed:
        return
    if needed == 1:
        raise RuntimeLoadError(
            f"these engines need a GPU ({build.sku}), but CUDA finds none that it can use (is "
            "CUDA_VISIBLE_DEVICES set?); run on the machine of the SKU, or build with --sku cpu"
        )
    raise RuntimeLoadError(
        f"these engines were placed on {needed} GPUs, one tower on each, but CUDA can use {usable} "
        "here; run on a machine that has them, or build with --gpus 1 where one GPU holds both"
    )


def check_build(
    build: BuildRecord, version: str, device: str, compute_capability: str, driver: int
) -> None:
    """Refuse engines that were built for another machine, GPU, driver or TensorRT.

    Args:
        device: Name of the GPU in messages.
        driver: The newest CUDA that the driver serves, for example 13010.

    Raises:
        RuntimeLoadError: Says which of them, and what to do.
    """
    machine = platform.machine()
    if build.machine is not None and build.machine != machine:
        raise RuntimeLoadError(
            f"these engines were built on a {build.machine} machine, but this one is {machine}: an "
            f"engine holds code for the host as well; {BUILD_AGAIN}"
        )
    wanted = build.extra.get("compute_capabilities") or [build.compute_capability]
    if compute_capability not in wanted:
        raise RuntimeLoadError(
            f"these engines were built for `{build.sku}` (compute capability "
            f"{', '.join(map(str, wanted))}), but {device} has {compute_capability}; {BUILD_AGAIN}"
        )
    module = MODULES[build.flavour]
    built_with = build.versions.get(module)
    parts = VERSION_PARTS[build.flavour]
    if built_with is not None and not _is_same(built_with, version, parts):
        raise RuntimeLoadError(
            f"these engines were built with {module} {built_with}, but {version} "
            "is installed: an engine runs only with the version that built it; install "
            f"{built_with}, or build the engines again"
        )
    if build.cuda is not None and driver < _number(build.cuda):
        raise RuntimeLoadError(
            f"these engines were built for CUDA {build.cuda}, but the driver of {device} serves "
            f"CUDA {cuda_version(driver)}; update the NVIDIA driver, or build the engines again "
            "on this machine"
        )


def check_room(build: BuildRecord, device: CudaDevice, index: int, weights: int) -> None:
    """Refuse a GPU whose free memory is less than what will be allocated on it.

    Args:
        build: Build record of the engine set; its memory plan has the size of engines and states.
        weights: Bytes of the weights that go there.

    Raises:
        RuntimeLoadError: Says what is needed and what is free.
    """
    shares = build.memory.get("per_gpu", [])
    # the overhead is CUDA's own, and most of it is in use since the device was opened
    planned = shares[index]["total"] - shares[index]["overhead"] if index < len(shares) else 0
    needed, free = max(planned, weights), device.free_memory()
    if needed > free:
        raise RuntimeLoadError(
            f"{device.name} ({device.model}): these engines take {needed / 1e9:.1f} GB, "
            f"{weights / 1e9:.1f} GB of it weights, but {free / 1e9:.1f} GB are free; end what "
            "else uses this GPU, or build with fewer --slots or a shorter --context"
        )


def _is_same(built: str, installed: str, parts: int) -> bool:
    """Compare leading numbers; packages and libraries do not always give equally many."""
    left, right = (
        re.findall(r"\d+", one.partition(".post")[0])[:parts] for one in (built, installed)
    )
    known = min(len(left), len(right))
    return left[:known] == right[:known]


def _number(version: str) -> int:
    """Return a CUDA version as CUDA writes it, for example 13010 for `13.1`."""
    major, _, minor = version.partition(".")
    return int(major) * 1000 + int(minor.partition(".")[0] or 0) * 10
