"""Graphs as compilers for GPUs take them best: without conditions, and with narrow masks.

A condition on a GPU waits for the host to read it and to jump, which no CUDA graph can capture. The
exported graphs use conditions to leave out work that a call does not need. In the bodies of ops,
lists of rows take their place (`refine_rows.py`). Beside our kernels, what is computed where a
condition holds takes its place, which is right in either case (`Body.when` of the exporter).

A mask that is the same for all queries of a row is repeated for each of them, because ONNX Runtime
asks for that. A compiler for a GPU would write the repeated mask and read it in each layer.

For some GPUs the compiler copies a cache once for each query head that reads it: there attention
reads keys as [context, rows * heads, size], and a cache that is an input is laid out otherwise. Two
forms let it copy a cache once. Where the tokens of a row share a mask, the heads of a group become
queries of one head. Where each token has its own, that would repeat masks for all heads: there keys
and values become sums with zero, which a kernel writes as attention reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from twotower_engines.planning.compiled import COPYING

if TYPE_CHECKING:
    import onnx


def gpu_graph(
    model: onnx.ModelProto, capabilities: Collection[str] = (), *, has_kernels: bool = False
) -> onnx.ModelProto:
    """Return a graph without conditions, in which no mask is repeated.

    Args:
        model: A bundle's graph; it is not changed.
        capabilities: Compute capabilities of the GPUs that the engine is for.
        has_kernels: Whether our kernels take the place of the ops' bodies. Then no list of rows is
            an input, and each `If` of a body is its `then_branch`.
    """
    import onnx

    from twotower_engines.building.flavours.refine_rows import list_rows

    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    if not has_kernels:
        list_rows(flat)
    for body in (flat.graph, *flat.functions):
        nodes = list(body.node)
        del body.node[:]
        for node in nodes:
            body.node.extend(_then(node) if node.op_type == "If" else [node])
        _narrow_masks(body)
        if capabilities and COPYING.issuperset(capabilities):
            _copy_caches_once(body, flat.graph)
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


def _copy_caches_once(body: onnx.GraphProto | onnx.FunctionProto, graph: onnx.GraphProto) -> None:
    """Keep the compiler from a copy of the caches for each query head."""
    nodes = list(body.node)
    del body.node[:]
    for node in nodes:
        if node.op_type != "Attention":
            body.node.append(node)
        elif body.name == "CausalAttention":  # each token has a mask of its own
            body.node.extend(_on_copies(node))
        else:
            body.node.extend(_folded(node, graph))


def _on_copies(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return an attention to keys and values that zero was added to, and the addition.

    The zero is the least of a row's length and 0: a compiler cannot know it.
    """
    from onnx import TensorProto, helper

    before: list[onnx.NodeProto] = []

    def made(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{node.name}.{op.lower()}_{len(before)}"
        before.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    nothing = made("Constant", value=helper.make_tensor("zero", TensorProto.INT32, [], [0]))
    zero = made("CastLike", made("Min", "context_lengths", nothing), node.input[1])
    zero = made("Unsqueeze", zero, made("Constant", value_ints=[1, 2, 3]))
    node.input[1:3] = [made("Add", cache, zero) for cache in node.input[1:3]]
    return [*before, node]


def _folded(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return an attention whose queries are those of all heads that share a head of keys.

    One head's queries stand after another's. What comes before and after it is returned too.
    """
    from onnx import helper

    _, heads, *_ = _sizes(graph.output, ".queries")
    _, shared, _, width = _sizes(graph.input, ".k_cache")

    def resized(x: str, sizes: list[int], made: str) -> list[onnx.NodeProto]:
        constant = helper.make_node("Constant", [], [f"{made}.sizes"], value_ints=sizes)
        constant.name = constant.output[0]
        name = f"{made}.reshape"
        return [constant, helper.make_node("Reshape", [x, constant.name], [made], name)]

    queries, y = f"{node.name}.queries", node.output[0]
    before = resized(node.input[0], [0, shared, -1, width], queries)
    node.input[0] = queries
    node.output[0] = f"{node.name}.of_heads"
    return [*before, node, *resized(node.output[0], [0, heads, -1, width], y)]


def _sizes(values: Iterable[onnx.ValueInfoProto], ending: str) -> list[int]:
    """Return the sizes of the first value whose name has an ending."""
    value = next(one for one in values if one.name.endswith(ending))
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _then(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    (branch,) = [attribute.g for attribute in node.attribute if attribute.name == "then_branch"]
    wanted = dict(zip((value.name for value in branch.output), node.output, strict=True))
    for inner in branch.node:
        for place, name in enumerate(inner.output):
            inner.output[place] = wanted.get(name, name)
        for place, name in enumerate(inner.input):
            inner.input[place] = wanted.get(name, name)
    return list(branch.node)
