"""The Mamba steps of a graph in a CPU's own operators.

The exported node `twotower::MambaBlockStep` has a body of some seventy ordinary operators, which
move several times what a step must. ONNX Runtime has one operator for the norm, and the recurrence
is in `mamba_recurrence`. It keeps a head's state as [N, P]: so do the graph's inputs and outputs
here, and the slots.

A row's result is the same alone and in a batch.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from twotower_engines.runtime.mamba_recurrence import CHUNK, Given, Sizes, products, scan
from twotower_engines.runtime.nodes import MICROSOFT, Nodes

OP = ("twotower", "MambaBlockStep")

BLOCKED = platform.machine().lower() in ("x86_64", "amd64")
"""Whether ONNX Runtime has a convolution of channels in blocks, which takes half the time of the
sum of products; a convolution of each channel by itself takes twice as long as that."""


def replace_mamba_steps(graph: onnx.GraphProto, with_states: bool) -> None:
    """Put a CPU's operators in the place of every `MambaBlockStep`.

    Args:
        graph: A graph whose states are inputs; their shapes are changed, [B, H, N, P] in the place
            of [B, H, P, N].
        with_states: Whether the states after the last token are made. A call then has whole chunks
            of tokens, or one that is shorter.
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
        convolution = shapes[node.input[4]]
        nodes += _step(node, shapes[node.input[2]], convolution, shared, with_states)
        turned |= {node.input[2], node.output[2]}
    for value in (*graph.input, *graph.output):
        if value.name in turned:
            head, state = value.type.tensor_type.shape.dim[2:]
            head.dim_value, state.dim_value = state.dim_value, head.dim_value
    del graph.node[:]
    graph.node.extend(nodes)


def _step(
    node: onnx.NodeProto,
    state_shape: list[int],
    convolution: Sequence[int],
    shared: dict[str, str],
    with_states: bool,
) -> list[onnx.NodeProto]:
    """Return the nodes of one step.

    Args:
        node: It is [B, L, d_inner + conv_dim + H] -> [B, L, d_inner], and both new states.
        state_shape: B, H, P, N.
        convolution: Channels, and tokens that a result of the convolution depends on.
        shared: Values that all steps read, by name; those of the first are added.
        with_states: Whether both states are made.
    """
    projected, conv_state, ssm_state, lengths, conv_weight, conv_bias = node.input[:6]
    dt_bias, a_log, d_skip, norm_weight = node.input[6:]
    attributes: Mapping[str, float] = {
        a.name: helper.get_attribute_value(a) for a in node.attribute
    }
    _, H, P, N = state_shape
    G = int(attributes["n_groups"])
    b = Nodes(node.name)
    z, xbc, dt = b.split(projected, 3, b.constant([H * P, H * P + 2 * G * N, H]), axis=2)
    history = b.add("Concat", conv_state, xbc, axis=1)
    convolved = _convolution(b, history, xbc, conv_weight, conv_bias, convolution)
    convolved = b.add("QuickGelu", convolved, domain=MICROSOFT, alpha=1.0)  # SiLU
    x, B, C = b.split(convolved, 3, b.constant([H * P, G * N, G * N]), axis=2)

    if not shared:
        shared |= _shared(b, projected, lengths)
    dt = b.add("Mul", b.add("Softplus", b.add("Add", dt, dt_bias)), shared["valid"])
    rate = b.add("Neg", b.add("Exp", a_log))
    sizes, given = Sizes(H, P, N, G), Given(x, B, C, dt, rate, ssm_state)
    if with_states:
        one, several = Nodes(f"{node.name}.one"), Nodes(f"{node.name}.several")
        branches = {
            "then_branch": one.branch(*scan(one, sizes, given)),
            "else_branch": several.branch(*products(several, sizes, given, shared["chunks"])),
        }
        scanned = b.add("If", shared["is one"], others=[node.output[2]], **branches)
    else:
        scanned, *_ = products(b, sizes, given)
    each = b.add("Expand", b.add("Unsqueeze", d_skip, b.constant([1])), b.constant([H, P]))
    skipped = b.add("Mul", x, b.add("Reshape", each, b.constant([H * P])))
    gate = b.add("QuickGelu", z, domain=MICROSOFT, alpha=1.0)
    gated = b.add("Mul", b.add("Add", scanned, skipped), gate)
    width = H * P // G
    groups = b.add("Reshape", gated, b.constant([0, 0, G, width]))
    ones = b.constant(np.ones(width), np.float32)
    normed = b.add("RMSNormalization", groups, ones, axis=-1, epsilon=attributes["epsilon"])
    flat = b.add("Reshape", normed, b.constant([0, 0, H * P]))
    b.add("Mul", flat, norm_weight, output=node.output[0])
    if with_states:
        b.add("GatherND", history, shared["columns"], output=node.output[1], batch_dims=1)
    return b.written


def _shared(b: Nodes, projected: str, lengths: str) -> dict[str, str]:
    """Return what all steps of a tower read."""
    tokens = b.add("Shape", projected, start=1, end=2)
    steps = b.add("Range", b.constant(0), b.add("Squeeze", tokens), b.constant(1))
    ends = b.add("Cast", b.add("Unsqueeze", lengths, b.constant([1])), to=TensorProto.INT64)
    inside = b.add("Cast", b.add("Less", steps, ends), to=TensorProto.FLOAT)
    columns = b.add("Add", ends, b.constant([[0, 1, 2]]))
    size = b.add("Min", tokens, b.constant([CHUNK]))
    return {
        "valid": b.add("Unsqueeze", inside, b.constant([2])),  # [B, L, 1]
        "columns": b.add("Unsqueeze", columns, b.constant([2])),  # of the convolution's new state
        "chunks": b.add("Concat", b.constant([0]), b.add("Div", tokens, size), size, axis=0),
        "is one": b.add("Equal", tokens, b.constant([1])),
    }


def _convolution(
    b: Nodes, history: str, xbc: str, weight: str, bias: str, shape: Sequence[int]
) -> str:
    """Return the convolution of each channel over its last tokens.

    ONNX Runtime's own operator for it, `CausalConvWithState`, takes longer than either form: 1.6
    times as long as the products for 16 rows.

    Args:
        b: Where the nodes go.
        history: [B, kernel - 1 + L, C].
        xbc: Its last L tokens.
        weight: [C, kernel].
        bias: [C].
        shape: C, kernel.
    """
    channels, kernel = shape
    if not BLOCKED:
        return _products_of_tokens(b, history, xbc, weight, bias, kernel)
    image = b.add("Transpose", b.add("Unsqueeze", history, b.constant([1])), perm=[0, 3, 1, 2])
    filters = b.add("Unsqueeze", weight, b.constant([1, 2]))
    convolved = b.add("Conv", image, filters, bias, group=channels, kernel_shape=[1, kernel])
    return b.add("Squeeze", b.add("Transpose", convolved, perm=[0, 2, 3, 1]), b.constant([1]))


def _products_of_tokens(
    b: Nodes, history: str, xbc: str, weight: str, bias: str, kernel: int
) -> str:
    """Return the convolution as a sum of products, one for each token that a result depends on."""
    transposed = b.add("Transpose", weight, perm=[1, 0])
    total = bias
    for index, column in enumerate(b.split(transposed, kernel, b.constant([1] * kernel))):
        seen = xbc
        if index < kernel - 1:
            begin, end = b.constant([index]), b.constant([index + 1 - kernel])
            seen = b.add("Slice", history, begin, end, b.constant([1]))
        total = b.add("Add", b.add("Mul", seen, column), total)
    return total
