"""Graphs as compilers for GPUs take them best: without conditions, and with narrow masks.

A condition on a GPU waits for the host to read it and to jump, which no CUDA graph can capture. The
exported graphs use conditions to leave out work that a call does not need, and what they compute
where the condition holds is right in either case (`Body.when` of the exporter).

A mask that is the same for all queries of a row is repeated for each of them, because ONNX Runtime
asks for that. A compiler for a GPU would write the repeated mask and read it in each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def gpu_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph in which each `If` is its `then_branch` and no mask is repeated.

    Args:
        model: A bundle's graph; it is not changed.
    """
    import onnx

    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    for body in (flat.graph, *flat.functions):
        nodes = list(body.node)
        del body.node[:]
        for node in nodes:
            body.node.extend(_then(node) if node.op_type == "If" else [node])
        _narrow_masks(body)
    return flat


def set_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Make numbers of named dimensions of a graph's inputs and outputs."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _narrow_masks(body: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Give each attention its mask as it was before an Expand."""
    repeated = {node.output[0]: node for node in body.node if node.op_type == "Expand"}
    for node in body.node:
        if node.op_type == "Attention" and set(node.input[3:4]) & repeated.keys():
            repeat = repeated[node.input[3]]
            node.input[3] = repeat.input[0]
            body.node.remove(repeat)


def _then(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    (branch,) = [attribute.g for attribute in node.attribute if attribute.name == "then_branch"]
    wanted = dict(zip((value.name for value in branch.output), node.output, strict=True))
    for inner in branch.node:
        for place, name in enumerate(inner.output):
            inner.output[place] = wanted.get(name, name)
        for place, name in enumerate(inner.input):
            inner.input[place] = wanted.get(name, name)
    return list(branch.node)
