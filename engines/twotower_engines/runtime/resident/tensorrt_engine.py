"""TensorRT and TensorRT-RTX engines for the resident runtime.

Each choice of shapes has an execution context, because a captured call must keep its own; they
share one workspace, since calls of one stream never overlap. All memory of a call is given here,
once: an engine with an output whose size only a run tells, or with a tensor on the host, would
allocate at every call, and is refused.

TensorRT-RTX compiles kernels when it meets a shape. It is told to do so at once, not in the
background (a kernel that replaced another later would not be in a captured graph), and what it
compiled is kept in a file, so that only the first load takes that time.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower_contract.atomic import partial_file
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime.resident.cuda_device import CudaDevice, CudaError
from twotower_engines.runtime.resident.engine import Shape

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


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
            f"not installed ({problem}); install it on the machine of the GPU with: "
            f"pip install 'twotower[{EXTRAS[flavour]}]'"
        ) from problem


class TensorRtEngine:
    """See `engine.Engine`.

    Args:
        path: The engine file; its digest was checked.
        flavour: `tensorrt` or `tensorrt-rtx`.
        device: Device that runs it.
        kernels: File that keeps the kernels that TensorRT-RTX compiles for this engine; TensorRT
            proper compiles none.

    Raises:
        RuntimeLoadError: TensorRT refuses the engine, the engine wants a tensor on the host, or the
            device has no room for its workspace.
    """

    def __init__(
        self, path: Path, flavour: str, device: CudaDevice, kernels: Path | None = None
    ) -> None:
        self._trt = trt = import_tensorrt(flavour)
        self._device = device
        self._kernels = kernels
        device.use()  # an engine is deserialized for the current device
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise RuntimeLoadError(
                f"{path}: {flavour} {trt.__version__} cannot load this engine on {device.name} "
                f"({device.model}); build the engines again on this machine"
            )
        self._engine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        on_host = [n for n in names if engine.get_tensor_location(n) != trt.TensorLocation.DEVICE]
        if on_host:
            raise RuntimeLoadError(
                f"{path}: the engine wants {', '.join(on_host)} in host memory, which no call may "
                "wait for; export and build again with this version of twotower"
            )
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = tuple(n for n in names if modes[n] == trt.TensorIOMode.INPUT)
        self.outputs = tuple(n for n in names if modes[n] == trt.TensorIOMode.OUTPUT)
        self._workspace_size = int(engine.device_memory_size_v2)
        self._workspace = device.allocate(max(self._workspace_size, 256))
        self._cache: Any = None
        self._config = self._runtime_config()

    def prepare(self, shapes: Mapping[str, Shape]) -> _TensorRtCall:
        """Return an execution context with the profile that takes these shapes."""
        profile = self._profile_for(shapes)
        self._device.use()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(
            strategy if self._config is None else self._config
        )
        if context is None:
            raise RuntimeLoadError(
                f"{self._device.name}: TensorRT cannot make an execution context; its log above "
                "says why (often no memory: build with fewer --slots)"
            )
        context.set_device_memory(self._workspace, self._workspace_size)
        stream = int(self._device.stream)
        if not context.set_optimization_profile_async(profile, stream):
            raise RuntimeLoadError(f"profile {profile} cannot be chosen on {self._device.name}")
        for name, shape in shapes.items():
            if name in self.inputs and not context.set_input_shape(name, shape):
                raise RuntimeLoadError(f"profile {profile} does not take {name} of shape {shape}")
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            if -1 in shape:
                raise RuntimeLoadError(
                    f"profile {profile}: the size of {name}, {shape}, is known only after a run, "
                    "so its memory cannot be given before; export and build again with this "
                    "version of twotower"
                )
        return _TensorRtCall(context, self._device, frozenset(self.inputs + self.outputs))

    def keep_kernels(self) -> None:
        """Write the kernels that were compiled so far, for the next load.

        They are only a cache: if the folder cannot be written, the next load takes longer.
        """
        if self._cache is None or self._kernels is None:
            return
        with contextlib.suppress(OSError):
            self._kernels.parent.mkdir(parents=True, exist_ok=True)
            with partial_file(self._kernels) as partial:
                partial.write_bytes(memoryview(self._cache.serialize()))

    def close(self) -> None:
        """Free the engine; its workspace goes with the device."""
        self._device.use()
        self._config = self._cache = self._engine = self._runtime = None

    def _runtime_config(self) -> Any:
        """Return the runtime settings of TensorRT-RTX; None for TensorRT, which has none."""
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._cache = config.create_runtime_cache()
        if self._kernels is not None and self._kernels.is_file():
            # of another driver or version: TensorRT-RTX finds out, and compiles anew
            self._cache.deserialize(self._kernels.read_bytes())
        config.set_runtime_cache(self._cache)
        return config

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
            "the engines again"
        )


class _TensorRtCall:
    """See `engine.Call`."""

    def __init__(self, context: Any, device: CudaDevice, names: frozenset[str]) -> None:
        self._context, self._device, self._names = context, device, names
        self._stream = int(device.stream)

    def bind(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if name in self._names and not self._context.set_tensor_address(name, address):
                raise RuntimeLoadError(f"the engine does not take an address for {name}")

    def can_capture(self) -> bool:
        # TensorRT proper has no such question: without loops and conditions it can
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream))

    def enqueue(self) -> None:
        self._device.use()
        if not self._context.execute_async_v3(self._stream):
            raise CudaError(
                f"{self._device.name}: TensorRT could not enqueue a call; its log above says why"
            )
