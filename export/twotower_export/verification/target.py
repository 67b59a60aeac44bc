"""The target of a verification: a bundle, or an engine set of the CPU flavour, checked.

Digests and the sets of names are compared here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from twotower_contract.config import ModelConfig
from twotower_contract.digests import file_state
from twotower_contract.engine_set import EngineSet
from twotower_contract.errors import BundleError
from twotower_contract.layout import TOWERS, Tower, graph_weights
from twotower_contract.manifest import Manifest, read_manifest
from twotower_export.verification.calls import inputs_of, outputs_of
from twotower_export.verification.structure import differences


@dataclass(frozen=True)
class Target:
    """A bundle, or an engine set of the CPU flavour, to be verified.

    Attributes:
        folder: The bundle's or engine set's folder.
        manifest: Its manifest.
        graphs: Tower -> file of the float32 graph that runs.
        native: Tower -> file of the graph in the checkpoint's dtype, where it is another.
    """

    folder: Path
    manifest: Manifest
    graphs: Mapping[Tower, Path]
    native: Mapping[Tower, Path]


def open_target(found: Path | EngineSet) -> Target:
    """Find the graphs of a bundle or of a CPU engine set, and check their digests.

    Raises:
        BundleError: The folder is no bundle, or a graph is missing or was changed.
    """
    if isinstance(found, EngineSet):
        folder, manifest = found.folder, found.manifest
        if found.build.flavour != "onnxruntime":
            raise BundleError(f"{folder}: engines of flavour {found.build.flavour} hold no graph")
        files = {name: (plan.file, plan.sha256) for name, plan in found.build.plans.items()}
        native = {}
    else:
        folder, manifest = found, read_manifest(found)
        files, native = (
            {name: (graph.file, graph.sha256) for name, graph in manifest.graphs[precision].items()}
            for precision in ("float32", "native")
        )
    towers = [tower for tower in TOWERS if tower in files]
    if not towers:
        raise BundleError(f"{folder}: names no graph of a tower; export again")
    for name, (file, sha256) in [*files.items(), *native.items()]:
        _check_digest(folder / file, sha256, name)
    graphs = {tower: folder / files[tower][0] for tower in towers}
    others = {tower: folder / native[tower][0] for tower in towers if tower in native}
    others = {tower: path for tower, path in others.items() if path != graphs[tower]}
    return Target(folder, manifest, graphs, others)


def structure_problems(
    target: Target, tower: Tower, model: onnx.ModelProto, config: ModelConfig
) -> list[str]:
    """Return inputs and outputs that a graph lacks or should not have."""
    weights = set(graph_weights(config, tower))
    inputs = weights | set(inputs_of(config, tower))
    found_inputs = {given.name for given in model.graph.input}
    found_outputs = {output.name for output in model.graph.output}
    where = f"{tower} graph"
    problems = _set_problems(f"{where}: input", found_inputs, inputs)
    problems += _set_problems(f"{where}: output", found_outputs, set(outputs_of(config, tower)))
    listed = set(target.manifest.weights[tower])
    problems += _set_problems(f"manifest.json, {tower}: weight", listed, weights)
    return problems


def native_problems(
    target: Target, tower: Tower, native: onnx.ModelProto, float32: onnx.ModelProto
) -> list[str]:
    """Return places where the native graph is not the float32 one with casts added."""
    problems = differences(native, float32)
    stored = {
        "BF16": onnx.TensorProto.BFLOAT16,
        "F32": onnx.TensorProto.FLOAT,
        "F8_E4M3": onnx.TensorProto.FLOAT8E4M3FN,
        "I32": onnx.TensorProto.INT32,
    }
    computed = target.manifest.model.tensor_dtype
    inputs = {given.name: given.type.tensor_type.elem_type for given in native.graph.input}
    for name, weight in target.manifest.weights[tower].items():
        dtype, _ = weight.forms(computed)[name]
        if name in inputs and stored[dtype] != inputs[name]:
            problems.append(f"it takes {name} as other than {dtype}")
    return problems


def _set_problems(what: str, found: set[str], expected: set[str]) -> list[str]:
    problems = [f"{what} {name} is missing" for name in sorted(expected - found)]
    return problems + [
        f"{what} {name} is not one of the model's" for name in sorted(found - expected)
    ]


def _check_digest(path: Path, expected: str, name: str) -> None:
    state = file_state(path, expected)
    if state != "ok":
        what = "is missing" if state == "missing" else "was changed since"
        raise BundleError(f"{path}: the {name} graph {what}; export or build again")
