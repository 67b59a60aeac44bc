"""Our kernels as TensorRT plugins, whose PTX becomes part of the plan.

TensorRT (10.9 and later) asks an ahead-of-time plugin for its kernel once, while it builds: the
plan then holds the PTX, and a server needs neither this package nor Triton's compiler. One plugin
is one launch, so an op is a chain of plugins (`kernels.nodes`). A build takes two steps:

    register_plugins("9.0")        # TensorRT's registry knows the nodes; their kernels compile
    model = with_plugins(model)    # the graph calls the nodes in place of the ops

`with_plugins` puts the nodes into the main graph, because there the parser looks for a plugin
before it looks for a function of the same name; inside a function it inlines without looking. Every
node has a function, so that the same graph means the same where no plugin is registered.

TensorRT-RTX takes no plugins of this kind: its engines are built from the graph as exported.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from twotower_engines.errors import BuildError

if TYPE_CHECKING:
    import onnx

    from twotower_engines.kernels.nodes import Call, Link, Node

__all__ = ["NAMESPACE", "is_registered", "register_plugins", "with_plugins"]

NAMESPACE = "twotower"
"""Of the plugins, and the ONNX domain of the ops and nodes."""

VERSION = "1"
OPSET = 23


def is_registered() -> bool:
    """Whether TensorRT's registry has the plugins."""
    import tensorrt as trt

    names = {(c.plugin_namespace, c.name) for c in trt.get_plugin_registry().all_creators}
    return (NAMESPACE, "RefineDecision") in names


def register_plugins(compute_capability: str) -> None:
    """Registers every node with TensorRT, for engines of one GPU generation.

    TensorRT validates each definition here. A process builds for one generation: the registry
    cannot forget a plugin.

    Args:
        compute_capability: of the GPU that the engine is for, e.g. "9.0".

    Raises:
        BuildError: TensorRT is too old, no kernels exist for the GPU, or the process has registered
            the plugins for another one.
    """
    import numpy.typing  # noqa: F401 - tensorrt.plugin uses it and does not import it
    import tensorrt as trt

    from twotower_engines.kernels.nodes import NODES
    from twotower_engines.kernels.targets import target

    wanted = target(compute_capability)
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise BuildError(
            f"TensorRT {trt.__version__} has no ahead-of-time plugins; 10.9 is the first that has"
        )
    if _registered and _registered != [compute_capability]:
        raise BuildError(
            f"this process has registered its plugins for {_registered[0]} and cannot build for "
            f"{compute_capability}; build each GPU generation in a process of its own"
        )
    if _registered:
        return
    for node in NODES:
        _register(node, lambda launching: _compile(launching.spec, wanted))
    _registered.append(compute_capability)


_registered: list[str] = []


def _compile(spec: Any, wanted: Any) -> Any:
    from twotower_engines.kernels.compile import compile_kernel

    return compile_kernel(spec, wanted)


def _register(node: Node, compiler: Callable[[Any], Any]) -> None:
    """One node's shape function and its kernel, with the signatures that TensorRT inspects."""
    import tensorrt.plugin as trtp

    plugin_id = f"{NAMESPACE}::{node.name}"
    count = len(node.inputs)

    def describe(*descs: Any, **attributes: Any) -> Any:
        call = _call(node, descs, attributes, sized=False)
        made = node.outputs(call)
        return tuple(trtp.from_shape_expr(out.dims, _trt_dtype(out.dtype)) for out in made)

    def implement(*args: Any) -> Any:
        attributes = dict(zip(node.attributes, args[count:-2], strict=True))
        call = _call(node, args[:count], attributes, sized=True)
        return _implementation(node, call, compiler)

    tensors = [(name, trtp.TensorDesc) for name in node.inputs]
    given = [*tensors, *node.attributes.items()]
    outputs: Any = types.GenericAlias(tuple, (trtp.TensorDesc,) * _output_count(node))
    launch = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    _sign(describe, given, outputs)
    _sign(implement, [*given, ("outputs", outputs), ("tactic", int)], launch)
    trtp.register(plugin_id)(describe)
    trtp.aot_impl(plugin_id)(implement)


def _sign(function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], made: Any) -> None:
    """Gives a function that takes anything the signature that TensorRT validates."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=made,
    )


def _output_count(node: Node) -> int:
    from twotower_engines.kernels.nodes import CHAINS

    return next(
        len(link.makes) for chain in CHAINS.values() for link in chain if link.node == node.name
    )


def _dtypes() -> dict[str, Any]:
    import tensorrt as trt

    return {"bf16": trt.bfloat16, "fp32": trt.float32, "i32": trt.int32}


def _trt_dtype(name: str) -> Any:
    return _dtypes()[name]


def _call(node: Node, descs: Sequence[Any], attributes: dict[str, Any], *, sized: bool) -> Call:
    import tensorrt.plugin as trtp

    from twotower_engines.kernels.nodes import Call

    by_dtype = {dtype: name for name, dtype in _dtypes().items()}
    named = dict(zip(node.inputs, descs, strict=True))
    for name, desc in named.items():
        if desc.dtype not in by_dtype:
            raise BuildError(
                f"plugin {node.name}: input {name} is {desc.dtype}; kernels take "
                f"{', '.join(_dtypes())}"
            )
    return Call(
        dims={name: list(desc.shape_expr) for name, desc in named.items()},
        largest={name: _largest(desc.shape) for name, desc in named.items()} if sized else {},
        dtypes={name: by_dtype[desc.dtype] for name, desc in named.items()},
        attributes=attributes,
        cdiv=trtp.cdiv,
        minimum=trtp.min,
        usual={name: _usual(desc.shape) for name, desc in named.items()} if sized else {},
    )


def _largest(shape: Any) -> tuple[int, ...]:
    return tuple(shape.max if shape.is_dynamic else shape)


def _usual(shape: Any) -> tuple[int, ...]:
    """The optimum of the profile that TensorRT builds for."""
    return tuple(shape.opt if shape.is_dynamic else shape)


def _implementation(node: Node, call: Call, compiler: Callable[[Any], Any]) -> Any:
    """Entry name, PTX, launch parameters and integer arguments of one node."""
    import tensorrt.plugin as trtp

    from twotower_engines.kernels.jit import SHARED_MEMORY_LIMIT

    launching = node.launching(call)
    compiled = compiler(launching)
    if compiled.shared_memory > SHARED_MEMORY_LIMIT:
        raise BuildError(
            f"kernel {compiled.name} takes {compiled.shared_memory} bytes of shared memory; a "
            f"plugin has {SHARED_MEMORY_LIMIT}: make its tiles smaller"
        )
    kinds = launching.spec.types
    integers = [name for name, kind in kinds.items() if not kind.startswith("*")]
    outputs = [name for name in kinds if name not in node.inputs and name not in integers]
    order = [name if name in kinds else None for name in node.inputs]
    ptx = compiled.arranged([*order, *integers, *outputs])

    grid = (*launching.grid, 1, 1)[:3]
    params = trtp.KernelLaunchParams(
        *grid, block_x=compiled.threads, shared_mem=compiled.shared_memory
    )
    arguments = trtp.SymIntExprs(len(integers))
    for index, name in enumerate(integers):
        arguments[index] = trtp.SymInt32(launching.integers[name])
    return compiled.entry, ptx, params, arguments


def with_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with each op as its chain of plugin nodes, all in the main graph.

    Whether Mamba layers return new states is read off the graph's outputs: a denoiser asks for
    none, and its kernels then write none.

    Args:
        model: a bundle's graph; it is not changed.

    Raises:
        BuildError: the graph calls none of the ops.
    """
    import onnx
    import onnx.inliner
    from onnx import helper

    from twotower_engines.kernels.nodes import CHAINS

    ops = [(NAMESPACE, op) for op in CHAINS]
    flat = onnx.inliner.inline_selected_functions(model, ops, exclude=True)
    states = any(output.name.endswith("ssm_state_new") for output in flat.graph.output)
    nodes: list[onnx.NodeProto] = []
    used: dict[str, onnx.NodeProto] = {}
    for number, node in enumerate(flat.graph.node):
        if node.domain == NAMESPACE and node.op_type in CHAINS:
            nodes += _chain(node, f"{node.name or node.op_type}.{number}", states)
            used.setdefault(node.op_type, node)
        else:
            nodes.append(node)
    if not used:
        raise BuildError(f"the graph {flat.graph.name!r} calls none of {', '.join(CHAINS)}")
    del flat.graph.node[:]
    flat.graph.node.extend(nodes)
    for op, node in used.items():
        flat.functions.extend(_function(op, node, link) for link in CHAINS[op])
    if not any(entry.domain == NAMESPACE for entry in flat.opset_import):
        flat.opset_import.append(helper.make_opsetid(NAMESPACE, 1))
    return flat


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _chain(node: onnx.NodeProto, stem: str, states: bool) -> list[onnx.NodeProto]:
    """The plugin nodes of one call of an op."""
    from onnx import helper

    from twotower_engines.kernels.nodes import CHAINS, NODES, OP_INPUTS, OP_OUTPUTS

    given = {**_attributes(node), "states": int(states)}
    tensors = dict(zip(OP_INPUTS[node.op_type], node.input, strict=True))
    wanted = dict(zip(OP_OUTPUTS[node.op_type], node.output, strict=False))
    made = []
    for link in CHAINS[node.op_type]:
        attributes = next(known.attributes for known in NODES if known.name == link.node)
        for name in link.makes:
            tensors[name] = wanted.get(name) or f"{stem}.{name}"
        made.append(
            helper.make_node(
                link.node,
                [tensors[name] for name in link.takes],
                [tensors[name] for name in link.makes],
                name=f"{stem}.{link.node}",
                domain=NAMESPACE,
                plugin_namespace=NAMESPACE,
                plugin_version=VERSION,
                **{name: given[name] for name in attributes},
            )
        )
    return made


def _function(op: str, call: onnx.NodeProto, link: Link) -> onnx.FunctionProto:
    """What a plugin node computes where its plugin is not registered (see `Link.function`)."""
    from onnx import TensorProto, helper

    from twotower_engines.kernels.nodes import NODES, OP_INPUTS, OP_OUTPUTS

    takes, makes = [f"in_{name}" for name in link.takes], [f"out_{name}" for name in link.makes]
    if link.function == "nothing":
        zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
        nodes = [helper.make_node("Constant", [], [name], value=zero) for name in makes]
    elif link.function == "same":
        nodes = [helper.make_node("Identity", takes[1:2], makes)]
    else:
        # The first of a link's outputs stands for the op's first: what follows hands it on.
        outputs = dict(
            zip(OP_OUTPUTS[op], (f"unused_{name}" for name in OP_OUTPUTS[op]), strict=True)
        )
        outputs |= {name: f"out_{name}" for name in link.makes if name in outputs}
        if link.makes[0] not in OP_OUTPUTS[op]:
            outputs[OP_OUTPUTS[op][0]] = makes[0]
        inputs = takes[: len(OP_INPUTS[op])]
        body = helper.make_node(op, inputs, list(outputs.values()), domain=NAMESPACE)
        body.attribute.extend(call.attribute)
        nodes = [body]
    attributes = next(known.attributes for known in NODES if known.name == link.node)
    return helper.make_function(
        NAMESPACE,
        link.node,
        takes,
        makes,
        nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid(NAMESPACE, 1)],
        attributes=["plugin_namespace", "plugin_version", *attributes],
    )
