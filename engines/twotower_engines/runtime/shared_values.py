"""Values that every layer of a graph computes anew, and that can be computed once.

A call of few tokens is made of a thousand small nodes: what they compute takes less time than
starting them.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from twotower_engines.runtime.nodes import MICROSOFT, Nodes

MODULATION = ("twotower", "Modulation")


def replace_modulations(graph: onnx.GraphProto) -> None:
    """Compute shift, scale and gate of all layers at once, in the place of a node for each."""
    calls = [node for node in graph.node if (node.domain, node.op_type) == MODULATION]
    if not calls:
        return
    b = Nodes("modulation")
    embedding, _, conditioned = calls[0].input
    first = b.constant([0, 1])
    tables = [b.add("Unsqueeze", node.input[1], first) for node in calls]
    table = b.add("Concat", *tables, axis=1)  # [1, layers, 3, hidden]
    both = b.add("Add", b.add("Unsqueeze", embedding, b.constant([1])), table)
    flags = b.add("Unsqueeze", conditioned, b.constant([1, 2, 3]))
    on = b.add("Greater", flags, b.constant(0, np.int32))
    neutral, one = np.array([[0, 0, 1], [0, 1, 0]], np.float32).reshape(2, 1, 1, 3, 1)
    chosen = b.add("Where", on, both, b.constant(neutral, np.float32))
    parts = b.add("Add", chosen, b.constant(one, np.float32))  # the scale is 1 + scale
    count = 3 * len(calls)
    flat = b.add("Reshape", parts, b.constant([0, count, -1]))
    outputs = [node.output for node in calls]
    names = [name for scale, shift, gate in outputs for name in (shift, scale, gate)]
    sizes = b.constant(np.ones(count))
    b.add("Split", flat, sizes, output=names[0], others=names[1:], axis=1)
    start = list(graph.node).index(calls[0])
    nodes = [*graph.node[:start], *b.written, *(n for n in graph.node[start:] if n not in calls)]
    del graph.node[:]
    graph.node.extend(nodes)


ROW_WISE = {
    *(("", op) for op in ("Add", "Mul", "RMSNormalization", "Split")),
    *((MICROSOFT, op) for op in ("QuickGelu", "CausalConvWithState", "LinearAttention")),
}
"""Operators whose results have the rows and tokens of what they read."""


def share_shapes(graph: onnx.GraphProto, ids: str) -> None:
    """Ask one value for each size, so that ONNX Runtime finds what follows from it computed.

    Args:
        graph: A graph without functions, in which a value that begins with rows and tokens has
            been gathered by `ids` or follows from such values.
        ids: The input of tokens, [rows, tokens].
    """
    ranks: dict[str, int] = {}  # of values that begin with rows and tokens
    shapes: dict[str, int] = {}  # shapes that do, to their rank
    kept: dict[str, int] = {}  # those that keep the first two sizes of what they are given to
    inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    places = [(name, axis) for name, sizes in inputs.items() for axis in range(len(sizes))]
    first = {inputs[name][axis].dim_param: (name, axis) for name, axis in reversed(places)}
    for node in graph.node:
        source, output = (node.input[0] if node.input else ""), node.output[0]
        known = [ranks[name] for name in node.input if name in ranks]
        if node.op_type == "Shape":
            given = {attribute.name: attribute.i for attribute in node.attribute}
            start, end = given.get("start", 0), given.get("end", 0)
            if known and end == 0 == start:
                shapes[output] = known[0]
            elif known and (end in (1, 2) or (end, known[0]) == (-1, 3)):
                if end != 1 and start == 0:
                    shapes[output] = end = 2
                _ask(node, ids, start, end)
            elif source in inputs and end == start + 1 and inputs[source][start].dim_param:
                name, axis = first[inputs[source][start].dim_param]
                _ask(node, name, axis, axis + 1)
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            values = numpy_helper.to_array(node.attribute[0].t)
            if values.ndim == 1 and len(values) > 2 and not values[:2].any():
                kept[output] = len(values)
        elif node.op_type == "Gather" and node.input[1] == ids:
            ranks[output] = 3
        elif node.op_type == "Concat" and source in shapes:
            shapes[output] = shapes[source] + len(node.input) - 1
        elif node.op_type == "Reshape":
            target = node.input[1]
            if target in shapes or (known and target in kept):
                ranks[output] = shapes.get(target) or kept[target]
        elif (node.domain, node.op_type) in ROW_WISE and known:
            names = node.output if node.op_type == "Split" else [output]
            ranks |= dict.fromkeys(names, max(known))


def _ask(node: onnx.NodeProto, name: str, start: int, end: int) -> None:
    ends = [name], node.output, node.name
    node.CopyFrom(helper.make_node("Shape", *ends, start=start, end=end))
