"""What is verified: a bundle, or an engine set of the CPU flavour, opened and checked.

Digests and the sets of names are compared here, before anything runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from twotower_export.bundle import read_manifest
from twotower_export.config import ModelConfig, read_json
from twotower_export.errors import BundleError
from twotower_export.layout import TOWERS, Tower, graph_weights
from twotower_export.verification.calls import inputs_of, outputs_of
from twotower_export.verification.structure import differences


@dataclass(frozen=True)
class Target:
    """What is verified: a bundle, or an engine set of the CPU flavour.

    Attributes:
        folder: of the bundle or engine set.
        kind: `bundle` or `engines`.
        manifest: its parsed manifest.json.
        graphs: tower -> file of the float32 graph that runs.
        native: tower -> file of the graph in the checkpoint's dtype, where it is another.
    """

    folder: Path
    kind: str
    manifest: Mapping[str, Any]
    graphs: Mapping[Tower, Path]
    native: Mapping[Tower, Path]


def open_target(path: Path, sku: str | None = None) -> Target:
    """Find the graphs of a bundle or of a CPU engine set, and check their digests.

    Raises:
        BundleError: the folder is neither, or a graph is missing or was changed.
    """
    folder = engine_folder(path, sku) or path
    manifest = read_manifest(folder)
    if (folder / "build.json").is_file():
        build = read_json(folder / "build.json")
        if build["flavour"] != "onnxruntime":
            raise BundleError(f"{folder}: engines of flavour {build['flavour']} hold no graph")
        files, kind, native = build["plans"], "engines", {}
    else:
        kind = "bundle"
        files, native = manifest["graphs"]["float32"], manifest["graphs"]["native"]
    towers = [tower for tower in TOWERS if tower in files]
    if not towers:
        raise BundleError(f"{folder}: names no graph of a tower; export again")
    for name, entry in [*files.items(), *native.items()]:
        _check_digest(folder / entry["file"], entry["sha256"], name)
    graphs = {tower: folder / files[tower]["file"] for tower in towers}
    others = {tower: folder / native[tower]["file"] for tower in towers if tower in native}
    others = {tower: path for tower, path in others.items() if path != graphs[tower]}
    return Target(folder, kind, manifest, graphs, others)


def engine_folder(path: Path, sku: str | None = None) -> Path | None:
    """The folder with build.json: `path`, or the only (or named) SKU in it; None for no engines.

    Raises:
        BundleError: there are several and none was named, or not the named one.
    """
    if (path / "build.json").is_file():
        return path
    found = {one.parent.name: one.parent for one in path.glob("*/build.json")}
    if not found:
        return None
    if sku is None and len(found) == 1:
        return next(iter(found.values()))
    if sku is None or sku not in found:
        asked = "name one with --sku" if sku is None else f"not for {sku}"
        raise BundleError(f"{path}: holds engines for {', '.join(sorted(found))}; {asked}")
    return found[sku]


def structure_problems(
    target: Target, tower: Tower, model: onnx.ModelProto, config: ModelConfig
) -> list[str]:
    """Inputs and outputs that a graph lacks or should not have: nothing can be compared then."""
    weights = set(graph_weights(config, tower))
    inputs = weights | set(inputs_of(config, tower))
    found_inputs = {given.name for given in model.graph.input}
    found_outputs = {output.name for output in model.graph.output}
    where = f"{tower} graph"
    problems = _set_problems(f"{where}: input", found_inputs, inputs)
    problems += _set_problems(f"{where}: output", found_outputs, set(outputs_of(config, tower)))
    listed = set(target.manifest["weights"][tower])
    problems += _set_problems(f"manifest.json, {tower}: weight", listed, weights)
    return problems


def native_problems(
    target: Target, tower: Tower, native: onnx.ModelProto, float32: onnx.ModelProto
) -> list[str]:
    """Where the graph in the checkpoint's dtype is not the float32 one with casts added."""
    problems = differences(native, float32)
    stored = {"BF16": onnx.TensorProto.BFLOAT16, "F32": onnx.TensorProto.FLOAT}
    inputs = {given.name: given.type.tensor_type.elem_type for given in native.graph.input}
    for name, weight in target.manifest["weights"][tower].items():
        dtypes = {target.manifest["tensors"][source]["dtype"] for source in weight["sources"]}
        if name in inputs and {stored[dtype] for dtype in dtypes} != {inputs[name]}:
            problems.append(f"it takes {name} as other than {' and '.join(sorted(dtypes))}")
    return problems


def _set_problems(what: str, found: set[str], expected: set[str]) -> list[str]:
    problems = [f"{what} {name} is missing" for name in sorted(expected - found)]
    return problems + [
        f"{what} {name} is not one of the model's" for name in sorted(found - expected)
    ]


def _check_digest(path: Path, expected: str, name: str) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: the {name} graph is missing; export or build again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise BundleError(f"{path}: the {name} graph was changed since; export or build again")
