"""Fewer passes over the logits of a block, [rows, block, vocabulary], on a CPU.

Two operators of the refinement step take most of its time in ONNX Runtime: `Where` against a scalar
takes five times as long as a copy, `ArgMax` four times as long as `ReduceMax`. Both are written in
other operators here, which give the same values.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from twotower_engines.runtime.nodes import Nodes, in_order

MASKED_OUT = "RefineBlock/logits.where"
"""Begin of the name of the node that gives the mask token the logit -inf."""

HEAD = "denoiser/head.gemm"
MASKED = "RefineBlock/masked.and"
"""The node that says which positions are masked, and inside their row."""

HEAVY = ("RefineBlock/logits.", "RefineBlock/predict.", "RefineBlock/statistics.")
"""Begins of the names of the nodes that read logits, or what is made of them alone."""

DRAWN = "RefineBlock/predict.if"
"""The branches that predict tokens, with noise or without."""

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


def only_masked_rows(graph: onnx.GraphProto, flag: str) -> None:
    """Compute the logits of masked positions alone: a refinement step reads no others.

    The head, and the part of the step that reads logits, take the masked positions of all rows as
    one row, [1, masked, vocabulary]; what the rest of the step reads of it is put back in place.

    Args:
        graph: The denoiser's, without functions; it is changed.
        flag: Name of an input of the graph, bool [1]: take every position, for whoever reads the
            output `logits`.
    """
    nodes = list(graph.node)
    gemm = next(node for node in nodes if node.name == HEAD)
    masked = next(node.output[0] for node in nodes if node.name.startswith(MASKED))
    b = Nodes("masked_rows")
    flat = b.add("Reshape", masked, b.constant([-1]))
    indices = b.add("NonZero", b.add("Or", flat, flag))
    rows = b.add("Transpose", indices, perm=[1, 0])
    gemm.input[0] = b.add("GatherND", gemm.input[0], rows)
    packed = b.add("Unsqueeze", gemm.output[0], b.constant([0]))
    heavy = [node for node in nodes if node.name.startswith(HEAVY)]
    light = [node for node in nodes if node.name.startswith("RefineBlock/") and node not in heavy]
    results = {name for node in heavy for name in node.output}
    places: dict[str, str] = {}
    for name in dict.fromkeys(name for node in light for name in node.input if name in results):
        places[name] = _in_place(b, name, rows, b.add("Shape", masked))
    for node in light:
        node.input[:] = [places.get(name, name) for name in node.input]
    for node in heavy:
        node.input[:] = [packed if name == "logits" else name for name in node.input]
        if node.name.startswith(DRAWN):
            excluded = next(n.output[0] for n in heavy if n.name.startswith(MASKED_OUT))
            _noise_in_place(node.attribute, excluded, rows, masked)
    ordered = in_order([*nodes, *b.written])
    del graph.node[:]
    graph.node.extend(ordered)


def _in_place(b: Nodes, packed: str, rows: str, shape: str) -> str:
    """Return values of the masked positions, [1, masked, ...], in their places; zeros elsewhere."""
    size = b.add("ReduceProd", b.add("Slice", shape, b.constant([0]), b.constant([2])), keepdims=1)
    rest = b.add("Shape", packed, start=2)
    zero = b.add("CastLike", b.constant([0]), packed)
    empty = b.add("Expand", zero, b.add("Concat", size, rest, axis=0))
    flat = b.add("ScatterND", empty, rows, b.add("Squeeze", packed, b.constant([0])))
    return b.add("Reshape", flat, b.add("Concat", shape, rest, axis=0))


def _noise_in_place(
    branches: Iterable[onnx.AttributeProto], excluded: str, rows: str, masked: str
) -> None:
    """Draw in the branch that draws as before, with a row for each position: noise knows them."""
    for branch in branches:
        graph = branch.g
        if len(graph.node) < 4:  # the branch that takes a maximum alone
            continue
        b = Nodes("masked_rows.noise")
        whole = _in_place(b, excluded, rows, b.add("Shape", masked))
        for node in graph.node:
            node.input[:] = [whole if name == excluded else name for name in node.input]
        drawn = graph.output[0].name
        after = Nodes("masked_rows.drawn")
        flat = after.add("Reshape", drawn, after.constant([-1]))
        packed = after.add("Unsqueeze", after.add("GatherND", flat, rows), after.constant([0]))
        nodes = [*b.written, *graph.node, *after.written]
        del graph.node[:]
        graph.node.extend(nodes)
        graph.output[0].name = packed
