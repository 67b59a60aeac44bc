"""Fakes of `tensorrt` and `tensorrt_rtx` that record what they are asked. They compute nothing.

`API` has the names that the fakes of TensorRT proper offer, by NVIDIA's class, `RTX` those of
TensorRT-RTX alone; a test compares both with NVIDIA's own packages.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

API = {
    "": {"Runtime", "Logger", "TensorIOMode", "TensorLocation",
         "ExecutionContextAllocationStrategy"},
    "Runtime": {"deserialize_cuda_engine"},
    "ICudaEngine": {
        "num_io_tensors", "get_tensor_name", "get_tensor_mode", "device_memory_size_v2",
        "num_optimization_profiles", "get_tensor_profile_shape", "create_execution_context",
        "create_runtime_config", "get_tensor_location",
    },
    "IExecutionContext": {
        "set_device_memory", "set_optimization_profile_async", "set_input_shape",
        "set_tensor_address", "execute_async_v3", "get_tensor_shape",
    },
    "IRuntimeConfig": {"set_execution_context_allocation_strategy"},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED"},
    "TensorIOMode": {"INPUT", "OUTPUT"},
    "TensorLocation": {"DEVICE"},
    "Logger": {"WARNING"},
}  # fmt: skip
RTX = {
    "": {"DynamicShapesKernelSpecializationStrategy"},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER"},
    "IExecutionContext": {"is_stream_capturable"},
    "IRuntimeConfig": {
        "create_runtime_cache",
        "set_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
    },
    "IRuntimeCache": {"serialize", "deserialize"},
}


class Recorded:
    """Writes down every method that is called, as (class, method, arguments)."""

    kind = ""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        module = self._module
        known = API.get(self.kind, set()) | (RTX.get(self.kind, set()) if module.is_rtx else set())
        if name not in known:
            raise AttributeError(f"{self.kind} has no {name}")

        def method(*arguments):
            module.calls.append((self.kind, name, arguments))
            return module.answers.get(name, True)

        return method


class Cache(Recorded):
    kind = "IRuntimeCache"


class Config(Recorded):
    kind = "IRuntimeConfig"

    def create_runtime_cache(self):
        self._module.calls.append((self.kind, "create_runtime_cache", ()))
        return Cache(self._module)


class Context(Recorded):
    kind = "IExecutionContext"

    def get_tensor_shape(self, name):
        return self._module.answers.get("get_tensor_shape", [4, 16])


class Engine(Recorded):
    kind = "ICudaEngine"

    def __init__(self, module):
        super().__init__(module)
        self.num_io_tensors = len(module.tensors)
        self.device_memory_size_v2 = 4096
        self.num_optimization_profiles = len(module.profiles)

    def get_tensor_name(self, index):
        return list(self._module.tensors)[index]

    def get_tensor_mode(self, name):
        return self._module.tensors[name]

    def get_tensor_location(self, name):
        return self._module.answers.get("get_tensor_location", "device")

    def get_tensor_profile_shape(self, name, profile):
        assert name == "ids"
        return self._module.profiles[profile]

    def create_execution_context(self, how):
        self._module.calls.append((self.kind, "create_execution_context", (how,)))
        return self._module.answers.get("create_execution_context", Context(self._module))

    def create_runtime_config(self):
        return Config(self._module)


class FakeTensorRt:
    """The module. `answers` has what methods return, where that is not True."""

    def __init__(self, is_rtx=False, version="11.4.0.106"):
        self.is_rtx, self.__version__ = is_rtx, version
        self.calls, self.answers = [], {}
        self.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
        self.TensorLocation = SimpleNamespace(DEVICE="device")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
        if is_rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
        self.tensors = {"ids": "input", "lengths": "input", "embedding": "input", "new": "output"}
        self.profiles = [([1, 1], [4, 1], [16, 1]), ([1, 1], [4, 16], [16, 64])]

    class Logger:
        WARNING = "warning"

        def __init__(self, severity):
            self.severity = severity

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, plan):
        self.calls.append(("Runtime", "deserialize_cuda_engine", (plan,)))
        return self.answers.get("deserialize_cuda_engine", Engine(self))

    def names(self):
        """Methods that were called on contexts and caches, in order."""
        return [name for _, name, _ in self.calls]


def install(monkeypatch, **options):
    """Put a fake in the place of NVIDIA's module, and return it."""
    fake = FakeTensorRt(**options)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx" if fake.is_rtx else "tensorrt", fake)
    return fake
