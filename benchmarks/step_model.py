"""A model that serves single calls of the towers, for a loop of generation in its client.

`benchmarks.serving` compares with it: the client holds the ids and decides what comes next, and
each step is a request. The states of a context stay in a slot here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from twotower_contract.engine_set import open_engine_set
from twotower_engines.runtime.interface import DenoiseRow, ExtendRow
from twotower_engines.runtime.opening import open_runtime

ENGINES = "TWOTOWER_BENCHMARK_ENGINES"
BEGIN, EXTEND, DENOISE = range(3)
"""The first number of a request; then come the slot, the steps left, the seed, and the ids."""

CONFIG = """
name: "steps"
backend: "python"
max_batch_size: 0
instance_group [ { kind: KIND_CPU count: 1 } ]
input [ { name: "call" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "ids" data_type: TYPE_INT32 dims: [ -1 ] } ]
"""


class TritonPythonModel:
    """The model class that Triton loads."""

    def initialize(self, _: dict[str, str]) -> None:
        """Load the engines."""
        self._runtime = open_runtime(open_engine_set(Path(os.environ[ENGINES])), threads=1)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Do one call for each request."""
        import triton_python_backend_utils as triton

        responses = []
        for request in requests:
            call = triton.get_input_tensor_by_name(request, "call").as_numpy()
            ids = triton.Tensor("ids", self._call(call[4:], *call[:4].tolist()))
            responses.append(triton.InferenceResponse([ids]))
        return responses

    def _call(self, ids: Any, kind: int, slot: int, steps_left: int, seed: int) -> Any:
        if kind == DENOISE:
            row = DenoiseRow(slot, ids, threshold=0.9, steps_left=steps_left, seed=seed)
            return self._runtime.denoise([row])[0].ids
        if kind == BEGIN:
            self._runtime.reset(slot)
        size = self._runtime.limits.max_tokens_per_call
        for start in range(0, len(ids), size):
            self._runtime.extend([ExtendRow(slot, ids[start : start + size])])
        return ids
