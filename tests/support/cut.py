"""A graph cut at our plugins: the part between them, as TensorRT's compiler sees it.

What a plugin takes becomes an output, and what it makes an input, so that a compiler without
plugins can be watched.
"""

from __future__ import annotations

from dataclasses import replace

from onnx import TensorProto, helper

from tests.support.released_nodes import attributes_of, dtype_of, form_of, tensor_shapes
from twotower_contract.traffic import Kernel, Tensor
from twotower_engines.building.flavours.compiled import layer_of
from twotower_engines.kernels.node import NAMESPACE, Call
from twotower_engines.kernels.nodes import NODES
from twotower_engines.kernels.plugin_graph import with_plugins
from twotower_engines.kernels.spec import Sizes

TYPES = {
    **{"bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT, "i32": TensorProto.INT32},
    "fp8": TensorProto.FLOAT8E4M3FN,
}
NAMES = {
    **{TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT: "FLOAT", TensorProto.INT32: "INT32"},
    TensorProto.FLOAT8E4M3FN: "FP8",
}
ROWS, TOKENS = 7, 11  # primes, so that a shape of numbers says which of its sizes are these


def symbolic(dims, tokens):
    """Shape with names in place of the sizes above: batch, tokens, and products of them."""
    pairs = ROWS * TOKENS * Sizes().experts_per_token
    names = {ROWS: "batch", TOKENS: tokens, ROWS * TOKENS: "flat", pairs: "pairs"}
    return [names.get(dim, dim) for dim in dims]


def cut_at_plugins(model, tokens):
    """Cut a tower's graph of the released width; `tokens` names the dimension of a row's tokens.

    Returns:
        The graph between the plugins, and these as kernels of a listing.
    """
    cut = with_plugins(model)
    graph = cut.graph
    plugins = [node for node in graph.node if node.domain == NAMESPACE]
    kept = [node for node in graph.node if node.domain != NAMESPACE]
    given = {
        one.name: tuple(dim.dim_value for dim in one.type.tensor_type.shape.dim)
        for one in graph.input
    }
    made, taken, kernels = {}, {}, []
    for call in plugins:
        node = NODES[call.op_type]
        form = form_of(node)
        shapes = tensor_shapes(replace(Sizes(), experts_format=form), ROWS, TOKENS)
        if call.op_type.startswith("Product"):  # of one of several sizes
            shapes |= {
                name: given[tensor]
                for name, tensor in zip(node.takes[1:], call.input[1:], strict=True)
            }
            shapes["x"] = (ROWS * TOKENS, 8 * shapes["matrix"][1])
        attributes = dict(attributes_of(node, Sizes()))
        attributes |= {one.name: one.i for one in call.attribute if one.name == "gated"}
        if not attributes.get("gated", True):
            shapes["gate"] = shapes["hidden"]  # stands in its place
        dims = {name: shapes[name] for name in node.takes}
        dtypes = {name: dtype_of(name, form) for name in node.takes}
        placed = Call(dims, dims, dtypes, attributes)
        outputs, read = node.outputs(placed), node.launching(placed).spec.types
        for name, tensor in zip(call.input, node.takes, strict=True):
            taken[name] = (TYPES[dtypes[tensor]], symbolic(dims[tensor], tokens))
        for name, one in zip(call.output, outputs, strict=True):
            made[name] = (TYPES[one.dtype], symbolic(one.dims, tokens))
        # an input that tells sizes alone is no parameter of the kernel
        inputs = [one for one, tensor in zip(call.input, node.takes, strict=True) if tensor in read]
        reads, writes = (
            tuple(Tensor(name, tuple(edges[name][1]), NAMES[edges[name][0]]) for name in names)
            for names, edges in ((inputs, taken), (call.output, made))
        )
        kernels.append(Kernel(call.name, "plugin", layer_of("", reads), reads, writes))
    op_of = {one.name: one.name.rpartition(".")[0] for one in kernels}
    layers = {op_of[one.name]: one.layer for one in kernels if one.layer is not None}
    kernels = [replace(one, layer=layers.get(op_of[one.name])) for one in kernels]
    inner = {name for node in kept for name in node.output}
    used = {name for node in kept for name in node.input}
    present = {one.name for one in (*graph.input, *graph.output)}
    graph.input.extend(
        helper.make_tensor_value_info(name, *one) for name, one in made.items() if name in used
    )
    outputs = [one for one in graph.output if one.name in inner]
    outputs += [
        helper.make_tensor_value_info(name, *one)
        for name, one in taken.items()
        if name in inner and name not in present
    ]
    for part, values in ((graph.node, kept), (graph.output, outputs)):
        del part[:]
        part.extend(values)
    inputs = [one for one in graph.input if one.name in used]
    del graph.input[:]
    graph.input.extend(inputs)
    functions = [one for one in cut.functions if one.name not in NODES]
    del cut.functions[:]
    cut.functions.extend(functions)
    return cut, kernels
