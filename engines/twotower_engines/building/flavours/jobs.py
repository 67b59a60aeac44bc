"""From an order to the job of a worker: what TensorRT and TensorRT-RTX builds have in common.

Weights are inputs of fixed shape, so an engine holds none; only ids, lengths, states have dynamic
dimensions, and the profiles give these their sizes.

The graph is made ready here, so that no worker holds the ONNX library while its compiler works.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower_contract.skus import Sku
from twotower_engines.building.flavours.compiled import signature_of
from twotower_engines.building.flavours.flat_banks import with_flat_banks
from twotower_engines.building.flavours.flavour import Order, traffic_file
from twotower_engines.building.flavours.gpu_graph import gpu_graph, set_sizes
from twotower_engines.building.flavours.process import Job
from twotower_engines.building.flavours.profiles import FIXED, Profile, Sizes
from twotower_engines.errors import BuildError

if TYPE_CHECKING:
    import onnx

FLAGS = {"TF32": False, "STRICT_NANS": True}
"""Builder flags to set or to clear. Unless told not to, TensorRT rounds what float32 products take
to TF32's ten bits; here float32 in a graph (scan, router, scores) means float32. And it makes 0 of
0 * x and of x - x, whatever x is; here NaN tells that a row has failed, and must come through."""


def check_arch(sku: Sku, where: str) -> None:
    """Refuse a SKU whose machines have another CPU than this one.

    Args:
        sku: The target's SKU.
        where: The remedy, for the message.

    Raises:
        BuildError: An engine built here would not load there.
    """
    if sku.arch != platform.machine():
        raise BuildError(
            f"engines for {sku.name} must be built on {sku.arch}, because engines run only on the "
            f"CPU architecture that built them, and this machine is {platform.machine()}; {where}"
        )


def installed(packages: Sequence[str]) -> str | None:
    """Return the version of the first of some distributions that is installed, or None."""
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def engine_job(order: Order) -> Job:
    """Return the job that builds an order's plan, and write its graph beside the plan.

    Args:
        order: Its recipe is that of `engine_recipe`, and may have `kernels`, `hardware` and
            `compute_capabilities`; see `library_build.build_engine_file`.

    Raises:
        BuildError: The graph cannot be read, or has a dimension that no profile knows.
    """
    profiles = [_profile(values) for values in order.recipe["profiles"]]
    fixed = _fixed_sizes(profiles)
    own = order.recipe.get("graph_for")  # TensorRT builds for the GPU that it runs on
    capabilities = order.recipe.get("compute_capabilities") or ([own] if own else [])
    has_kernels = bool(order.recipe.get("kernels"))
    model = gpu_graph(read_graph(order.graph), capabilities, has_kernels=has_kernels)
    inputs = {
        name: [fixed.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]
        for name, dims in graph_inputs(model, order.graph).items()
    }
    dynamic = {
        name: dims for name, dims in inputs.items() if any(isinstance(dim, str) for dim in dims)
    }
    shapes = [
        {name: profile.shapes(dims, f"{order.graph}: {name}") for name, dims in dynamic.items()}
        for profile in profiles
    ]
    if not has_kernels:
        model = with_flat_banks(model)
    set_sizes(model, fixed)
    graph = order.engine.with_suffix(".gpu.onnx")
    graph.write_bytes(model.SerializeToString())
    return {
        **order.recipe,
        "graph": str(graph),
        "signature": [list(map(astuple, tensors)) for tensors in signature_of(model)],
        "plan": str(order.engine),
        "traffic": str(traffic_file(order.engine)),
        "profiles": shapes,
        "usual": [
            [profile.name, {dim: one.usual for dim, one in profile.sizes.items()}]
            for profile in profiles
        ],
    }


def _fixed_sizes(profiles: Sequence[Profile]) -> dict[str, int]:
    """Return the dimensions that become numbers, because they have one size in all profiles."""
    sizes = profiles[0].sizes
    return {dim: sizes[dim].most for dim in FIXED if dim in sizes}


def read_graph(path: Path) -> onnx.ModelProto:
    """Return the model of an ONNX file.

    Raises:
        BuildError: It is none.
    """
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as problem:  # protobuf's own error, of a class that moves between versions
        raise BuildError(f"{path}: is no ONNX file ({problem}); export again") from problem


def graph_inputs(model: onnx.ModelProto, path: Path) -> dict[str, list[int | str]]:
    """Return name and dimensions of each input of a graph; dynamic dimensions by their name.

    Args:
        path: The file that it was read from, for messages.

    Raises:
        BuildError: A dimension has neither size nor name.
    """
    found: dict[str, list[int | str]] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        found[value.name] = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims
        ]
        if "" in found[value.name]:
            raise BuildError(f"{path}: a dimension of {value.name} has neither a size nor a name")
    return found


def engine_recipe(profiles: Sequence[Profile]) -> dict[str, Any]:
    """Return what the recipes of both flavours have in common.

    An engine runs only on the CPU architecture that it was built on, so that is part of it.
    """
    return {
        "profiles": [profile.as_json() for profile in profiles],
        "flags": FLAGS,
        "verbosity": "DETAILED",  # so that an inspector can name layers, tactics and shapes
        "machine": platform.machine(),
    }


def engine_report(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what build.json says of an engine: what the builder saw and what it took."""
    figures = ("peak_rss", "cpu_seconds", "waited_seconds")
    keys = ("parsed", "flags", "engine", "bytes", "scratch", *figures, "versions")
    return {key: result[key] for key in keys}


def _profile(values: Mapping[str, Any]) -> Profile:
    sizes = {dim: Sizes(*three) for dim, three in values.items() if dim != "name"}
    return Profile(values["name"], sizes)
