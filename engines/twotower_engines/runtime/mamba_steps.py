"""The Mamba steps of a graph in a CPU's own operators.

The exported node `twotower::MambaBlockStep` has a body of some seventy ordinary operators, which
move several times what a step must. ONNX Runtime has one operator for the scan and one for the
norm. The scan keeps a head's state as [N, P]: so do the graph's inputs and outputs here, and the
slots.

A row's result is the same alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from twotower_engines.runtime.nodes import MICROSOFT, Nodes

OP = ("twotower", "MambaBlockStep")


WIDTH = 32
"""ONNX Runtime has a fast scan for heads of so many columns, and multiples."""


def scan_width(head_dim: int) -> int:
    """Return the columns of a head's state in the scan; those past `head_dim` stay zero."""
    return -(-head_dim // WIDTH) * WIDTH


def replace_mamba_steps(graph: onnx.GraphProto) -> None:
    """Put a CPU's operators in the place of every `MambaBlockStep`.

    Args:
        graph: A graph whose states are inputs; their shapes are changed, [B, H, N, P] in the place
            of [B, H, P, N].
    """
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    nodes: list[onnx.NodeProto] = []
    turned: set[str] = set()
    shared: dict[str, str] = {}
    for node in graph.node:
        if (node.domain, node.op_type) != OP:
            nodes.append(node)
            continue
        nodes += _step(node, shapes[node.input[2]], shapes[node.input[4]][1], shared)
        turned |= {node.input[2], node.output[2]}
    for value in (*graph.input, *graph.output):
        if value.name in turned:
            head, state = value.type.tensor_type.shape.dim[2:]
            head.dim_value, state.dim_value = state.dim_value, scan_width(head.dim_value)
    del graph.node[:]
    graph.node.extend(nodes)


def _step(
    node: onnx.NodeProto, state_shape: list[int], kernel: int, shared: dict[str, str]
) -> list[onnx.NodeProto]:
    """Return the nodes of one step.

    Args:
        node: It is [B, L, d_inner + conv_dim + H] -> [B, L, d_inner], and both new states.
        state_shape: B, H, P, N.
        kernel: Tokens that a result of the convolution depends on.
        shared: Values that all steps read, by name; those of the first are added.
    """
    projected, conv_state, ssm_state, lengths, conv_weight, conv_bias = node.input[:6]
    dt_bias, a_log, d_skip, norm_weight = node.input[6:]
    given: Mapping[str, float] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    _, H, P, N = state_shape
    G = int(given["n_groups"])
    b = Nodes(node.name)
    sizes = [H * P, H * P + 2 * G * N, H]
    z, xbc, dt = b.split(projected, 3, b.constant(sizes), axis=2)
    history = b.add("Concat", conv_state, xbc, axis=1)
    convolved = _convolution(b, history, xbc, conv_weight, conv_bias, kernel)
    convolved = b.add("QuickGelu", convolved, domain=MICROSOFT, alpha=1.0)  # SiLU
    x, B, C = b.split(convolved, 3, b.constant([H * P, G * N, G * N]), axis=2)

    if "valid" not in shared:  # of all steps: [B, L, 1]
        tokens = b.add("Squeeze", b.add("Shape", projected, start=1, end=2))
        steps = b.add("Range", b.constant(0), tokens, b.constant(1))
        ends = b.add("Cast", b.add("Unsqueeze", lengths, b.constant([1])), to=TensorProto.INT64)
        inside = b.add("Cast", b.add("Less", steps, ends), to=TensorProto.FLOAT)
        shared["valid"] = b.add("Unsqueeze", inside, b.constant([2]))
        columns = b.add("Add", ends, b.constant([[0, 1, 2]]))
        shared["columns"] = b.add("Unsqueeze", columns, b.constant([2]))
    dt = b.add("Mul", b.add("Softplus", b.add("Add", dt, dt_bias)), shared["valid"])
    decay = b.add("Mul", dt, b.add("Neg", b.add("Exp", a_log)))  # logarithm, [B, L, H]
    heads = b.add("Reshape", x, b.constant([0, 0, H, P]))
    moved = b.add("Mul", heads, b.add("Unsqueeze", dt, b.constant([3])))
    wide = scan_width(P)
    if wide > P:
        moved = b.add("Pad", moved, b.constant([0, wide - P]), "", b.constant([3]))
    scanned = b.add(
        "LinearAttention",
        *(C, B, b.add("Reshape", moved, b.constant([0, 0, H * wide])), ssm_state, decay),
        others=[node.output[2]],
        domain=MICROSOFT,
        update_rule="gated",
        q_num_heads=G,
        kv_num_heads=H,
        scale=1.0,
    )
    if wide > P:
        apart = b.add("Reshape", scanned, b.constant([0, 0, H, wide]))
        real = b.add("Slice", apart, b.constant([0]), b.constant([P]), b.constant([3]))
        scanned = b.add("Reshape", real, b.constant([0, 0, H * P]))
    each = b.add("Expand", b.add("Unsqueeze", d_skip, b.constant([1])), b.constant([H, P]))
    skipped = b.add("Mul", x, b.add("Reshape", each, b.constant([H * P])))
    gate = b.add("QuickGelu", z, domain=MICROSOFT, alpha=1.0)
    gated = b.add("Mul", b.add("Add", scanned, skipped), gate)
    width = H * P // G
    groups = b.add("Reshape", gated, b.constant([0, 0, G, width]))
    ones = b.constant(np.ones(width), np.float32)
    normed = b.add("RMSNormalization", groups, ones, axis=-1, epsilon=given["epsilon"])
    flat = b.add("Reshape", normed, b.constant([0, 0, H * P]))
    b.add("Mul", flat, norm_weight, output=node.output[0])
    b.add("GatherND", history, shared["columns"], output=node.output[1], batch_dims=1)
    return b.written


def _convolution(b: Nodes, history: str, xbc: str, weight: str, bias: str, kernel: int) -> str:
    """Return the convolution of each channel over its last tokens, as a sum of products.

    ONNX Runtime's own operator, `CausalConvWithState`, takes 1.6 times as long for 16 rows.

    Args:
        b: Where the nodes go.
        history: [B, kernel - 1 + L, C].
        xbc: Its last L tokens.
        weight: [C, kernel].
        bias: [C].
        kernel: Tokens that a result depends on.
    """
    transposed = b.add("Transpose", weight, perm=[1, 0])
    total = bias
    for index, column in enumerate(b.split(transposed, kernel, b.constant([1] * kernel))):
        seen = xbc
        if index < kernel - 1:
            begin, end = b.constant([index]), b.constant([index + 1 - kernel])
            seen = b.add("Slice", history, begin, end, b.constant([1]))
        total = b.add("Add", b.add("Mul", seen, column), total)
    return total
