"""From an order to the job of a worker: what TensorRT and TensorRT-RTX builds have in common.

Weights are inputs of fixed shape, so a plan holds none; only ids, lengths and states have dynamic
dimensions, and the profiles give these their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower_engines.errors import BuildError
from twotower_engines.flavours.flavour import Order
from twotower_engines.flavours.process import Job
from twotower_engines.flavours.profiles import Profile, Sizes

__all__ = ["graph_inputs", "plan_job", "plan_report", "profiles_as_json"]


def plan_job(order: Order) -> Job:
    """Return the job that builds an order's plan.

    Args:
        order: Its recipe has `profiles` and `flags`, and may have `hardware` and
            `compute_capabilities`; see `library_build.build_plan`.

    Raises:
        BuildError: The graph cannot be read, or has a dimension that no profile knows.
    """
    inputs = graph_inputs(order.graph)
    dynamic = {
        name: dims for name, dims in inputs.items() if any(isinstance(dim, str) for dim in dims)
    }
    profiles = [_profile(values) for values in order.recipe["profiles"]]
    shapes = [
        {name: profile.shapes(dims, f"{order.graph}: {name}") for name, dims in dynamic.items()}
        for profile in profiles
    ]
    return {
        **order.recipe,
        "graph": str(order.graph),
        "plan": str(order.plan),
        "inputs": inputs,
        "profiles": shapes,
    }


def graph_inputs(path: Path) -> dict[str, list[int | str]]:
    """Return name and dimensions of each input of an ONNX file; dynamic dimensions by their name.

    Raises:
        BuildError: It is no ONNX file, or a dimension has neither size nor name.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as problem:  # protobuf's own error, of a class that moves between versions
        raise BuildError(f"{path}: is no ONNX file ({problem}); export again") from problem
    found: dict[str, list[int | str]] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        found[value.name] = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims
        ]
        if "" in found[value.name]:
            raise BuildError(f"{path}: a dimension of {value.name} has neither a size nor a name")
    return found


def profiles_as_json(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """Return profiles as recipes and build.json hold them."""
    return [profile.as_json() for profile in profiles]


def plan_report(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what build.json says of a plan: what the builder saw and what it took."""
    figures = ("peak_rss", "cpu_seconds", "waited_seconds")
    keys = ("layers", "inputs", "outputs", "bytes", *figures, "versions")
    return {key: result[key] for key in keys}


def _profile(values: Mapping[str, Any]) -> Profile:
    sizes = {dim: Sizes(*three) for dim, three in values.items() if dim != "name"}
    return Profile(values["name"], sizes)
