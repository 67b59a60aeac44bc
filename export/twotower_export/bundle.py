"""Writes a bundle: the graphs of a checkpoint's towers, the map of its weights, its tokenizer.

A bundle holds no weights. `manifest.json` says, for every weight input of a graph, which tensors of
which shard it is made of; the runtime maps those bytes where they lie.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from twotower_export.checkpoint import Checkpoint, Progress
from twotower_export.config import read_json
from twotower_export.errors import BundleError, ConfigError
from twotower_export.layout import Tower, WeightSource, graph_weights
from twotower_export.manifest_check import check_manifest
from twotower_export.reference.golden import golden_for
from twotower_export.tokens import tokenizer_files

FORMAT: Final = "twotower-bundle"
FORMAT_VERSION: Final = 1
MANIFEST_FILE: Final = "manifest.json"
MAX_TOKENS_PER_CALL: Final = 256

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the bundle of a checkpoint; a bundle that lies there already is replaced.

    Nothing appears at `out` before everything is written.

    Args:
        checkpoint: the open checkpoint.
        out: folder of the bundle.
        towers: towers to export; all that the checkpoint has by default.
        progress: told about each graph.

    Returns:
        The manifest.

    Raises:
        BundleError: `out` holds something else, or cannot be written.
        CheckpointError: the checkpoint lacks one of the towers.
    """
    chosen = tuple(tower for tower in checkpoint.towers if towers is None or tower in towers)
    check_replaceable(out, MANIFEST_FILE, FORMAT, "a bundle")
    manifest = manifest_of(checkpoint, chosen)
    with folder_beside(out) as partial:
        graphs: dict[str, dict[str, dict[str, str]]] = {}
        todo = list(_graphs(checkpoint, chosen))
        for number, graph in enumerate(todo):
            if progress is not None:
                progress(f"writing {graph.file}", number, len(todo))
            record = _write_graph(checkpoint, graph, partial)
            for precision in graph.precisions:
                graphs.setdefault(precision, {})[graph.name] = record
        if progress is not None:
            progress("writing graphs", len(todo), len(todo))
        for file in tokenizer_files(checkpoint.path):
            shutil.copyfile(file, partial / file.name)
        manifest["graphs"] = graphs
        manifest["golden"], manifest["golden_missing"] = golden_for(checkpoint, chosen)
        text = json.dumps(manifest, indent=1, sort_keys=False)
        (partial / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
    return manifest


def manifest_of(checkpoint: Checkpoint, towers: Sequence[Tower]) -> dict[str, Any]:
    """The manifest of a checkpoint's bundle, without its graphs and its golden answer."""
    config = checkpoint.config
    weights = {tower: graph_weights(config, tower, base=checkpoint.base) for tower in towers}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "twotower_version": importlib.metadata.version("twotower"),
        "checkpoint": {
            "path": str(checkpoint.path),
            "id": checkpoint.id,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
        },
        "model": config.model_block(),
        "dtype": config.dtype,
        "mask_token_id": config.mask_token_id,
        "eos_token_ids": list(config.eos_token_ids),
        "towers": list(towers),
        "max_tokens_per_call": MAX_TOKENS_PER_CALL,
        "shards": [
            {
                "file": shard.file,
                "size": shard.size,
                "data_start": shard.data_start,
                "sample_sha256": shard.sample_sha256,
                "sha256": shard.sha256,
            }
            for shard in checkpoint.shards
        ],
        "tensors": {
            name: {
                "shard": tensor.shard,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "begin": tensor.begin,
                "end": tensor.end,
                "sample": tensor.sample,
            }
            for name, tensor in checkpoint.tensors.items()
        },
        "graphs": {},
        "weights": {
            tower: {name: _weight_entry(weight) for name, weight in inputs.items()}
            for tower, inputs in weights.items()
        },
        "golden": None,
        "golden_missing": None,
    }


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Read a bundle's manifest.

    Raises:
        BundleError: there is none, it has another format or version, or it is malformed.
    """
    path = bundle / MANIFEST_FILE
    try:
        manifest = read_json(path)
    except ConfigError as error:
        raise BundleError(f"{error}; write the bundle again with `twotower export`") from error
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path}: is {manifest.get('format')!r} version {manifest.get('format_version')!r}, "
            f"not {FORMAT!r} version {FORMAT_VERSION}; write it again with `twotower export`"
        )
    check_manifest(manifest, str(path))
    return manifest


def check_replaceable(out: Path, marker: str, format_: str, what: str) -> None:
    """Refuse to write over anything but an empty folder or an earlier output of the same kind.

    Args:
        out: the folder to be written.
        marker: JSON file that such an output has.
        format_: value of `format` in it.
        what: what to call it.

    Raises:
        BundleError: there is something else.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise BundleError(f"{out}: is a file; name a folder for {what}")
    if not any(out.iterdir()):
        return
    try:
        if read_json(out / marker).get("format") == format_:
            return
    except ConfigError:
        pass
    raise BundleError(
        f"{out}: holds files that are not {what}, and would be replaced; name another folder"
    )


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends without an error.

    Raises:
        BundleError: the disk is full, or the place cannot be written.
    """
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        partial.chmod(0o755)  # mkdtemp makes a private one; a server may be another user
        yield partial
        _take_place(partial, out)
    except OSError as error:
        where = error.filename or out
        raise BundleError(f"{where}: cannot be written: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, out: Path) -> None:
    """Rename, with what lay there before put aside first: a folder cannot replace a full one."""
    if not out.exists():
        partial.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    out.resolve().rename(aside / "old")
    try:
        partial.rename(out.resolve())
    except BaseException:  # Ctrl-C between the two renames included
        (aside / "old").rename(out.resolve())
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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


def _write_graph(checkpoint: Checkpoint, graph: _GraphToWrite, folder: Path) -> dict[str, str]:
    """Build and save one graph; returns its entry in the manifest."""
    import onnx_ir

    from twotower_export.graph import (
        build_context_graph,
        build_denoiser_graph,
        build_refine_graph,
    )

    builders: Mapping[str, Callable[..., onnx_ir.Model]] = {
        "context": build_context_graph,
        "denoiser": build_denoiser_graph,
        "refine": build_refine_graph,
    }
    metadata = {
        "twotower_version": importlib.metadata.version("twotower"),
        "checkpoint": checkpoint.id or checkpoint.path.name,
        "revision": checkpoint.revision or "",
        "fingerprint": checkpoint.fingerprint,
    }
    model = builders[graph.name](
        checkpoint.config, graph.dtype, _weight_dtypes(checkpoint, graph), metadata
    )
    path = folder / graph.file
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(model, path)
    return {"file": graph.file, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _weight_dtypes(checkpoint: Checkpoint, graph: _GraphToWrite) -> dict[str, str]:
    """Dtype of each weight input: as stored in the native graph, float32 in the float32 one."""
    if graph.tower is None:
        return {}
    weights = graph_weights(checkpoint.config, graph.tower, base=checkpoint.base)
    if "native" not in graph.precisions:
        return dict.fromkeys(weights, "F32")
    return {name: checkpoint.tensors[w.sources[0]].dtype for name, w in weights.items()}


def _weight_entry(weight: WeightSource) -> dict[str, Any]:
    return {"how": weight.how, "shape": list(weight.shape), "sources": list(weight.sources)}
