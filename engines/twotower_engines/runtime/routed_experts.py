"""The experts of a graph for a CPU: only those that the tokens chose are computed.

The exported graph has one node `twotower::SparseExperts` per layer, whose function body computes
every expert on every token: a GPU's plugin takes its place. Here nodes of ordinary operators do. An
expert is two products with its own two matrices, which ONNX Runtime packs when it loads them (it
packs no bank of three dimensions), on the tokens that chose it.

A token's result is summed in the order of its choices, and is the same alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from twotower_engines.runtime.nodes import Nodes

Array = npt.NDArray[Any]

Parts = Callable[[Array], Mapping[str, Array]]
"""From a bank of experts to the matrices that take its place, by name."""

OP = ("twotower", "SparseExperts")


def replace_experts(graph: onnx.GraphProto) -> dict[str, Parts]:
    """Put ordinary nodes in the place of every `SparseExperts`, and matrices in that of its banks.

    Args:
        graph: A graph without other functions of ours, whose weights are inputs; it is changed.

    Returns:
        Name of each bank, which is no input any more, to what the new inputs are made of.
    """
    shapes = {
        value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in graph.input
    }
    nodes: list[onnx.NodeProto] = []
    parts: dict[str, Parts] = {}
    inputs: dict[str, tuple[int, ...]] = {}
    for node in graph.node:
        if (node.domain, node.op_type) != OP:
            nodes.append(node)
            continue
        up, down = node.input[-2:]
        count, inner, hidden = shapes[up]
        for expert in range(count):
            inputs |= {_one(up, expert): (inner, hidden), _one(down, expert): (hidden, inner)}
        parts |= {bank: _each_of(bank) for bank in (up, down)}
        nodes += _chosen_experts(node, count)
    kept = [value for value in graph.input if value.name not in parts]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend([*kept, *made])
    return parts


def parts_of(parts: Mapping[str, Parts], name: str, array: Array) -> Iterable[tuple[str, Array]]:
    """Return (name, array) of what takes a weight's place; itself where nothing does."""
    return parts[name](array).items() if name in parts else [(name, array)]


def _one(bank: str, expert: int) -> str:
    """Return the name of one expert's matrix."""
    return f"{bank}.{expert}"


def _each_of(bank: str) -> Parts:
    return lambda array: {_one(bank, expert): array[expert] for expert in range(len(array))}


def _chosen_experts(node: onnx.NodeProto, count: int) -> list[onnx.NodeProto]:
    """Sort the chosen (token, expert) pairs by expert, and give each expert its own tokens.

    An expert that no token chose has products of no rows, which read no weight.
    """
    x, indices, weights, shared, hidden, gate, up, down = node.input
    b = Nodes(node.name)
    tokens = b.add("Flatten", x, axis=-1)
    chosen = b.add("Reshape", indices, b.constant([-1]))
    pairs = b.add("Shape", chosen)
    # By expert, and of one expert by token; padding, -1, comes first. A sort takes longer.
    is_of = b.add("Equal", b.constant(np.arange(-1, count)[:, None], np.int32), chosen)
    order = b.add("Gather", b.add("NonZero", is_of), b.constant(1))
    each = b.add("ConstantOfShape", pairs, value=numpy_helper.from_array(np.ones(1, np.int64)))
    place = b.add("Add", b.add("Cast", chosen, to=TensorProto.INT64), b.constant([1]))
    none = b.constant(np.zeros(count + 1))
    counts = b.add("ScatterElements", none, place, each, reduction="add")
    token = b.add("Div", order, b.add("Shape", indices, start=1))
    apart = b.split(b.add("Gather", tokens, token), count + 1, counts)
    results = [b.add("ConstantOfShape", b.add("Shape", apart[0]))]
    for expert, own in enumerate(apart[1:]):
        inner = b.add("Relu", b.add("Gemm", own, _one(up, expert), transB=1))
        squared = b.add("Mul", inner, inner)
        results.append(b.add("Gemm", squared, _one(down, expert), transB=1))
    numbers = b.add("Range", b.constant(0), b.add("Squeeze", pairs), b.constant(1))
    back = b.add("ScatterElements", order, order, numbers)
    by_token = b.add("Reshape", back, b.add("Shape", indices))
    y = b.add("Gather", b.add("Concat", *results, axis=0), by_token)  # [tokens, chosen, hidden]
    one = b.constant([1])
    total = b.add("MatMul", b.add("Unsqueeze", weights, one), y)
    y = b.add("Add", b.add("Squeeze", total, one), shared)
    if any(given.name == "gated" and given.i for given in node.attribute):
        by_row = b.add("Reshape", y, b.add("Shape", x))
        y = b.add("Flatten", b.add("Mul", gate, by_row), axis=-1)
    b.add("Add", hidden, y, output=node.output[0])
    return b.written
