"""A tower's graph as a Triton model, with the graph's own inputs and outputs.

So a stock backend serves it: the states are inputs and outputs like any other, and whoever calls
keeps them. `benchmarks.client_loop` calls two such models, `context` and `denoiser`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step_model import ENGINES
from twotower_contract.engine_set import open_engine_set
from twotower_engines.runtime.onnxruntime import OnnxRuntime
from twotower_engines.runtime.opening import open_runtime

CALLS = {"context": "extend", "denoiser": "denoise"}
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32", "tensor(bool)": "TYPE_BOOL"}


def configuration(runtime: OnnxRuntime, tower: str) -> str:
    """Return the config.pbtxt of a tower's model: what its graph declares."""
    session = runtime._bindings[CALLS[tower]].session
    lines = [f'name: "{tower}"', 'backend: "python"', "max_batch_size: 0"]
    lines.append("instance_group [ { kind: KIND_CPU count: 1 } ]")
    for kind, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for value in values:
            dims = [size if isinstance(size, int) else -1 for size in value.shape] or [1]
            lines.append(
                f'{kind} [ {{ name: "{value.name}" data_type: {TYPES[value.type]} dims: {dims} }} ]'
            )
    return "\n".join(lines)


class TritonPythonModel:
    """The model class that Triton loads."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the engines."""
        runtime = open_runtime(open_engine_set(Path(os.environ[ENGINES])), threads=1)
        assert isinstance(runtime, OnnxRuntime)
        self._runtime, self._tower = runtime, arguments["model_name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Do one call for each request, and return what it asks for."""
        import triton_python_backend_utils as triton

        responses = []
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            outputs = self._outputs(*inputs["ids"].shape)
            for name in self._runtime.state_shapes.caches:  # the graph writes behind the context's
                outputs[f"{name}_new"] = inputs[name] = inputs[name].copy()
            self._runtime._run(CALLS[self._tower], inputs, outputs)
            names = request.requested_output_names()
            responses.append(
                triton.InferenceResponse([triton.Tensor(name, outputs[name]) for name in names])
            )
        return responses

    def _outputs(self, rows: int, block: int) -> dict[str, Any]:
        if self._tower == "context":
            shapes = self._runtime.state_shapes
            return shapes.named_mamba(shapes.empty_mamba(rows), "_new")
        return {
            "new_ids": np.empty((rows, block), np.int32),
            "still_masked": np.empty(rows, np.int32),
            "confidence": np.empty((rows, block), np.float32),
        }
