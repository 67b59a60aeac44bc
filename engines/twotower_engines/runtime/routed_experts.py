"""The experts of a graph for a CPU: only those that the tokens chose are computed.

The exported graph has one node `twotower::SparseExperts` per layer, whose function body computes
every expert on every token: a GPU's plugin takes its place. Here nodes of ordinary operators do. An
expert is two products with its own two matrices, which ONNX Runtime packs when it loads them (it
packs no bank of three dimensions), on the tokens that chose it. A small expert costs less than the
sorting of its tokens: those are all computed, as two products.

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

ROUTED_FROM = 2**13
"""Least inner size x hidden size of an expert with products of its own. Both forms take the same
time where 16 tokens choose 2 of 8 or 6 of 128 experts of 5,000 to 10,000 (one core of a Xeon with
AVX-512)."""


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
        b = Nodes(node.name)
        count, inner, hidden = shapes[up]
        if inner * hidden < ROUTED_FROM:
            inputs |= {up: (count * inner, hidden), down: (hidden, count * inner)}
            parts |= {up: _rows_of(up), down: _columns_of(down)}
            _add_rest(b, node, _all_experts(b, node, count, inner))
        else:
            for expert in range(count):
                inputs |= {_one(up, expert): (inner, hidden), _one(down, expert): (hidden, inner)}
            parts |= {bank: _each_of(bank) for bank in (up, down)}
            _add_rest(b, node, _chosen_experts(b, node, count))
        nodes += b.written
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


def _rows_of(bank: str) -> Parts:
    return lambda array: {bank: array.reshape(-1, array.shape[2])}


def _columns_of(bank: str) -> Parts:
    return lambda array: {
        bank: np.ascontiguousarray(array.transpose(1, 0, 2)).reshape(array.shape[1], -1)
    }


def _shares(b: Nodes, indices: str, weights: str, count: int) -> str:
    """Return each expert's weight in each token, 0 where it was not chosen; [tokens, experts]."""
    last = b.constant([2])
    every = b.constant(np.arange(count).reshape(1, 1, -1), np.int32)
    routed = b.add("Equal", b.add("Unsqueeze", indices, last), every)
    weighted = b.add(
        "Mul", b.add("Cast", routed, to=TensorProto.FLOAT), b.add("Unsqueeze", weights, last)
    )
    return b.add("ReduceSum", weighted, b.constant([1]), keepdims=0)


def _squared(b: Nodes, x: str, up: str) -> str:
    """Return relu(x up^T)^2."""
    inner = b.add("Relu", b.add("Gemm", x, up, transB=1))
    return b.add("Mul", inner, inner)


def _add_rest(b: Nodes, node: onnx.NodeProto, routed: str) -> None:
    """Add the shared expert's result and the residual to the routed experts' sum."""
    x, _, _, shared, hidden, gate = node.input[:6]
    y = b.add("Add", routed, shared)
    if any(one.name == "gated" and one.i for one in node.attribute):
        by_row = b.add("Reshape", y, b.add("Shape", x))
        y = b.add("Reshape", b.add("Mul", gate, by_row), b.add("Shape", hidden))
    b.add("Add", hidden, y, output=node.output[0])


def _tokens(b: Nodes, node: onnx.NodeProto) -> tuple[str, str, str]:
    """Return the tokens of all rows, [tokens, hidden], their experts and the weights of these."""
    x, indices, weights = node.input[:3]
    return b.add("Flatten", x, axis=-1), indices, weights


def _all_experts(b: Nodes, node: onnx.NodeProto, count: int, inner: int) -> str:
    """Compute all experts; a share is multiplied into what the second product takes."""
    x, indices, weights = _tokens(b, node)
    up, down = node.input[-2:]
    share = b.add("Unsqueeze", _shares(b, indices, weights, count), b.constant([2]))
    apart = b.add("Reshape", _squared(b, x, up), b.constant([0, count, inner]))
    flat = b.add("Reshape", b.add("Mul", apart, share), b.constant([0, count * inner]))
    return b.add("Gemm", flat, down, transB=1)


def _chosen_experts(b: Nodes, node: onnx.NodeProto, count: int) -> str:
    """Sort the chosen (token, expert) pairs by expert, and give each expert its own tokens.

    An expert that no token chose has products of no rows, which read no weight.
    """
    x, indices, weights = _tokens(b, node)
    up, down = node.input[-2:]
    chosen = b.add("Reshape", indices, b.constant([-1]))
    pairs = b.add("Shape", chosen)
    _, order = b.sorted(chosen, pairs)  # of one expert, by token; padding, -1, comes first
    each = b.add("ConstantOfShape", pairs, value=numpy_helper.from_array(np.ones(1, np.int64)))
    place = b.add("Add", b.add("Cast", chosen, to=TensorProto.INT64), b.constant([1]))
    none = b.constant(np.zeros(count + 1))
    counts = b.add("ScatterElements", none, place, each, reduction="add")
    token = b.add("Div", order, b.add("Shape", indices, start=1))
    apart = b.split(b.add("Gather", x, token), count + 1, counts)
    results = [b.add("ConstantOfShape", b.add("Shape", apart[0]))]
    for expert, own in enumerate(apart[1:]):
        squared = _squared(b, own, _one(up, expert))
        results.append(b.add("Gemm", squared, _one(down, expert), transB=1))
    _, back = b.sorted(order, pairs)
    by_token = b.add("Reshape", back, b.add("Shape", indices))
    y = b.add("Gather", b.add("Concat", *results, axis=0), by_token)  # [tokens, chosen, hidden]
    one = b.constant([1])
    total = b.add("MatMul", b.add("Unsqueeze", weights, one), y)
    return b.add("Squeeze", total, one)
