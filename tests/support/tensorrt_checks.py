"""Checks that need TensorRT's bindings; each runs in a process of its own and prints JSON.

The bindings are the real ones of 11.4; the library under them is TensorRT-RTX, which is the one
that can be had without a GPU (see the fixture `tensorrt_environment`). It validates and registers
our plugins, and its parser looks for them; it ends the process when a plugin layer is to be added
without a GPU, and it builds no plugins of this kind at all.

    python -m tests.support.tensorrt_checks <check> [model.onnx ..]
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

# NVIDIA's wheel `tensorrt` gives its bindings this name; here are only the bindings.
trt: Any = importlib.import_module("tensorrt_bindings")
sys.modules["tensorrt"] = trt
trtp: Any = importlib.import_module("tensorrt_bindings.plugin")
sys.modules["tensorrt.plugin"] = trtp

from tests.support.released_nodes import attributes_of, dtype_of, form_of, tensor_shapes  # noqa: E402
from twotower_engines.errors import BuildError  # noqa: E402
from twotower_engines.kernels import plugins  # noqa: E402
from twotower_engines.kernels.node import NAMESPACE  # noqa: E402
from twotower_engines.kernels.nodes import NODES, OPS  # noqa: E402
from twotower_engines.kernels.spec import Sizes  # noqa: E402


def parse(path: str) -> dict[str, Any]:
    """What the parser makes of a model: layer types, or its complaint."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    done = parser.parse(Path(path).read_bytes())
    return {
        "parsed": done,
        "errors": [parser.get_error(i).desc() for i in range(parser.num_errors)],
        "layers": [network.get_layer(i).type.name for i in range(network.num_layers)],
    }


def registered() -> Any:
    """Every creator's attributes, before and after TensorRT registered the definitions."""
    before = creators()
    plugins.register_plugins("9.0")
    plugins.register_plugins("9.0")  # twice is once
    try:
        plugins.register_plugins("8.0")
    except BuildError as error:
        refusal = str(error)
    return {"before": before, "after": creators(), "refusal": refusal}


def creators() -> dict[str, dict[str, str]]:
    """Our plugins in TensorRT's registry: name to the types of their attributes."""
    return {
        creator.name: {field.name: field.type.name for field in creator.field_names}
        for creator in trt.get_plugin_registry().all_creators
        if creator.plugin_namespace == NAMESPACE
    }


class Expression:
    """Stands in for TensorRT's symbolic dimension: a number, so that results can be read."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """Stands in for TensorRT's builder of symbolic dimensions, which only a real build makes."""

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, kind: Any, first: Expression, second: Expression) -> Expression:
        a, b = first.value, second.value
        by_name = {
            "SUM": a + b,
            "SUB": a - b,
            "PROD": a * b,
            "MIN": min(a, b),
            "FLOOR_DIV": a // b if b else 0,
            "CEIL_DIV": -(-a // b) if b else 0,
        }
        return Expression(by_name[kind.name])


INPUTS = {
    "RefineVocabulary": [
        ("bf16", (2, 16, 9000)),
        *[("i32", (2, 16)), ("i32", (2,))],
        ("fp32", (2,)),
        *[("i32", (2,))] * 2,
    ],
    "ExpertsUp": [
        ("bf16", (40, 64)),
        ("bf16", (8, 96, 64)),
        ("i32", (80,)),
        ("i32", (13, 4)),
        ("i32", (9, 4)),
        ("i32", (40, 2)),
    ],
    "MambaSpans": [
        ("bf16", (3, 200, 2 * 32 + 2 * 2 * 16 + 4)),
        ("bf16", (3, 3, 96)),
        ("fp32", (3, 4, 8, 16)),
        ("i32", (3,)),
        ("bf16", (96, 4)),
        ("bf16", (96,)),
        *[("fp32", (4,))] * 3,
        ("bf16", (32,)),
    ],
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "RefineVocabulary": {"mask_id": 3},
    "ExpertsUp": {},
    "MambaSpans": {"n_groups": 2},
}


def implementations() -> Any:
    """Shapes, launch and PTX of three nodes, through the functions that TensorRT would call."""
    plugins.register_plugins("9.0")
    trt.IDimensionExpr = Expression
    trtp._tensor.SymIntExpr._exprBuilder = Builder()
    dtypes = {"bf16": trt.bfloat16, "fp32": trt.float32, "i32": trt.int32}
    made = {}
    for name, inputs in INPUTS.items():
        definition = trtp._lib.QDP_REGISTRY[f"{NAMESPACE}::{name}"]
        shapes = [trtp.ShapeExprs.from_tuple(dims) for _, dims in inputs]
        descs = [trtp.TensorDesc(s, dtypes[d]) for s, (d, _) in zip(shapes, inputs, strict=True)]
        for desc, (_, dims) in zip(descs, inputs, strict=True):
            desc.shape = trtp.Shape(dims)
        attributes = ATTRIBUTES[name]
        outputs = definition.register_func(*descs, **attributes)
        entry, ptx, launch, integers = definition.aot_impl_func(
            *descs, *attributes.values(), outputs, None
        )
        sides = (launch.grid_x, launch.grid_y, launch.grid_z, launch.block_x, launch.shared_mem)
        made[name] = {
            "outputs": [
                [d.dtype.name, [e.constant_value() for e in d.shape_expr]] for d in outputs
            ],
            "entry": entry,
            "ptx": ptx,
            "launch": [side._expr.value for side in sides],
            "integers": [argument._expr.value for argument in integers],
        }
    return made


def created(name: str, attributes: Mapping[str, Any]) -> Any:
    """A plugin as TensorRT's own class makes it, of a node that is registered."""
    creator = trt.get_plugin_registry().get_creator(name, "1", NAMESPACE)
    kinds = {int: trt.PluginFieldType.INT64, float: trt.PluginFieldType.FLOAT64}
    fields = [
        trt.PluginField(key, np.array([value]), kinds[type(value)])
        for key, value in attributes.items()
    ]
    return creator.create_plugin(
        name,
        NAMESPACE,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )


def profile_desc(dtype: Any, usual: Sequence[int], most: Sequence[int]) -> Any:
    """What TensorRT says of a tensor in a profile: -1 where its size is dynamic, and the bounds."""
    made = trt.DynamicPluginTensorDesc()
    made.desc = trt.PluginTensorDesc()
    dims = [size if size == bound else -1 for size, bound in zip(usual, most, strict=True)]
    made.desc.dims, made.desc.type = trt.Dims(dims), dtype
    made.desc.format = trt.TensorFormat.LINEAR
    made.min, made.opt, made.max = (trt.Dims(list(sizes)) for sizes in (usual, usual, most))
    return made


class Launch:
    """Stands in for the parameters that TensorRT hands out to be set."""


class Setter(dict[int, Any]):
    """Stands in for the list of a kernel's integers."""

    nbSymExprs = 0  # noqa: N815


def profiles() -> Any:
    """Every node through NVIDIA's own plugin class, over profiles of 1 to 64 rows.

    For each tactic: the kernels that the class was given, one per profile, and the one it keeps.
    """
    plugins.register_plugins("9.0")
    trt.IDimensionExpr = Expression
    trt.DimsExprs = lambda count: [None] * count
    trtp._tensor.SymExprImpl = lambda integer: integer._expr
    dtypes = plugins.DTYPES
    sizes = Sizes(vocab_size=261, hidden=192, inner=64, experts=8, experts_per_token=2, heads=2)
    sizes = replace(sizes, groups=1)
    made: dict[str, Any] = {}
    chosen = [op for op in OPS if not op.endswith(("FP8", "INT4"))]  # the same nodes, other banks
    for node in {node.name: node for op in chosen for node in OPS[op].chain}.values():
        plugin = created(node.name, attributes_of(node, sizes))
        form = form_of(node)
        sizes = replace(sizes, experts_format=form)
        types = [dtypes[dtype_of(name, form)] for name in node.takes]
        ranks = [len(tensor_shapes(sizes, 1, 16)[name]) for name in node.takes]
        types += plugin.get_output_data_types(types, ranks)
        given: dict[int, list[Any]] = {}
        for rows in (1, 4, 16, 64):
            usual, most = (tensor_shapes(sizes, rows, block) for block in (16, 64))
            dims = [[Expression(size) for size in usual[name]] for name in node.takes]
            out = plugin.get_output_shapes(dims, [], Builder())
            shapes = [(usual[name], most[name]) for name in node.takes]
            shapes += [([e.value for e in one],) * 2 for one in out]
            descs = [profile_desc(t, *sides) for t, sides in zip(types, shapes, strict=True)]
            count = len(node.takes)
            plugin.get_supported_format_combinations(descs, count)
            plugin.configure_plugin(descs[:count], descs[count:])
            for tactic in plugin.get_valid_tactics() or [0]:
                plugin.set_tactic(tactic)
                launch, setter = Launch(), Setter()
                plugin.get_launch_params(dims, descs, count, launch, setter, Builder())
                inner = [one.desc for one in descs]
                kernel = plugin.get_kernel(inner[:count], inner[count:])
                given.setdefault(tactic, []).append((*kernel, launch.grid_y.value))
        kept = {}
        for tactic in given:
            plugin.set_tactic(tactic)
            kept[tactic] = plugin.get_kernel(inner[:count], inner[count:])
        made[node.name] = {
            "same": [all(one[:2] == kept[t] for one in given[t]) for t in given],
            "kernels": len({ptx for _, ptx in kept.values()}),
            "grids": {t: [one[2] for one in given[t]] for t in given},
        }
    return made


def shapes_unknown() -> Any:
    """What TensorRT asks first: output types, on dimensions that it does not know yet."""
    plugins.register_plugins("9.0")
    made = {}
    dtypes = {"bf16": trt.bfloat16, "fp32": trt.float32, "i32": trt.int32}
    for name, inputs in INPUTS.items():
        plugin = created(name, ATTRIBUTES[name])
        types = [dtypes[dtype] for dtype, _ in inputs]
        ranks = [len(dims) for _, dims in inputs]
        made[name] = [dtype.name for dtype in plugin.get_output_data_types(types, ranks)]
    return made


def functions(*paths: str) -> Any:
    """Parses models while nothing is registered."""
    return [parse(path) for path in paths]


def quick_plugins(*paths: str) -> Any:
    """Parses models with our plugins registered: RTX's parser finds them and refuses their kind."""
    plugins.register_plugins("9.0")
    return [parse(path) for path in paths]


def other_plugins(path: str) -> None:
    """Parses a model with plugins of the kind that RTX takes, under our plugins' names.

    Prints what the parser asks the creator for, and is then ended by the library.
    """

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, name: str, attributes: dict[str, type]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version = name, "1"
            self.plugin_namespace = NAMESPACE
            kinds = {int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32}
            fields = [trt.PluginField(k, np.array([]), kinds[t]) for k, t in attributes.items()]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> None:
            given = {field.name: field.data.tolist() for field in fields}
            print(json.dumps({"plugin": self.name, "attributes": given}), flush=True)

    made = [Creator(node.name, dict(node.attributes)) for node in NODES.values()]
    for creator in made:
        trt.get_plugin_registry().register_creator(creator, NAMESPACE)
    parse(path)


def built(path: str) -> Any:
    """Builds a plan of a model, without plugins; the size of the plan."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(Path(path).read_bytes())
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    return {"bytes": 0 if plan is None else plan.nbytes}


CHECKS = (
    registered,
    implementations,
    profiles,
    shapes_unknown,
    functions,
    quick_plugins,
    other_plugins,
    built,
)

if __name__ == "__main__":
    result = {check.__name__: check for check in CHECKS}[sys.argv[1]](*sys.argv[2:])
    if result is not None:
        print(json.dumps(result))
