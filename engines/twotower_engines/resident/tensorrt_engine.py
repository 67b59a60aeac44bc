"""TensorRT plans as engines of the resident runtime; both TensorRT and TensorRT-RTX.

One execution context per choice of shapes, because a captured call must keep its own; they share
one workspace, since calls of one stream never overlap.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower_engines.engine_set import BuildRecord
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.resident.cuda_device import CudaDevice
from twotower_engines.resident.engine import Shape

__all__ = ["TensorRtEngine", "check_build", "import_tensorrt"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def import_tensorrt(flavour: str) -> Any:
    """Return NVIDIA's Python module for a flavour.

    Raises:
        RuntimeLoadError: It is not installed, or there is no such flavour.
    """
    if flavour not in MODULES:
        raise RuntimeLoadError(
            f"engines of flavour `{flavour}` are not known to this version (onnxruntime, "
            f"{', '.join(MODULES)}); build the engines again"
        )
    name = MODULES[flavour]
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise RuntimeLoadError(
            f"engines of flavour `{flavour}` need the package {name.replace('_', '-')}, which is "
            f"not installed ({problem}); install it from NVIDIA's index on the machine of the GPU"
        ) from problem


def check_build(build: BuildRecord, version: str, device: str, compute_capability: str) -> None:
    """Refuse engines that were built for another GPU or by another TensorRT.

    Called before a plan is deserialized: TensorRT's own answer to a wrong plan is an error without
    a name, or a crash.

    Raises:
        RuntimeLoadError: Says which of the two, and what to do.
    """
    wanted = build.extra.get("compute_capabilities") or [build.compute_capability]
    if compute_capability not in wanted:
        raise RuntimeLoadError(
            f"these engines were built for `{build.sku}` (compute capability "
            f"{', '.join(map(str, wanted))}), but {device} has {compute_capability}; build them "
            "for this GPU with `twotower build BUNDLE --sku local ENGINES`"
        )
    built_with = build.versions.get(MODULES[build.flavour])
    if built_with is not None and _minor(built_with) != _minor(version):
        raise RuntimeLoadError(
            f"these engines were built with {MODULES[build.flavour]} {built_with}, but {version} "
            "is installed: a plan runs only with the version that built it; install "
            f"{built_with}, or build the engines again"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


class TensorRtEngine:
    """See `engine.Engine`.

    Args:
        path: The plan; its digest was checked.
        flavour: `tensorrt` or `tensorrt-rtx`.
        device: Where it runs.

    Raises:
        RuntimeLoadError: TensorRT refuses the plan.
    """

    def __init__(self, path: Path, flavour: str, device: CudaDevice) -> None:
        self._trt = trt = import_tensorrt(flavour)
        self._device = device
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise RuntimeLoadError(
                f"{path}: {flavour} {trt.__version__} cannot load this plan on {device.name} "
                f"({device.model}); build the engines again on this machine"
            )
        self._engine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = tuple(n for n in names if modes[n] == trt.TensorIOMode.INPUT)
        self.outputs = tuple(n for n in names if modes[n] == trt.TensorIOMode.OUTPUT)
        self._workspace_size = int(engine.device_memory_size_v2)
        self._workspace = device.allocate(max(self._workspace_size, 256))

    def prepare(self, shapes: Mapping[str, Shape]) -> _TensorRtCall:
        """Return an execution context with the profile that takes these shapes."""
        profile = self._profile_for(shapes)
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        context.set_device_memory(self._workspace, self._workspace_size)
        stream = int(self._device.stream)
        if not context.set_optimization_profile_async(profile, stream):
            raise RuntimeLoadError(f"profile {profile} cannot be chosen on {self._device.name}")
        for name, shape in shapes.items():
            if name in self.inputs and not context.set_input_shape(name, shape):
                raise RuntimeLoadError(f"profile {profile} does not take {name} of shape {shape}")
        return _TensorRtCall(context, stream, frozenset(self.inputs + self.outputs))

    def close(self) -> None:
        """Free the engine; its workspace goes with the device."""
        del self._engine, self._runtime

    def _profile_for(self, shapes: Mapping[str, Shape]) -> int:
        ids = shapes["ids"]
        ranges = []
        for profile in range(self._engine.num_optimization_profiles):
            low, _, high = (tuple(s) for s in self._engine.get_tensor_profile_shape("ids", profile))
            if all(a <= size <= b for a, size, b in zip(low, ids, high, strict=True)):
                return profile
            ranges.append(f"{low} to {high}")
        raise RuntimeLoadError(
            f"no profile of this engine takes ids of shape {ids}, only {'; '.join(ranges)}; build "
            "with more --slots"
        )


class _TensorRtCall:
    """See `engine.Call`."""

    def __init__(self, context: Any, stream: int, names: frozenset[str]) -> None:
        self._context, self._stream, self._names = context, stream, names

    def bind(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if name in self._names and not self._context.set_tensor_address(name, address):
                raise RuntimeLoadError(f"the engine does not take an address for {name}")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise RuntimeError("TensorRT could not enqueue a call; its log above says why")
