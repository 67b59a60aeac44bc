"""Register our kernels with TensorRT as plugins, whose PTX becomes part of an engine file.

TensorRT (10.9 and later) asks an ahead-of-time plugin for its kernel once, while it builds. The
engine file then holds the PTX, and a server needs neither this package nor Triton's compiler. One
plugin is one launch, so an op is a chain of plugins (`nodes`). Where a node has tactics, TensorRT
times each and keeps one kernel per tactic for all profiles. A build takes two steps:

    register_plugins("9.0")        # TensorRT's registry knows the nodes; their kernels compile
    model = with_plugins(model)    # the graph calls the nodes in place of the ops (`plugin_graph`)

TensorRT-RTX takes no plugins of this kind: its engines are built from the graph as exported.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing  # noqa: F401 - tensorrt.plugin uses it and does not import it
import tensorrt as trt
import tensorrt.plugin as trtp

from twotower_engines.errors import BuildError
from twotower_engines.kernels.node import NAMESPACE, Call, Node, node_kernel
from twotower_engines.kernels.nodes import NODES
from twotower_engines.kernels.targets import Target, target

DTYPES = {"bf16": trt.bfloat16, "fp32": trt.float32, "i32": trt.int32, "fp8": trt.fp8}
"""Types of tensors by our names; TensorRT gives a plugin no bytes."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_registered: list[str] = []
"""The compute capability that this process has registered its plugins for, if any."""


def register_plugins(compute_capability: str) -> None:
    """Register every node with TensorRT, for engines of one GPU generation.

    TensorRT validates each definition here. A process builds for one generation: the registry
    cannot forget a plugin.

    Args:
        compute_capability: Compute capability of the GPU that the engine is for, as "9.0".

    Raises:
        BuildError: No kernels exist for the GPU, or the process has registered the plugins for
            another one.
    """
    wanted = target(compute_capability)
    if _registered and _registered != [compute_capability]:
        raise BuildError(
            f"this process has registered its plugins for {_registered[0]} and cannot build for "
            f"{compute_capability}; build each GPU generation in a process of its own"
        )
    if _registered:
        return
    for node in NODES.values():
        _register(node, wanted)
    _registered.append(compute_capability)


def _register(node: Node, wanted: Target) -> None:
    """Register a node's shape function and its kernel, with signatures that TensorRT inspects."""
    plugin_id = f"{NAMESPACE}::{node.name}"
    count = len(node.takes)

    def describe(*descs: Any, **attributes: Any) -> Any:
        outputs = node.outputs(_call(node, descs, attributes, sized=False))
        return tuple(trtp.from_shape_expr(out.dims, DTYPES[out.dtype]) for out in outputs)

    def tactics(*args: Any) -> Any:
        dtypes = [desc.dtype.name for desc in (*args[:count], *args[-1])]
        return [trtp.AutoTuneCombination(",".join(dtypes), "LINEAR", range(1, node.tactics + 1))]

    def implement(*args: Any) -> Any:
        attributes = dict(zip(node.attributes, args[count:-2], strict=True))
        call = _call(node, args[:count], attributes, sized=True)
        # A plugin without tactics of its own is asked for number 0.
        return _implementation(node, replace(call, tactic=args[-1] or 1), wanted)

    tensors = [(name, trtp.TensorDesc) for name in node.takes]
    given = [*tensors, *node.attributes.items()]
    outputs: Any = types.GenericAlias(tuple, (trtp.TensorDesc,) * len(node.makes))
    launch = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    _sign(describe, given, outputs)
    _sign(implement, [*given, ("outputs", outputs), ("tactic", int)], launch)
    trtp.register(plugin_id)(describe)
    if node.tactics > 1:
        _sign(tactics, [*given, ("outputs", outputs)], list[trtp.AutoTuneCombination])
        trtp.autotune(plugin_id)(tactics)
    trtp.aot_impl(plugin_id)(implement)


def _sign(function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], result: Any) -> None:
    """Give a function that takes any arguments the signature that TensorRT validates."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=result,
    )


def _call(node: Node, descs: Sequence[Any], attributes: dict[str, Any], *, sized: bool) -> Call:
    named = dict(zip(node.takes, descs, strict=True))
    for name, desc in named.items():
        if desc.dtype not in DTYPE_NAMES:
            raise BuildError(
                f"plugin {node.name}: input {name} is {desc.dtype}; kernels take "
                f"{', '.join(DTYPES)}"
            )
    shapes = {name: desc.shape for name, desc in named.items()} if sized else {}
    return Call(
        dims={name: list(desc.shape_expr) for name, desc in named.items()},
        largest={
            name: tuple(shape.max if shape.is_dynamic else shape) for name, shape in shapes.items()
        },
        dtypes={name: DTYPE_NAMES[desc.dtype] for name, desc in named.items()},
        attributes=attributes,
        cdiv=trtp.cdiv,
        minimum=trtp.min,
    )


def _implementation(node: Node, call: Call, wanted: Target) -> Any:
    """Return entry name, PTX, launch parameters and integer arguments of one node."""
    kernel = node_kernel(node, call, wanted)
    params = trtp.KernelLaunchParams(
        *kernel.grid, block_x=kernel.threads, shared_mem=kernel.shared_memory
    )
    arguments = trtp.SymIntExprs(len(kernel.integers))
    for index, size in enumerate(kernel.integers):
        arguments[index] = trtp.SymInt32(size)
    return kernel.entry, kernel.ptx, params, arguments
