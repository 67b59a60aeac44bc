"""What `twotower inspect` finds out about a checkpoint, a bundle or engine sets, as data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from twotower_export.agreement import check_agreement, check_every_byte
from twotower_export.bundle import FORMAT, MANIFEST_FILE, read_manifest
from twotower_export.checkpoint import Checkpoint, Progress, open_checkpoint, with_full_digests
from twotower_export.config import ModelConfig
from twotower_export.errors import BundleError, ConfigError, ExportError
from twotower_export.inventory import Inventory, fitting_skus, take_inventory
from twotower_export.json_file import read_json
from twotower_export.manifest_check import WrongFieldError, check_fields, config_of

BUILD_FILE: Final = "build.json"

# What is read of a build record; only the first four are in every one.
_BUILD_FIELDS: Final[dict[str, Any]] = {
    "format": str,
    "sku": str,
    "flavour": str,
    "plans": {"*": {"file": str, "sha256": str}},
    "precision": str,
    "limits": {},
    "versions": {},
    "profiles": {"*": [{}]},
    "graph_sha256": {"*": str},
    "extra": {},
}
_BUILD_REQUIRED: Final = ("format", "sku", "flavour", "plans")


def inspect_source(
    source: str,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    *,
    full: bool = False,
) -> dict[str, Any]:
    """Recognise a folder or hub id and describe it.

    Args:
        source: a checkpoint, a bundle, or an engine set or the folder of several.
        checkpoint: for a bundle, the checkpoint to compare it with.
        progress: told about each shard.
        full: of a checkpoint, or a bundle's: hash every shard from its first to its last byte.

    Returns:
        A dictionary with `kind`: `checkpoint`, `bundle` or `engines`.

    Raises:
        ExportError: it is none of them, is damaged, or `checkpoint` is not the bundle's.
    """
    folder = Path(source).expanduser()
    builds = _builds(folder)
    if checkpoint is not None and (builds or not _is_bundle(folder)):
        raise BundleError(f"{source}: is no bundle, so --checkpoint means nothing: leave it out")
    if builds and full:
        raise BundleError(
            f"{source}: is an engine set, so --full means nothing: give it with the bundle or the "
            "checkpoint"
        )
    if builds:
        return _engines(folder, builds)
    if _is_bundle(folder):
        return _bundle(folder, checkpoint, progress, full)
    opened = open_checkpoint(source, local_only=True, progress=progress)
    if full:
        opened = with_full_digests(opened, progress)
    return {"kind": "checkpoint", **_checkpoint(opened)}


def _is_bundle(folder: Path) -> bool:
    try:
        return read_json(folder / MANIFEST_FILE).get("format") == FORMAT
    except ConfigError:
        return False


def _builds(folder: Path) -> list[Path]:
    """Build records of an engine set, or of the engine sets in a folder."""
    if (folder / BUILD_FILE).is_file():
        return [folder / BUILD_FILE]
    return sorted(folder.glob(f"*/{BUILD_FILE}")) if folder.is_dir() else []


def _checkpoint(opened: Checkpoint) -> dict[str, Any]:
    tensors = {name: (t.dtype, t.shape) for name, t in opened.tensors.items()}
    return {
        "path": str(opened.path),
        "id": opened.id,
        "revision": opened.revision,
        "fingerprint": opened.fingerprint,
        "towers": list(opened.towers),
        "base": opened.base,
        "shards": len(opened.shards),
        "tensors": len(opened.tensors),
        "sha256": {shard.file: shard.sha256 for shard in opened.shards},
        "warnings": list(opened.warnings),
        **_model(opened.config),
        **_sizes(take_inventory(opened.config, tensors)),
    }


def _bundle(
    folder: Path, checkpoint: Path | None, progress: Progress | None, full: bool
) -> dict[str, Any]:
    manifest = read_manifest(folder)
    entries = {one["file"]: one for some in manifest["graphs"].values() for one in some.values()}
    found = {
        "kind": "bundle",
        "path": str(folder.resolve()),
        **_manifest(manifest),
        "graphs": [_digested(folder, entry) for entry in entries.values()],
    }
    source = checkpoint or Path(manifest["checkpoint"]["path"])
    try:
        opened = open_checkpoint(source, local_only=True, progress=progress)
        check_agreement(manifest, opened)
        state = "is there and unchanged"
        if full:
            check_every_byte(manifest, opened, progress)
            state = "is there and unchanged, every byte of it"
    except ExportError as error:
        if checkpoint is not None or full:
            raise
        state = str(error)
    found["checkpoint"] = {**manifest["checkpoint"], "path": str(source), "state": state}
    return found


def _engines(folder: Path, builds: Sequence[Path]) -> dict[str, Any]:
    """Engine sets, each with its state, and the models that they are of: usually one."""
    sets: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    for path in builds:
        manifest = read_manifest(path.parent)
        model = {"checkpoint": manifest["checkpoint"], **_manifest(manifest)}
        keys = [_identity(one) for one in models]
        if _identity(model) not in keys:
            models.append(model)
            keys.append(_identity(model))
        number = keys.index(_identity(model))
        build = _build(path, manifest)
        sets.append({"path": str(path.parent), "model": number, "build": build})
    found = {
        "kind": "engines",
        "path": str(folder.resolve()),
        "engines": sets,
        "models": models,
    }
    return found if len(models) > 1 else found | models[0]


def _identity(model: Mapping[str, Any]) -> list[Any]:
    """What makes two engine sets ones of the same model."""
    return [model[key] for key in ("fingerprint", "towers", "mask_token_id", "eos_token_ids")]


def _build(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A build record, with size and state of each plan and of the graph that it was built from.

    Raises:
        BundleError: a field is missing or of another kind.
    """
    try:
        build = read_json(path)
        kinds = {n: k for n, k in _BUILD_FIELDS.items() if n in build or n in _BUILD_REQUIRED}
        check_fields(build, kinds)
    except (ConfigError, WrongFieldError) as error:
        raise BundleError(
            f"{path}: {str(error).removeprefix(f'{path}: ')}; build the engines again"
        ) from error
    graphs = {one["sha256"] for some in manifest["graphs"].values() for one in some.values()}
    plans = {}
    for name, plan in build["plans"].items():
        graph = build.get("graph_sha256", {}).get(name)
        state = "unknown" if graph is None else "ok" if graph in graphs else "changed"
        plans[name] = {**plan, **_digested(path.parent, plan), "graph": state}
    return {**build, "plans": plans}


def _digested(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A file with its size and whether it is as it was written: `ok`, `changed` or `missing`."""
    path = folder / entry["file"]
    if not path.is_file():
        return {"file": entry["file"], "bytes": None, "state": "missing"}
    with path.open("rb") as stream:
        same = hashlib.file_digest(stream, "sha256").hexdigest() == entry["sha256"]
    state = "ok" if same else "changed"
    return {"file": entry["file"], "bytes": path.stat().st_size, "state": state}


def _manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of its model; sizes count the towers that were exported."""
    config = config_of(manifest)
    used = {
        source
        for inputs in manifest["weights"].values()
        for weight in inputs.values()
        for source in weight["sources"]
    }
    tensors = {
        name: (entry["dtype"], entry["shape"])
        for name, entry in manifest["tensors"].items()
        if name in used
    }
    return {
        "fingerprint": manifest["checkpoint"]["fingerprint"],
        "twotower_version": manifest["twotower_version"],
        "towers": manifest["towers"],
        "shards": len(manifest["shards"]),
        "tensors": len(used),
        **_model(config),
        **_sizes(take_inventory(config, tensors)),
    }


def _model(config: ModelConfig) -> dict[str, Any]:
    return {
        "model": config.model_block(),
        "dtype": config.dtype,
        "mask_token_id": config.mask_token_id,
        "eos_token_ids": list(config.eos_token_ids),
    }


def _sizes(inventory: Inventory) -> dict[str, Any]:
    fit = fitting_skus(inventory)
    return {
        "sizes": inventory.as_json(),
        "skus": None if fit is None else {"one": fit.one, "one_per_tower": fit.one_per_tower},
    }
