"""A model that serves single calls of the towers, for a loop of generation in its client.

`benchmarks.serving` compares with it: the client holds the ids and decides what comes next, and
each step is a request.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

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

        return [
            triton.InferenceResponse(
                [triton.Tensor("ids", self._call(triton.get_input_tensor_by_name(one, "call")))]
            )
            for one in requests
        ]

    def _call(self, tensor: Any) -> Any:
        kind, slot, steps_left, seed, *ids = tensor.as_numpy().tolist()
        given = np.array(ids, np.int32)
        if kind == DENOISE:
            row = DenoiseRow(slot, given, threshold=0.9, steps_left=steps_left, seed=seed)
            return self._runtime.denoise([row])[0].ids
        if kind == BEGIN:
            self._runtime.reset(slot)
        size = self._runtime.limits.max_tokens_per_call
        for start in range(0, len(ids), size):
            self._runtime.extend([ExtendRow(slot, given[start : start + size])])
        return given
