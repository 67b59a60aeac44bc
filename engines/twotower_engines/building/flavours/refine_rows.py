"""A denoiser that draws noise and computes entropy and logits for listed rows alone.

The exported refinement step leaves out noise and entropy by conditions, which no CUDA graph can
capture. Here each of them gets an input of row numbers instead, whose length a call decides: what
a condition guards is computed for those rows, and put over what all rows have without it. A kernel
over no rows has nothing to do. The output `logits` has the rows of a third list.

What all rows have is written such that the compiler reads the logits as they are. It would write
the masked logits in float32, because it looks for the largest in a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper

from twotower_contract.layout import ROW_LISTS
from twotower_engines.errors import BuildError
from twotower_engines.runtime.nodes import Nodes, in_order, only

OP = "RefineBlock"
SAMPLED, ENTROPY, LOGITS = ROW_LISTS
NO_TOKEN = np.iinfo(np.int32).max
ACROSS = ("ArgMax", "GatherElements", "ReduceMax", "ReduceSum", "Shape")
"""Operators whose results have no element for each token of the vocabulary."""


def list_rows(model: onnx.ModelProto) -> None:
    """Let a denoiser's graph take lists of the rows that draw noise, want entropy or show logits.

    Args:
        model: A graph; one without a refinement step stays as it is.

    Raises:
        BuildError: The refinement step has another form than this version writes.
    """
    graph = model.graph
    call = next((one for one in graph.node if one.op_type == OP), None)
    if call is None:
        return
    output = next((one for one in graph.output if one.name == "logits"), None)
    if output is not None:
        _list_logits(graph, output)
    body = next(one for one in model.functions if one.name == OP)
    _refine_rows(body)
    for name in (SAMPLED, ENTROPY):
        call.input.append(name)
        body.input.append(name)
        _add_input(graph, name)


def _list_logits(graph: onnx.GraphProto, output: onnx.ValueInfoProto) -> None:
    """Let the output `logits` of a graph have the rows of a list."""
    whole = "logits_of_all_rows"
    for node in graph.node:
        node.input[:] = [whole if name == "logits" else name for name in node.input]
        node.output[:] = [whole if name == "logits" else name for name in node.output]
    b = Nodes(LOGITS)
    b.add("Gather", whole, LOGITS, output="logits", axis=0)
    graph.node.extend(b.written)
    output.type.tensor_type.shape.dim[0].dim_param = ROW_LISTS[LOGITS]
    _add_input(graph, LOGITS)


def _add_input(graph: onnx.GraphProto, name: str) -> None:
    graph.input.append(
        helper.make_tensor_value_info(name, TensorProto.INT32, [ROW_LISTS[name]], "Row numbers.")
    )


def _refine_rows(body: onnx.FunctionProto) -> None:
    """Write each condition of the step as what all rows have, and then what some have."""
    makers = {name: node for node in body.node for name in node.output}
    conditions = [node for node in body.node if node.op_type == "If"]
    plain = [node for one in conditions for node in _branch(one, "else")]
    search = _only((n for n in plain if n.op_type == "ArgMax"), "search for the likeliest token")
    masked = _made(makers, search.input[0], "Where")
    given = _made(makers, masked.input[2], "Cast").input[0]  # as the head made them
    largest = (n for n in body.node if n.op_type == "ReduceMax" and masked.output[0] in n.input)
    top = _only(largest, "largest logit")
    is_mask = _made(makers, masked.input[0], "Equal")
    written = [node for node in body.node if node not in (*conditions, top)]
    written += _likeliest(is_mask, masked, given, top, search)
    wide = _reached(body.node, {given}, without=ACROSS)
    of_rows = _reached(body.node, set(body.input), without=("Shape",))
    for condition in conditions:
        rows = SAMPLED if search in _branch(condition, "else") else ENTROPY
        written += (node for node in _branch(condition, "else") if node != search)
        written += _on_rows(condition, rows, makers, wide, of_rows)
    ordered = in_order(written)
    del body.node[:]
    body.node.extend(ordered)


def _likeliest(
    is_mask: onnx.NodeProto,
    masked: onnx.NodeProto,
    given: str,
    top: onnx.NodeProto,
    search: onnx.NodeProto,
) -> list[onnx.NodeProto]:
    """Return nodes that find the largest logit, and the first token that has it, in no float32.

    Where a logit is NaN, the token is the mask token, which has no probability: the row fails.
    """
    vocabulary, mask_id = is_mask.input
    excluded, none = masked.input[:2]
    axes = top.input[1]
    b = Nodes("likeliest")
    narrow = b.add("Where", excluded, b.add("CastLike", none, given), given)
    most = b.add("ReduceMax", narrow, axes, keepdims=1)
    b.add("Cast", most, output=top.output[0], to=TensorProto.FLOAT)
    found = b.add("And", b.add("Equal", given, most), b.add("Not", excluded))
    no_token = b.constant(NO_TOKEN, np.int32)
    first = b.add("ReduceMin", b.add("Where", found, vocabulary, no_token), axes, keepdims=0)
    is_found = b.add("Less", first, no_token)
    b.add("Where", is_found, first, mask_id, output=search.output[0])
    return b.written


def _on_rows(
    condition: onnx.NodeProto,
    rows: str,
    makers: Mapping[str, onnx.NodeProto],
    wide: set[str],
    of_rows: set[str],
) -> list[onnx.NodeProto]:
    """Return the nodes of a condition's branch on listed rows, and those that put them in place.

    Args:
        condition: The `If`; its other branch stands beside these nodes.
        rows: Input that lists the rows.
        makers: Value to the node that makes it.
        wide: Values with an element for each token: made anew of the rows' logits, in the kernel
            that needs them.
        of_rows: Values with a row for each of the call's, of which the listed ones are taken.
    """
    b = Nodes(rows)
    then = _branch(condition, "then")
    names: dict[str, str] = {name: name for node in then for name in node.output}

    def name_of(value: str) -> str:
        if value not in names:
            names[value] = value
            if value in wide and value in makers:
                names[value] = f"{rows}.{value}"
                write(makers[value])
            elif value in of_rows:
                names[value] = b.add("Gather", value, rows, axis=0)
        return names[value]

    def write(node: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [name_of(value) for value in node.input]
        copy.output[:] = [names[value] for value in node.output]
        copy.name = copy.output[0]
        b.written.append(copy)

    for node in then:
        write(node)
    places = b.add("Cast", b.add("Unsqueeze", rows, b.constant([1])), to=TensorProto.INT64)
    whole, some = (_graph(condition, name).output[0].name for name in ("else", "then"))
    b.add("ScatterND", whole, places, some, output=condition.output[0])
    return b.written


def _reached(nodes: Iterable[onnx.NodeProto], values: set[str], without: Iterable[str]) -> set[str]:
    """Return values, and all that operators but some make of them."""
    reached = set(values)
    for node in nodes:  # sorted
        if node.op_type not in without and reached.intersection(node.input):
            reached.update(node.output)
    return reached


def _branch(condition: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
    """Return the nodes of the branch `then` or `else`."""
    return list(_graph(condition, name).node)


def _graph(condition: onnx.NodeProto, name: str) -> onnx.GraphProto:
    branch: onnx.GraphProto
    (branch,) = (one.g for one in condition.attribute if one.name == f"{name}_branch")
    return branch


def _made(makers: Mapping[str, onnx.NodeProto], value: str, op: str) -> onnx.NodeProto:
    """Return the node that makes a value; refuse a graph that has another operator there."""
    node = makers.get(value)
    if node is None or node.op_type != op:
        raise _other(f"{value} is not the result of {op}")
    return node


def _other(problem: str) -> BuildError:
    return BuildError(
        f"the graph's refinement step has another form than this version writes: {problem}; "
        "export the checkpoint again"
    )


_only = partial(only, refusal=_other)
