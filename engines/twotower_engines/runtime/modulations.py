"""The modulation of all layers at once, in place of a node for each.

A call of few tokens is made of a thousand small nodes: what they compute takes less time than
starting them.
"""

from __future__ import annotations

import numpy as np
import onnx

from twotower_engines.runtime.nodes import Nodes

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
