"""A model that serves single calls of the towers, for a loop of generation in its client.

`benchmarks.serving` compares with it: the client holds the ids and decides what comes next, and
each step is a request. The states of a context stay in a slot here, or travel: a request without
a slot brings all of them as one tensor, and an extension returns them so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from twotower_contract.engine_set import open_engine_set
from twotower_engines.runtime.host_states import Slot
from twotower_engines.runtime.interface import DenoiseRow, ExtendRow
from twotower_engines.runtime.onnxruntime import OnnxRuntime
from twotower_engines.runtime.opening import open_runtime

ENGINES = "TWOTOWER_BENCHMARK_ENGINES"
BEGIN, EXTEND, DENOISE = range(3)
"""The first number of a request; then come the slot, tokens of the context where its states travel,
the steps left, the seed, and the ids."""
TRAVELS = -1
"""The slot of a context whose states travel."""

CONFIG = """
name: "steps"
backend: "python"
max_batch_size: 0
instance_group [ { kind: KIND_CPU count: 1 } ]
input [
  { name: "call" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "states" data_type: TYPE_FP32 dims: [ -1 ] optional: true }
]
output [
  { name: "ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "states" data_type: TYPE_FP32 dims: [ -1 ] }
]
"""


class TritonPythonModel:
    """The model class that Triton loads."""

    def initialize(self, _: dict[str, str]) -> None:
        """Load the engines."""
        runtime = open_runtime(open_engine_set(Path(os.environ[ENGINES])), threads=1)
        assert isinstance(runtime, OnnxRuntime)
        self._runtime = runtime

    def execute(self, requests: list[Any]) -> list[Any]:
        """Do one call for each request."""
        import triton_python_backend_utils as triton

        responses = []
        for request in requests:
            call = triton.get_input_tensor_by_name(request, "call").as_numpy().tolist()
            states = triton.get_input_tensor_by_name(request, "states")
            outputs = self._call(None if states is None else states.as_numpy(), *call)
            tensors = [triton.Tensor(name, array) for name, array in outputs.items()]
            responses.append(triton.InferenceResponse(tensors))
        return responses

    def _call(
        self, states: Any, kind: int, slot: int, length: int, steps_left: int, seed: int, *ids: int
    ) -> dict[str, Any]:
        given, travels = np.array(ids, np.int32), slot == TRAVELS
        slot = 0 if travels else slot
        if kind == BEGIN:
            self._runtime.reset(slot)
        elif travels:
            self._runtime._slots[slot] = self._unpacked(states, length)
        if kind == DENOISE:
            row = DenoiseRow(slot, given, threshold=0.9, steps_left=steps_left, seed=seed)
            return {"ids": self._runtime.denoise([row])[0].ids}
        size = self._runtime.limits.max_tokens_per_call
        for start in range(0, len(ids), size):
            self._runtime.extend([ExtendRow(slot, given[start : start + size])])
        context = self._runtime._slots[slot]
        arrays = [*context.mamba.values(), *context.attention.values()] if travels else []
        flat = [array.reshape(-1) for array in arrays]
        return {"ids": given, **({"states": np.concatenate(flat)} if travels else {})}

    def _unpacked(self, states: Any, length: int) -> Slot:
        """Return the context of a request that brought its states: views, and copies of caches."""
        empty = self._runtime._empty_slot()
        fixed = sum(array.size for array in empty.mamba.values())
        token = sum(array[:, :, 0].size for array in empty.attention.values())
        capacity, start = (states.size - fixed) // token, 0
        for arrays in (empty.mamba, empty.attention):
            for name, array in arrays.items():
                shape = list(array.shape)
                if arrays is empty.attention:
                    shape[2] = capacity
                part = states[start : start + int(np.prod(shape))].reshape(shape)
                start += part.size
                arrays[name] = part if arrays is empty.mamba else part.copy()
        empty.length = length
        return empty
