"""Kernels that TensorRT-RTX's compiler makes of a graph, and the bytes that each reads and writes.

The builder needs no GPU, and says the final kernels to a verbose logger. Run in a process of its
own, because two of NVIDIA's libraries do not share one:

    python tests/support/compiled.py GRAPH.onnx batch=1 block=16 context=8192
"""

from __future__ import annotations

import json
import math
import re
import sys

import onnx

from twotower_engines.building.flavours.branches import set_sizes

BYTES = {"BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1}
TENSOR = re.compile(r"Name: ([^,]+?), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")


def compiler_log(model: onnx.ModelProto) -> list[str]:
    """Compile a graph for an RTX GPU; returns the lines that describe kernels and memory."""
    import tensorrt_rtx as trt

    lines: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            lines.extend(message.splitlines())

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    assert builder.build_serialized_network(network, config) is not None, lines[-5:]
    return lines


def tensors(text: str) -> list[tuple[str, list[int], int]]:
    """Name, shape and bytes of each tensor of a kernel."""
    found = []
    for name, dims, dtype in TENSOR.findall(text):
        sizes = [int(dim) for dim in dims.split(",") if dim]
        found.append((name, sizes, math.prod(sizes) * BYTES[dtype]))
    return found


def kernels(lines: list[str]) -> list[dict[str, object]]:
    """Each kernel's name, inputs and outputs."""
    made = []
    for line in lines:
        match = re.match(r"Name: (.*?), LayerType: (\w+)", line)
        if match is not None and match[2] not in ("shape_call", "signal", "wait"):
            head, outputs = line.split("Outputs:", 1)
            inputs = head.split("Constants:")[0].split("Inputs:")[1]
            made.append({"name": match[1], "inputs": tensors(inputs), "outputs": tensors(outputs)})
    return made


if __name__ == "__main__":
    given = dict(one.split("=") for one in sys.argv[2:])
    graph = onnx.load(sys.argv[1])
    set_sizes(graph, {name: int(size) for name, size in given.items()})
    said = compiler_log(graph)
    scratch = [
        int(one[1]) for line in said if (one := re.search(r"Max Scratch Memory: (\d+)", line))
    ]
    json.dump({"kernels": kernels(said), "scratch": scratch[-1]}, sys.stdout)
