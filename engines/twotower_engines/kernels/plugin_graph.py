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
from twotower_engines.kernels.expert_nodes import TOKENS as EXPERT_TOKENS
from twotower_engines.kernels.node import NAMESPACE, Node, Op
from twotower_engines.kernels.nodes import OPS, STATES

VERSION = "1"
OPSET = 24

DECODERS = {"INT4": "FromINT4", "NVFP4": "FromNVFP4"}
"""Functions that decode weights of 4 bits, by what ends the names of the ops on codes."""


def with_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with each op as its chain of plugin nodes, all in the main graph.

    Mamba layers have kernels that return new states where the graph has them as outputs: a
    denoiser has none.

    Args:
        model: A bundle's graph; it is not changed.

    Raises:
        BuildError: The graph calls none of the ops.
    """
    kept = [(NAMESPACE, name) for name in (*OPS, *DECODERS.values())]
    flat = onnx.inliner.inline_selected_functions(model, kept, exclude=True)
    states = any(output.name.endswith("ssm_state_new") for output in flat.graph.output)
    take_codes(flat)
    nodes: list[onnx.NodeProto] = []
    calls: dict[str, onnx.NodeProto] = {}
    for number, node in enumerate(flat.graph.node):
        if node.domain == NAMESPACE and node.op_type in OPS:
            op = f"{node.op_type}{STATES}"
            op = op if states and op in OPS else node.op_type
            nodes += _chain(node, f"{node.name or node.op_type}.{number}", OPS[op])
            calls.setdefault(op, node)
        else:
            nodes.append(node)
    if not calls:
        raise BuildError(f"the graph {flat.graph.name!r} calls none of {', '.join(OPS)}")
    del flat.graph.node[:]
    flat.graph.node.extend(nodes)
    for op, call in calls.items():
        flat.functions.extend(_function(call, OPS[op], node) for node in OPS[op].chain)
    if not any(entry.domain == NAMESPACE for entry in flat.opset_import):
        flat.opset_import.append(helper.make_opsetid(NAMESPACE, 1))
    return flat


def take_codes(model: onnx.ModelProto) -> None:
    """Give our kernels codes: their functions would get weights written out in T.

    Where both banks of `SparseExperts` are decoded from codes, its op becomes the one of their
    format, on the codes and scales. So does a Gemm by weights of 4 bits; one by FP8 weights is left
    to TensorRT, which dequantizes them inside of its products.

    Args:
        model: A graph whose calls of the ops are in its main graph; it is changed.

    Raises:
        BuildError: Something else takes weights of 4 bits.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    functions = {function.name: function for function in model.functions}
    for node in model.graph.node:
        is_experts = (node.domain, node.op_type) == (NAMESPACE, "SparseExperts")
        if node.op_type == "Shape" and _is_of_features(node):
            form, given = _codes(makers, node.input[0])
            if form in DECODERS:
                node.input[0] = given[0]
        if not is_experts and node.op_type != "Gemm":
            continue
        before = len(EXPERT_TOKENS) if is_experts else 1
        weights = node.input[before:] if is_experts else node.input[1:2]
        found = [_codes(makers, name) for name in weights]
        form = found[0][0]
        is_ours = form in DECODERS or (is_experts and form == "FP8")
        if form is None or not is_ours or any(other != form for other, _ in found):
            continue
        stem = "SparseExperts" if is_experts else "Linear"
        first = list(node.input[:before])
        node.op_type, node.domain = f"{stem}{form}", NAMESPACE
        node.input[:] = [*first, *(name for _, given in found for name in given)]
        if not is_experts:
            del node.attribute[:]
        if node.op_type not in functions:
            body = functions["SparseExperts"] if is_experts else _gemm()
            functions[node.op_type] = _on_codes(body, node.op_type, form)
            model.functions.append(functions[node.op_type])
    _drop_unused(model)
    left = [node for node in model.graph.node if node.op_type in DECODERS.values()]
    if left:
        raise BuildError(
            f"weights of 4 bits ({left[0].input[0]}) go where no kernel of ours takes them; both "
            "projections of a layer's experts must have one format: quantize them alike"
        )


def _is_of_features(shape: onnx.NodeProto) -> bool:
    """Whether a Shape node asks for a matrix's first size alone, which its codes have as well."""
    asked = {one.name: one.i for one in shape.attribute}
    return (asked.get("start", 0), asked.get("end")) == (0, 1)


def _codes(makers: dict[str, onnx.NodeProto], weights: str) -> tuple[str | None, list[str]]:
    """Return the format that weights are decoded from, and the codes and scales."""
    node = makers.get(weights)
    if node is not None and node.domain == NAMESPACE:
        form = next((form for form, name in DECODERS.items() if name == node.op_type), None)
        return form, list(node.input)
    if node is not None and node.op_type == "Transpose":
        wide = makers.get(node.input[0])
        if wide is not None and wide.op_type == "DequantizeLinear":
            return "FP8", list(wide.input[:2])
    return None, []


def _gemm() -> onnx.FunctionProto:
    """Return a product as `Body.linear` writes it."""
    node = helper.make_node("Gemm", ["x", "matrix"], ["y"], transB=1)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(NAMESPACE, 1)]
    return helper.make_function(NAMESPACE, "Linear", ["x", "matrix"], ["y"], [node], opsets)


def _on_codes(op: onnx.FunctionProto, name: str, form: str) -> onnx.FunctionProto:
    """Return an op's function on codes: what it is where no plugin is registered."""
    made = onnx.FunctionProto()
    made.CopyFrom(op)
    made.name = name
    known, taken = set(op.input), OPS[name].inputs
    del made.input[:], made.node[:]
    made.input.extend(taken)
    decoded = {}
    for weight in op.input:
        given = [one for one in taken if one == weight or one.startswith(f"{weight}_scale")]
        if len(given) > 1:
            decoded[weight] = f"{weight}_decoded"
            made.node.extend(_decoding(form, given, decoded[weight]))
    assert known <= set(taken), "an op on codes takes what the op takes, and scales"
    for node in op.node:
        made.node.append(node)
        made.node[-1].input[:] = [decoded.get(x, x) for x in node.input]
    return made


def _decoding(form: str, given: list[str], weights: str) -> list[onnx.NodeProto]:
    """Return the nodes that make a bank of weights from its codes and scales."""
    if form != "FP8":
        return [helper.make_node(DECODERS[form], given, [weights], domain=NAMESPACE)]
    wide = f"{given[0]}_wide"
    return [
        helper.make_node("DequantizeLinear", given, [wide], axis=0),
        helper.make_node("Transpose", [wide], [weights], perm=[0, 2, 1]),
    ]


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove the nodes that decoded what is taken as codes now."""
    used = {name for node in model.graph.node for name in node.input}
    used |= {output.name for output in model.graph.output}
    for kind in ("Transpose", "DequantizeLinear", *DECODERS.values()):
        kept = [n for n in model.graph.node if n.op_type != kind or used & set(n.output)]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        used = {name for node in kept for name in node.input}
        used |= {output.name for output in model.graph.output}


def _chain(call: onnx.NodeProto, stem: str, op: Op) -> list[onnx.NodeProto]:
    """Return the plugin nodes of one call of an op."""
    given = {one.name: helper.get_attribute_value(one) for one in call.attribute}
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


def _function(call: onnx.NodeProto, op: Op, node: Node) -> onnx.FunctionProto:
    """Return what a plugin node computes where its plugin is not registered: `Node.function`."""
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
