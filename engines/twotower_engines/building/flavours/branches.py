"""Graphs as compilers for GPUs take them best: without conditions, and with narrow masks.

A condition on a GPU waits for the host to read it and to jump, which no CUDA graph can capture. The
exported graphs use conditions to leave out work that a call does not need, and what they compute
where the condition holds is right in either case (`Body.when` of the exporter).

A mask that is the same for all queries of a row is repeated for each of them, because ONNX Runtime
asks for that. A compiler for a GPU would write the repeated mask and read it in each layer.

For some GPUs the compiler copies a cache once for each query head that reads it. There the heads of
a group become queries of one head: a cache is then copied once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


COPYING = frozenset({"8.0", "8.6"})
"""Compute capabilities for which the compiler copies caches for each query head."""


def gpu_graph(model: onnx.ModelProto, capabilities: Collection[str] = ()) -> onnx.ModelProto:
    """Return a graph in which each `If` is its `then_branch` and no mask is repeated.

    Args:
        model: A bundle's graph; it is not changed.
        capabilities: Compute capabilities of the GPUs that the engine is for.
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
        if capabilities and COPYING.issuperset(capabilities):
            _fold_heads(body, flat.graph)
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


def _fold_heads(body: onnx.GraphProto | onnx.FunctionProto, graph: onnx.GraphProto) -> None:
    """Make the query heads that share a head of keys its queries, one head's after another's."""
    from onnx import helper

    heads = _sizes(graph.output, ".queries")[1:2]
    nodes = list(body.node)
    del body.node[:]
    for node in nodes:
        if node.op_type != "Attention":
            body.node.append(node)
            continue
        _, shared, _, width = _sizes(graph.input, ".k_cache")
        stem, queries, y = node.name, node.input[0], node.output[0]

        def constant(name: str, values: list[int], stem: str = stem) -> str:
            made = f"{stem}.{name}"
            body.node.append(helper.make_node("Constant", [], [made], made, value_ints=values))
            return made

        def add(op: str, x: str, by: str, output: str, stem: str = stem) -> str:
            body.node.append(
                helper.make_node(op, [x, by], [output], f"{stem}.{op.lower()}.{output}")
            )
            return output

        node.input[0] = add(
            "Reshape", queries, constant("folded", [0, shared, -1, width]), f"{stem}.queries"
        )
        if body.name == "CausalAttention":  # each token has a mask of its own
            times = constant("times", [1, 1, heads[0] // shared, 1])
            node.input[3] = add("Tile", node.input[3], times, f"{stem}.mask")
        node.output[0] = f"{stem}.of_heads"
        body.node.append(node)
        add("Reshape", node.output[0], constant("apart", [0, heads[0], -1, width]), y)


def _sizes(values: Iterable[onnx.ValueInfoProto], ending: str) -> list[int]:
    """Return the sizes of the first value whose name has an ending; none where there is none."""
    for value in values:
        if value.name.endswith(ending):
            return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return []


def _then(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    (branch,) = [attribute.g for attribute in node.attribute if attribute.name == "then_branch"]
    wanted = dict(zip((value.name for value in branch.output), node.output, strict=True))
    for inner in branch.node:
        for place, name in enumerate(inner.output):
            inner.output[place] = wanted.get(name, name)
        for place, name in enumerate(inner.input):
            inner.input[place] = wanted.get(name, name)
    return list(branch.node)
