"""From a bundle to an engine set of one SKU."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twotower_engines.engine_set import (
    BUILD_FILE,
    BuildRecord,
    EngineSet,
    Limits,
    file_sha256,
    open_engine_set,
    write_build_record,
)
from twotower_engines.errors import BuildError, EngineSetError
from twotower_engines.flavours import onnxruntime as onnxruntime_flavour
from twotower_engines.manifest import MANIFEST_FILE, Manifest, read_manifest

__all__ = ["BuildOptions", "build_engines"]

TOKENIZER_FILES = "*token*.json"
BLOCK_SIZE_MAX = 64


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What an engine set is built for.

    Attributes:
        sku: Name of the GPU, or `cpu`.
        slots: Requests that can be in flight at once.
        context: Tokens of a request, prompt and answer together.
    """

    sku: str = "cpu"
    slots: int = 8
    context: int = 8192


def build_engines(bundle: Path, engines: Path, options: BuildOptions) -> tuple[EngineSet, bool]:
    """Build `ENGINES/<sku>`, unless it is there already and was built from the same.

    Returns:
        The engine set, and whether anything had to be built.

    Raises:
        BundleError: The folder is no bundle.
        BuildError: A graph is missing or changed, or cannot be built.
    """
    manifest = read_manifest(bundle)
    context = min(options.context, manifest.model.max_position_embeddings)
    limits = Limits(options.slots, context, manifest.max_tokens_per_call, BLOCK_SIZE_MAX)
    graphs = _checked_graphs(bundle, manifest)
    versions = onnxruntime_flavour.versions()
    key = _key(bundle, options, limits, versions)
    target = engines / options.sku
    with contextlib.suppress(EngineSetError):
        present = open_engine_set(target)
        present.check_plans()
        if present.build.key == key:
            return present, False
    with _beside(target) as folder:
        plans = {
            tower: onnxruntime_flavour.build_tower(graph, folder, tower)
            for tower, graph in graphs.items()
        }
        shutil.copyfile(bundle / MANIFEST_FILE, folder / MANIFEST_FILE)
        for path in bundle.glob(TOKENIZER_FILES):
            shutil.copyfile(path, folder / path.name)
        record = BuildRecord(
            sku=options.sku,
            flavour="onnxruntime",
            precision="float32",
            limits=limits,
            plans=plans,
            versions=versions,
            graph_sha256={tower: file_sha256(graph) for tower, graph in graphs.items()},
            key=key,
            bundle_fingerprint=manifest.checkpoint.fingerprint,
        )
        write_build_record(folder, record)
    return open_engine_set(target), True


def _checked_graphs(bundle: Path, manifest: Manifest) -> dict[str, Path]:
    graphs = {}
    for tower in manifest.towers:
        entry = manifest.graph("float32", tower)
        path = bundle / entry.file
        if not path.is_file():
            raise BuildError(f"{path}: is missing; export the checkpoint again")
        if file_sha256(path) != entry.sha256:
            raise BuildError(f"{path}: was changed since export; export the checkpoint again")
        graphs[tower] = path
    return graphs


def _key(bundle: Path, options: BuildOptions, limits: Limits, versions: dict[str, Any]) -> str:
    parts = {
        "manifest": file_sha256(bundle / MANIFEST_FILE),
        "options": asdict(options),
        "limits": asdict(limits),
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give a folder that takes the place of `target` when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f"{target.name}.{os.getpid()}.partial")
    made.mkdir()
    try:
        yield made
        if target.exists():
            if not (target / BUILD_FILE).is_file():
                raise BuildError(f"{target}: is there and is no engine set; choose another folder")
            shutil.rmtree(target)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
