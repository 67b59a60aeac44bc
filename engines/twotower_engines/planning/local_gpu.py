"""The GPU of this machine, as its driver reports it, and its SKU.

A card that the table does not know is planned as its nearest relative: its own memory and compute
capability, the relative's speeds, and sources that say so.
"""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass, replace

from twotower_contract.skus import GIB, Sku, known_skus
from twotower_engines.errors import PlanError

CUDA_SHARE = 0.975
"""Share of the memory that nvidia-smi reports and CUDA gives: the least of the table's GPUs."""

SAME_MEMORY = 0.05
"""Largest relative difference in memory of one product, between drivers and with or without ECC."""


@dataclass(frozen=True, slots=True)
class LocalGpu:
    """A GPU as nvidia-smi reports it.

    Attributes:
        name: Product name, without "NVIDIA".
        memory: Bytes; None for unified memory, which nvidia-smi does not report.
        compute_capability: Compute capability, as `9.0`.
    """

    name: str
    memory: int | None
    compute_capability: str

    def is_a(self, sku: Sku) -> bool:
        """Whether it is this SKU: by its name, or by its numbers where the SKU has no name."""
        if sku.device_names:
            return self.name in sku.device_names
        if self.compute_capability != sku.compute_capability:
            return False
        return self.memory is None or abs(self.memory - sku.memory) <= SAME_MEMORY * sku.memory

    def __str__(self) -> str:
        size = "" if self.memory is None else f", {self.memory / GIB:.0f} GiB"
        return f"NVIDIA {self.name} (compute capability {self.compute_capability}{size})"


def driver_reports(*fields: str) -> list[dict[str, str]]:
    """Return fields of each GPU as nvidia-smi names them; none without GPU, tool or driver.

    Args:
        fields: The first is `name`, which alone may hold a comma.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        rows = [line.rsplit(", ", len(fields) - 1) for line in answer.stdout.splitlines()]
        return [dict(zip(fields, row, strict=True)) for row in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def local_gpu() -> LocalGpu | None:
    """Return this machine's first GPU; None where there is none, or no working driver."""
    gpus = driver_reports("name", "memory.total", "compute_cap")
    if not gpus:
        return None
    product, memory, capability = gpus[0].values()
    mebibytes = memory.removesuffix(" MiB")  # "[N/A]" on a DGX Spark
    size = int(mebibytes) << 20 if mebibytes.isdigit() else None
    return LocalGpu(product.removeprefix("NVIDIA").strip(), size, capability.strip())


def local_sku() -> Sku:
    """Return the SKU of this machine's first GPU, with the memory that its driver reports.

    A product that the table lacks is described by its relative there: see `_like_a_relative`.

    Raises:
        PlanError: There is no GPU, or one of a compute capability that the table lacks.
    """
    gpu = local_gpu()
    if gpu is None:
        raise PlanError(
            "--sku local: no NVIDIA GPU was found (nvidia-smi is missing or failed); name the SKU "
            "that you plan for, or `cpu` for this machine"
        )
    for sku in known_skus().values():
        if gpu.name in sku.device_names:
            memory = sku.memory if gpu.memory is None else min(gpu.memory, sku.memory)
            return replace(sku, memory=memory, arch=platform.machine())
    return _like_a_relative(gpu)


def _like_a_relative(gpu: LocalGpu) -> Sku:
    """Describe an unknown product: its memory and capability, the nearest relative's speeds.

    Raises:
        PlanError: The table has no GPU of this compute capability.
    """
    same = [
        sku for sku in known_skus().values() if sku.compute_capability == gpu.compute_capability
    ]
    if not same:
        raise PlanError(
            f"--sku local: this machine's GPU is a {gpu.name!r} (compute capability "
            f"{gpu.compute_capability}), and the table has none of that capability; describe it in "
            "a SKU file (name, compute_capability, memory_gib, bandwidth_gb_s, bf16_tflops) and "
            "give its path as --sku"
        )
    seen = gpu.memory
    nearest = min(same, key=lambda sku: abs(sku.memory - (seen or sku.memory)))
    memory = nearest.memory if seen is None else int(seen * CUDA_SHARE)
    assumed = f"assumed: as {nearest.title}; a SKU file can say better"
    return replace(
        nearest,
        name=re.sub(r"[^a-z0-9.]+", "-", gpu.name.lower()).strip("-"),
        title=f"NVIDIA {gpu.name}",
        arch=platform.machine(),
        memory=memory,
        device_names=(gpu.name,),
        note=f"Not in the table: speeds are those of {nearest.title}.",
        sources=dict.fromkeys(nearest.sources, assumed)
        | {
            "compute_capability": "nvidia-smi",
            "memory_gib": "nvidia-smi, less 2.5% that CUDA does not give",
            "arch": "this machine",
        },
    )
