"""Write a bundle: the graphs of a checkpoint's towers, the map of its weights, its tokenizer.

A bundle holds no weights. `manifest.json` says, for every weight input of a graph, which tensors of
which shard it is made of; the runtime maps those bytes where they lie.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from twotower_contract.atomic import WITH_CARE, Writing, check_replaceable, new_folder
from twotower_contract.digests import file_sha256
from twotower_contract.errors import BundleError
from twotower_contract.json_file import format_of
from twotower_contract.layout import BANKS, Tower, WeightSource, graph_weights
from twotower_contract.manifest import (
    FORMAT,
    MANIFEST_FILE,
    MAX_TOKENS_PER_CALL,
    CheckpointSource,
    GraphFile,
    Manifest,
    WeightInput,
    write_manifest,
)
from twotower_contract.quantized import codes_name
from twotower_contract.shards import TensorEntry
from twotower_export.checkpoint import Checkpoint
from twotower_export.progress import Progress, silent
from twotower_export.reference.golden import golden_for
from twotower_export.tokens import tokenizer_files

Precision = Literal["native", "float32"]
Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class _GraphToWrite:
    """One file of the bundle, and how to build it."""

    name: str
    precisions: tuple[Precision, ...]
    file: str
    dtype: Dtype
    tower: Tower | None


def write_bundle(
    checkpoint: Checkpoint,
    out: Path,
    *,
    towers: Sequence[Tower] | None = None,
    progress: Progress = silent,
    writing: Writing = WITH_CARE,
) -> Manifest:
    """Write the bundle of a checkpoint; a bundle that lies there already is replaced.

    Nothing appears at `out` before everything is written.

    Args:
        towers: Towers to export; all that the checkpoint has by default.
        writing: Whether to replace whatever is there, or to write nothing.

    Returns:
        The manifest.

    Raises:
        BundleError: `out` holds something else, or cannot be written.
        CheckpointError: The checkpoint lacks one of the towers.
    """
    chosen = tuple(tower for tower in checkpoint.towers if towers is None or tower in towers)
    what = "a bundle"
    check_replaceable(out, what, is_bundle, BundleError, writing)
    writing.begin(out, what)
    with new_folder(out, BundleError) as folder:
        graphs: dict[str, dict[str, GraphFile]] = {}
        todo = list(_graphs(checkpoint, chosen))
        for number, graph in enumerate(todo):
            progress(f"writing {graph.file}", number, len(todo))
            record = _write_graph(checkpoint, graph, folder)
            for precision in graph.precisions:
                graphs.setdefault(precision, {})[graph.name] = record
        progress("writing graphs", len(todo), len(todo))
        for file in tokenizer_files(checkpoint.path):
            shutil.copyfile(file, folder / file.name)
        golden, missing = golden_for(checkpoint, chosen)
        manifest = _manifest(checkpoint, chosen)
        manifest = replace(manifest, graphs=graphs, golden=golden, golden_missing=missing)
        write_manifest(folder, manifest)
    return manifest


def is_bundle(folder: Path) -> bool:
    """Whether a folder has the manifest of a bundle, of whatever version."""
    return bool(format_of(folder / MANIFEST_FILE) == FORMAT)


def _manifest(checkpoint: Checkpoint, towers: tuple[Tower, ...]) -> Manifest:
    """Return the manifest of a checkpoint's bundle, without its graphs and its golden answer."""
    weights = {
        tower: graph_weights(checkpoint.config, tower, base=checkpoint.base) for tower in towers
    }
    return Manifest(
        twotower_version=importlib.metadata.version("twotower"),
        checkpoint=CheckpointSource(
            checkpoint.path, checkpoint.id, checkpoint.revision, checkpoint.fingerprint
        ),
        model=checkpoint.config,
        towers=towers,
        max_tokens_per_call=MAX_TOKENS_PER_CALL,
        shards=checkpoint.shards,
        tensors=checkpoint.tensors,
        graphs={},
        weights={
            tower: {
                name: _weight_input(name, one, checkpoint.tensors) for name, one in inputs.items()
            }
            for tower, inputs in weights.items()
        },
    )


def _weight_input(
    name: str, weight: WeightSource, tensors: Mapping[str, TensorEntry]
) -> WeightInput:
    sources = tuple(codes_name(source, tensors) for source in weight.sources)
    return WeightInput.of(name, replace(weight, sources=sources), tensors)


def _graphs(checkpoint: Checkpoint, towers: Sequence[Tower]) -> Iterator[_GraphToWrite]:
    """Files of a bundle. Where everything is float32, one file serves as both precisions."""
    names: list[tuple[str, Tower | None]] = [(tower, tower) for tower in towers]
    if "denoiser" in towers:
        names.append(("refine", None))
    native: Dtype = "float32" if checkpoint.config.dtype == "float32" else "bfloat16"
    same = native == "float32" and all(t.dtype == "F32" for t in checkpoint.tensors.values())
    for name, tower in names:
        first: tuple[Precision, ...] = ("native", "float32") if same else ("native",)
        yield _GraphToWrite(name, first, f"graphs/{name}.onnx", native, tower)
        if not same:
            file = f"graphs/float32/{name}.onnx"
            yield _GraphToWrite(name, ("float32",), file, "float32", tower)


def _write_graph(checkpoint: Checkpoint, graph: _GraphToWrite, folder: Path) -> GraphFile:
    """Build and save one graph; returns its entry in the manifest."""
    import onnx_ir

    from twotower_export.graph import build_context_graph, build_denoiser_graph, build_refine_graph

    builders: Mapping[str, Callable[..., onnx_ir.Model]] = {
        "context": build_context_graph,
        "denoiser": build_denoiser_graph,
        "refine": build_refine_graph,
    }
    # nothing of where the checkpoint lies: the same weights give the same graphs, under any name
    metadata = {
        "twotower_version": importlib.metadata.version("twotower"),
        "fingerprint": checkpoint.fingerprint,
    }
    dtypes, given = _weight_forms(checkpoint, graph)
    model = builders[graph.name](checkpoint.config, graph.dtype, dtypes, metadata, **given)
    path = folder / graph.file
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(model, path)
    return GraphFile(graph.file, file_sha256(path))


def _weight_forms(
    checkpoint: Checkpoint, graph: _GraphToWrite
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the dtype of each weight, and what else a tower's graph has to know of them.

    As they are stored in the native graph; all is float32 in the float32 one.

    Raises:
        BundleError: INT4 matrices have groups of several sizes.
    """
    if graph.tower is None:
        return {}, {}
    weights = graph_weights(checkpoint.config, graph.tower, base=checkpoint.base)
    inputs = [_weight_input(name, one, checkpoint.tensors) for name, one in weights.items()]
    groups = {one.group for one in inputs if one.group}
    if len(groups) > 1:
        raise BundleError(
            f"{checkpoint.path}: a scale is shared by {' or '.join(map(str, sorted(groups)))} "
            "weights, depending on the matrix; one size is supported: quantize the model anew"
        )
    flat = {"flat_banks": not any(one.format for one in inputs if one.name.endswith(BANKS))}
    if "native" not in graph.precisions:
        return dict.fromkeys(weights, "F32"), flat
    return {one.name: one.input_dtype for one in inputs}, flat | {"group": max(groups, default=0)}
