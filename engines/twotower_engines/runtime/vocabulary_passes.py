"""Fewer passes over the logits of a block, [rows, block, vocabulary], on a CPU.

A refinement step reads the logits of masked positions alone: the head computes no others. What the
exported step does to logits is then written in those operators of ONNX Runtime that read them
least: `Where` against a scalar takes five times as long as a copy, and `ArgMax` four times as long
as `ReduceMax`; `Softmax` takes three passes in one.

Whatever the step's nodes are called: they are known by what they read, and a step of another form
is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper

from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime.nodes import Nodes, in_order, only, read_by
from twotower_engines.runtime.pruning import prune

OP = ("twotower", "RefineBlock")

ROWS = "masked_rows"
"""Value: places of the masked positions in the rows as one, int64 [masked, 1]."""

LAST = ("If", "Squeeze")
"""Operators that leave [rows, block] of [rows, block, vocabulary]."""


def refine_masked_rows(
    model: onnx.ModelProto, flag: str, vocabulary: int, mask_id: int
) -> onnx.ModelProto:
    """Write the refinement step out, on the logits of masked positions alone.

    The head, and the part of the step that reads logits, take the masked positions of all rows as
    one row, [1, masked, vocabulary]; what the rest of the step reads of it is put back in place.

    Args:
        model: The denoiser's, with the step as a function.
        flag: Name of an input of the graph, bool [1]: take every position, for whoever reads the
            output `logits`.
        vocabulary: Tokens of the vocabulary.
        mask_id: The mask token.
    """
    call = _only((n for n in model.graph.node if (n.domain, n.op_type) == OP), "RefineBlock node")
    outside = {name for node in model.graph.node if node != call for name in node.output}
    model = onnx.inliner.inline_selected_functions(model, [OP])
    nodes = [n for n in model.graph.node if outside.issuperset(n.output)]
    step = [n for n in model.graph.node if not outside.issuperset(n.output)]
    logits, ids = call.input[:2]
    ordered = in_order(_on_masked_rows(nodes, step, logits, ids, flag, vocabulary, mask_id))
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    # with a name for their number, ONNX Runtime knows results of one size: it writes over them
    rows = helper.make_tensor_value_info(ROWS, TensorProto.INT64, ["masked", 1])
    model.graph.value_info.append(rows)
    return model


def _on_masked_rows(
    nodes: list[onnx.NodeProto],
    step: list[onnx.NodeProto],
    logits: str,
    ids: str,
    flag: str,
    vocabulary: int,
    mask_id: int,
) -> list[onnx.NodeProto]:
    """Return the nodes of a graph, in no order, given those outside and inside of the step."""
    given = _only((n for n in nodes if logits in n.output), "node that shapes the logits")
    head = _only((n for n in nodes if given.input[0] in n.output), "product before the logits")
    is_mask = _only((n for n in step if n.op_type == "Equal" and ids in n.input), "ids == mask")
    masked = _only((n for n in step if is_mask.output[0] in n.input), "use of ids == mask")
    readers = [node for node in step if logits in read_by(node)]
    taken = _only((n for n in readers if n.op_type == "GatherElements"), "logit of a token")
    others = (n for n in readers if n != taken and n.op_type != "Shape")
    cast = _only(others, "node that reads the logits")
    excluded = _only((n for n in step if cast.output[0] in read_by(n)), "use of the logits")
    heavy = _dependents(step, excluded.output[0])
    branches = [node for node in heavy if node.op_type == "If"]
    predicting = _only((n for n in branches if _holds(n, "ArgMax")), "prediction of tokens")
    entropy = _only((n for n in branches if n != predicting), "entropy")
    log_p = _only((n for n in heavy if n.op_type == "Squeeze"), "log probability of tokens")
    kinds = [given.op_type, head.op_type, masked.op_type]
    kinds += [cast.op_type, excluded.op_type]
    if kinds != ["Reshape", "Gemm", "And", "Cast", "Where"]:
        raise _other(f"found {', '.join(kinds)}")

    b = Nodes("masked_rows")
    flat = b.add("Reshape", masked.output[0], b.constant([-1]))
    rows = b.add("Transpose", b.add("NonZero", b.add("Or", flat, flag)), output=ROWS)
    head.input[0] = b.add("GatherND", head.input[0], rows)
    packed = b.add("Unsqueeze", head.output[0], b.constant([0]))
    # The mask token's logits are put aside, and then written over: nobody reads the product after
    # that, so that it is not copied for it.
    aside = b.add("Gather", packed, b.constant([mask_id]), axis=2)
    column = b.add("Expand", b.constant([[[mask_id]]]), b.add("Shape", aside))
    none = b.add("Expand", b.constant(-np.inf, np.float32), b.add("Shape", aside))
    x = b.add("ScatterElements", packed, column, none, output=excluded.output[0], axis=2)
    given.input[0] = b.add("ScatterElements", x, column, aside, axis=2)
    chosen = b.add("Cast", predicting.output[0], to=TensorProto.INT64)
    shares = b.add("Softmax", x, axis=2)
    share = b.add("GatherElements", shares, b.add("Unsqueeze", chosen, b.constant([2])), axis=2)
    b.add("Log", b.add("Squeeze", share, b.constant([2])), output=log_p.output[0])

    rest = [node for node in heavy if node.op_type not in LAST]
    for branch in (attribute.g for attribute in entropy.attribute):
        whole = [*rest, *branch.node]
        del branch.node[:]
        branch.node.extend(whole)
        prune(branch, [value.name for value in branch.output])
    shape = b.add("Shape", masked.output[0])
    for branch in (attribute.g for attribute in predicting.attribute):
        if len(branch.node) > 2:  # it draws
            _noise_in_place(branch, x, rows, shape)
        _replace_argmax(branch, vocabulary)
    for node in readers:
        node.input[:] = [x if name == logits else name for name in node.input]
    written_anew = (*heavy, cast, excluded, taken, *_dependents(step, taken.output[0]))
    light = [node for node in step if node not in written_anew]
    results = [node.output[0] for node in (predicting, entropy, log_p)]
    places = {name: _in_place(b, name, rows, shape) for name in results}
    for node in light:
        node.input[:] = [places.get(name, name) for name in node.input]
    return [*nodes, *light, predicting, entropy, *b.written]


def _other(problem: str) -> RuntimeLoadError:
    return RuntimeLoadError(
        f"the graph's refinement step has another form than this version writes: {problem}; "
        "export and build again"
    )


_only = partial(only, refusal=_other)


def _dependents(nodes: Sequence[onnx.NodeProto], value: str) -> list[onnx.NodeProto]:
    """Return the nodes that a value reaches, up to those that leave [rows, block] of it."""
    reached, values = [], {value}
    for node in nodes:  # sorted
        if values.intersection(read_by(node)):
            reached.append(node)
            if node.op_type not in LAST:
                values.update(node.output)
    return reached


def _holds(node: onnx.NodeProto, op: str) -> bool:
    return any(inner.op_type == op for a in node.attribute for inner in a.g.node)


def _replace_argmax(graph: onnx.GraphProto, vocabulary: int) -> None:
    """Find the piece that has the maximum, then the maximum in it; of equal ones the first.

    The pieces are about as many as a piece has tokens, so that both are few to look through.
    """
    sizes = (size for size in range(2, vocabulary) if vocabulary % size == 0)
    piece = min(sizes, key=lambda size: size + vocabulary // size, default=None)
    if piece is None:
        return
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "ArgMax":
            nodes.append(node)
            continue
        b = Nodes(node.name)
        pieces = b.add("Reshape", node.input[0], b.constant([0, 0, vocabulary // piece, piece]))
        most = b.add("ReduceMax", pieces, b.constant([3]), keepdims=0)
        which = b.add("ArgMax", most, axis=2, keepdims=1)
        found = b.add("GatherND", pieces, which, batch_dims=2)
        inside = b.add("ArgMax", found, axis=2, keepdims=1)
        index = b.add("Add", b.add("Mul", which, b.constant([piece])), inside)
        b.add("Squeeze", index, b.constant([2]), output=node.output[0])
        nodes += b.written
    del graph.node[:]
    graph.node.extend(nodes)


def _in_place(b: Nodes, packed: str, rows: str, shape: str) -> str:
    """Return values of the masked positions, [1, masked, ...], in their places; zeros elsewhere."""
    size = b.add("ReduceProd", shape, b.constant([0]), keepdims=1)
    rest = b.add("Shape", packed, start=2)
    zero = b.add("CastLike", b.constant([0]), packed)
    empty = b.add("Expand", zero, b.add("Concat", size, rest, axis=0))
    flat = b.add("ScatterND", empty, rows, b.add("Squeeze", packed, b.constant([0])))
    return b.add("Reshape", flat, b.add("Concat", shape, rest, axis=0))


def _noise_in_place(graph: onnx.GraphProto, logits: str, rows: str, shape: str) -> None:
    """Draw in a branch as before, with a row for each position: noise knows them."""
    b = Nodes("masked_rows.noise")
    whole = _in_place(b, logits, rows, shape)
    for node in graph.node:
        node.input[:] = [whole if name == logits else name for name in node.input]
    after = Nodes("masked_rows.drawn")
    flat = after.add("Reshape", graph.output[0].name, after.constant([-1]))
    packed = after.add("Unsqueeze", after.add("GatherND", flat, rows), after.constant([0]))
    nodes = [*b.written, *graph.node, *after.written]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output[0].name = packed
