"""Fewer passes over the logits of a block, [rows, block, vocabulary], on a CPU.

Two operators of the refinement step take most of its time in ONNX Runtime: `Where` against a scalar
takes five times as long as a copy, `ArgMax` four times as long as `ReduceMax`. Both are written in
other operators here, which give the same values.
"""

from __future__ import annotations

import onnx

from twotower_engines.runtime.nodes import Nodes

MASKED_OUT = "RefineBlock/logits.where"
"""Begin of the name of the node that gives the mask token the logit -inf."""

PIECE = 512
"""Most tokens in which a maximum is looked for a second time."""


def spare_passes(graph: onnx.GraphProto, vocabulary: int, mask_id: int) -> None:
    """Replace the two operators, in branches too.

    Args:
        graph: The denoiser's, without functions; it is changed.
        vocabulary: Tokens of the vocabulary.
        mask_id: The mask token.
    """
    piece = max(size for size in range(1, PIECE + 1) if vocabulary % size == 0)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name.startswith(MASKED_OUT):
            nodes += _without_mask(node, mask_id)
        elif node.op_type == "ArgMax" and 1 < piece < vocabulary:
            nodes += _argmax(node, vocabulary, piece)
        else:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    spare_passes(attribute.g, vocabulary, mask_id)
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _without_mask(node: onnx.NodeProto, mask_id: int) -> list[onnx.NodeProto]:
    """Write -inf to one column of the logits, which are the last input."""
    b = Nodes(node.name)
    _, excluded, logits = node.input
    rows = b.add("Shape", logits, end=2)
    column = b.add("Concat", rows, b.constant([1]), axis=0)
    place = b.add("Expand", b.constant([[[mask_id]]]), column)
    value = b.add("Expand", excluded, column)
    b.add("ScatterElements", logits, place, value, output=node.output[0], axis=2)
    return b.written


def _argmax(node: onnx.NodeProto, vocabulary: int, piece: int) -> list[onnx.NodeProto]:
    """Find the piece that has the maximum, then the maximum in it; of equal ones the first."""
    b = Nodes(node.name)
    pieces = b.add("Reshape", node.input[0], b.constant([0, 0, vocabulary // piece, piece]))
    most = b.add("ReduceMax", pieces, b.constant([3]), keepdims=0)
    which = b.add("ArgMax", most, axis=2, keepdims=1)
    inside = b.add("ArgMax", b.add("GatherND", pieces, which, batch_dims=2), axis=2, keepdims=1)
    index = b.add("Add", b.add("Mul", which, b.constant([piece])), inside)
    b.add("Squeeze", index, b.constant([2]), output=node.output[0])
    return b.written
