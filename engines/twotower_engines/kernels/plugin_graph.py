"""Puts our plugins into a graph: each op becomes its chain of plugin nodes.

The nodes go into the main graph, because there TensorRT's parser looks for a plugin before it looks
for a function of the same name; inside a function it inlines without looking. Every node has a
function, so that the same graph means the same where no plugin is registered.
"""

from __future__ import annotations

import onnx
import onnx.inliner
from onnx import TensorProto, helper

from twotower_engines.errors import BuildError
from twotower_engines.kernels.node import NAMESPACE, Node
from twotower_engines.kernels.nodes import OPS

VERSION = "1"
OPSET = 24


def with_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with each op as its chain of plugin nodes, all in the main graph.

    Mamba layers return new states where the graph has them as outputs: a denoiser has none, and
    its kernels then write none.

    Args:
        model: A bundle's graph; it is not changed.

    Raises:
        BuildError: The graph calls none of the ops.
    """
    flat = onnx.inliner.inline_selected_functions(
        model, [(NAMESPACE, op) for op in OPS], exclude=True
    )
    states = any(output.name.endswith("ssm_state_new") for output in flat.graph.output)
    nodes: list[onnx.NodeProto] = []
    calls: dict[str, onnx.NodeProto] = {}
    for number, node in enumerate(flat.graph.node):
        if node.domain == NAMESPACE and node.op_type in OPS:
            nodes += _chain(node, f"{node.name or node.op_type}.{number}", states)
            calls.setdefault(node.op_type, node)
        else:
            nodes.append(node)
    if not calls:
        raise BuildError(f"the graph {flat.graph.name!r} calls none of {', '.join(OPS)}")
    del flat.graph.node[:]
    flat.graph.node.extend(nodes)
    for op, call in calls.items():
        flat.functions.extend(_function(call, node) for node in OPS[op].chain)
    if not any(entry.domain == NAMESPACE for entry in flat.opset_import):
        flat.opset_import.append(helper.make_opsetid(NAMESPACE, 1))
    return flat


def _chain(call: onnx.NodeProto, stem: str, states: bool) -> list[onnx.NodeProto]:
    """Return the plugin nodes of one call of an op."""
    op = OPS[call.op_type]
    given = {one.name: helper.get_attribute_value(one) for one in call.attribute}
    given["states"] = int(states)
    tensors = dict(zip(op.inputs, call.input, strict=True))
    wanted = dict(zip(op.outputs, call.output, strict=False))
    chain = []
    for node in op.chain:
        for name in node.makes:
            tensors[name] = wanted.get(name) or f"{stem}.{name}"
        chain.append(
            helper.make_node(
                node.name,
                [tensors[name] for name in node.takes],
                [tensors[name] for name in node.makes],
                name=f"{stem}.{node.name}",
                domain=NAMESPACE,
                plugin_namespace=NAMESPACE,
                plugin_version=VERSION,
                **{name: given[name] for name in node.attributes},
            )
        )
    return chain


def _function(call: onnx.NodeProto, node: Node) -> onnx.FunctionProto:
    """Return what a plugin node computes where its plugin is not registered: `Node.function`."""
    op = OPS[call.op_type]
    takes, makes = [f"in_{name}" for name in node.takes], [f"out_{name}" for name in node.makes]
    if node.function == "nothing":
        zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
        body = [helper.make_node("Constant", [], [name], value=zero) for name in makes]
    elif node.function == "same":
        body = [helper.make_node("Identity", takes[1:2], makes)]
    else:
        # The node's first output stands for the op's first: the nodes that follow hand it on.
        outputs = {name: f"unused_{name}" for name in op.outputs}
        outputs |= {name: f"out_{name}" for name in node.makes if name in outputs}
        if node.makes[0] not in op.outputs:
            outputs[op.outputs[0]] = makes[0]
        inputs = takes[: len(op.inputs)]
        body = [helper.make_node(call.op_type, inputs, list(outputs.values()), domain=NAMESPACE)]
        body[0].attribute.extend(call.attribute)
    return helper.make_function(
        NAMESPACE,
        node.name,
        takes,
        makes,
        body,
        [helper.make_opsetid("", OPSET), helper.make_opsetid(NAMESPACE, 1)],
        attributes=["plugin_namespace", "plugin_version", *node.attributes],
    )
