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
    take_codes(flat)
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


def take_codes(model: onnx.ModelProto) -> None:
    """Give experts their FP8 codes: the op's function would get weights written out in T.

    A bank of FP8 is codes [E, in, out], dequantized by a scale of each expert and transposed. Where
    both banks of a call are, its op becomes `SparseExpertsFP8`, on the codes and scales.

    Args:
        model: A graph whose calls of the ops are in its main graph; it is changed.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    functions = {function.name: function for function in model.functions}
    for node in model.graph.node:
        if node.domain != NAMESPACE or node.op_type != "SparseExperts":
            continue
        banks = [_codes(makers, name) for name in node.input[3:]]
        if not all(banks):
            continue
        node.op_type = "SparseExpertsFP8"
        node.input[3:] = [name for bank in banks for name in bank]
        if node.op_type not in functions:
            functions[node.op_type] = _on_codes(functions["SparseExperts"])
            model.functions.append(functions[node.op_type])
    _drop_unused(model)


def _codes(makers: dict[str, onnx.NodeProto], bank: str) -> list[str]:
    """Return the codes and the scale that a bank is made of; nothing where it is made otherwise."""
    turned = makers.get(bank)
    if turned is None or turned.op_type != "Transpose":
        return []
    wide = makers.get(turned.input[0])
    return list(wide.input[:2]) if wide is not None and wide.op_type == "DequantizeLinear" else []


def _on_codes(op: onnx.FunctionProto) -> onnx.FunctionProto:
    """Return the op's function on FP8 banks: what it is where no plugin is registered."""
    made = onnx.FunctionProto()
    made.CopyFrom(op)
    made.name = f"{op.name}FP8"
    first, banks = list(op.input[:3]), list(op.input[3:])
    del made.input[:], made.node[:]
    made.input.extend([*first, *(name for bank in banks for name in (bank, f"{bank}_scale"))])
    for bank in banks:
        given = [bank, f"{bank}_scale"]
        made.node.append(helper.make_node("DequantizeLinear", given, [f"{bank}_wide"], axis=0))
        made.node.append(
            helper.make_node("Transpose", [f"{bank}_wide"], [f"{bank}_turned"], perm=[0, 2, 1])
        )
    for node in op.node:
        made.node.append(node)
        made.node[-1].input[:] = [f"{x}_turned" if x in banks else x for x in node.input]
    return made


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove the nodes that dequantized what is taken as codes now."""
    used = {name for node in model.graph.node for name in node.input}
    used |= {output.name for output in model.graph.output}
    for kind in ("Transpose", "DequantizeLinear"):
        kept = [n for n in model.graph.node if n.op_type != kind or used & set(n.output)]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        used = {name for node in kept for name in node.input}
        used |= {output.name for output in model.graph.output}


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
