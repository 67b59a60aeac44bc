"""Findings of `twotower inspect` about a checkpoint, a bundle or engine sets, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twotower_contract.config import ModelConfig
from twotower_contract.digests import file_state
from twotower_contract.engine_set import EngineSet, find_engine_sets, open_engine_set
from twotower_contract.errors import BundleError, TwoTowerError
from twotower_contract.manifest import Manifest, read_manifest
from twotower_export.agreement import check_agreement, check_every_byte
from twotower_export.bundle import is_bundle
from twotower_export.checkpoint import Checkpoint, open_checkpoint, with_full_digests, zero_warnings
from twotower_export.inventory import Inventory, fitting_skus, inventory_of, take_inventory
from twotower_export.progress import Progress, silent


def inspect_source(
    source: str,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    *,
    full: bool = False,
) -> dict[str, Any]:
    """Recognise a folder or hub id and describe it.

    Args:
        source: A checkpoint, a bundle, or an engine set or the folder of several.
        checkpoint: For a bundle, the checkpoint to compare it with.
        progress: Called for each shard.
        full: Hash every shard from its first to its last byte.

    Returns:
        A dictionary with `kind`: `checkpoint`, `bundle` or `engines`; and, of the latter two, with
        `problems`: files that are missing or not as they were written.

    Raises:
        TwoTowerError: It is none of them, is damaged, or `checkpoint` is not the bundle's.
    """
    folder = Path(source).expanduser()
    builds = find_engine_sets(folder)
    if checkpoint is not None and (builds or not is_bundle(folder)):
        raise BundleError(f"{source}: is no bundle, so --checkpoint means nothing: leave it out")
    if builds and full:
        raise BundleError(
            f"{source}: is an engine set, so --full means nothing: give it with the bundle or the "
            "checkpoint"
        )
    if builds:
        return _engines(folder, builds)
    if is_bundle(folder):
        return _bundle(folder, checkpoint, progress, full)
    opened = open_checkpoint(source, local_only=True, progress=progress)
    if full:
        opened = with_full_digests(opened, progress)
    return {"kind": "checkpoint", "hashed": full, **_checkpoint(opened)}


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
    folder: Path, checkpoint: Path | None, progress: Progress, full: bool
) -> dict[str, Any]:
    manifest = read_manifest(folder)
    graphs = {one.file: one for some in manifest.graphs.values() for one in some.values()}
    found = {
        "kind": "bundle",
        "path": str(folder.resolve()),
        **_manifest(manifest),
        "graphs": [_digested(folder, graph.file, graph.sha256) for graph in graphs.values()],
    }
    source = checkpoint or manifest.checkpoint.path
    is_wrong = False
    try:
        opened = open_checkpoint(source, local_only=True, progress=progress)
        check_agreement(manifest, opened)
        state = "is there; headers and samples are as at export, --full reads every byte"
        if full:
            check_every_byte(manifest, opened, progress)
            state = "is there and unchanged, every byte of it"
    except TwoTowerError as error:
        if checkpoint is not None or full:
            raise
        state, is_wrong = str(error), source.exists()
    found["checkpoint"] = {**asdict(manifest.checkpoint), "path": str(source), "state": state}
    found["problems"] = [
        f"{graph['file']} is {graph['state']}"
        for graph in found["graphs"]
        if graph["state"] != "ok"
    ] + [state] * is_wrong
    found["warnings"] = zero_warnings(source, manifest.tensors)
    return found


def _engines(folder: Path, builds: Sequence[Path]) -> dict[str, Any]:
    """Engine sets, each with its state, and the models that they are of: usually one."""
    sets: list[dict[str, Any]] = []
    models: dict[str, dict[str, Any]] = {}
    for opened in map(open_engine_set, builds):
        source = opened.manifest.checkpoint
        model = {
            "checkpoint": asdict(source) | {"path": str(source.path)},
            **_manifest(opened.manifest),
        }
        # the same in these are engine sets of the same model
        identity = ("fingerprint", "towers", "mask_token_id", "eos_token_ids")
        key = str([model[name] for name in identity])
        models.setdefault(key, model)
        number = list(models).index(key)
        sets.append({"path": str(opened.folder), "model": number, "build": _build(opened)})
    found: dict[str, Any] = {
        "kind": "engines",
        "path": str(folder.resolve()),
        "engines": sets,
        "models": list(models.values()),
        "problems": [problem for one in sets for problem in _problems(one)],
    }
    return found if len(models) > 1 else found | found["models"][0]


def _problems(engines: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the files of an engine set."""
    for plan in engines["build"]["plans"].values():
        if plan["state"] != "ok":
            yield f"{engines['path']}/{plan['file']} is {plan['state']}"
        if plan["graph"] == "changed":
            yield f"{engines['path']}/{plan['file']} is of another graph than the manifest's"


def _build(opened: EngineSet) -> dict[str, Any]:
    """Return a build record, with the state of each plan and of the graph that it is made of."""
    build = opened.build
    graphs = {one.sha256 for some in opened.manifest.graphs.values() for one in some.values()}
    plans = {}
    for name, plan in build.plans.items():
        graph = build.graph_sha256.get(name)
        state = "unknown" if graph is None else "ok" if graph in graphs else "changed"
        found = _digested(opened.folder, plan.file, plan.sha256)
        plans[name] = {**asdict(plan), **found, "graph": state}
    return {**build.as_json(), "plans": plans}


def _digested(folder: Path, file: str, sha256: str) -> dict[str, Any]:
    """Return a file with its size and whether it is as it was written."""
    path = folder / file
    size = path.stat().st_size if path.is_file() else None
    return {"file": file, "bytes": size, "state": file_state(path, sha256)}


def _manifest(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says of its model; sizes count the towers that were exported."""
    inventory = inventory_of(manifest)
    return {
        "fingerprint": manifest.checkpoint.fingerprint,
        "twotower_version": manifest.twotower_version,
        "towers": list(manifest.towers),
        "shards": len(manifest.shards),
        "tensors": sum(part.tensors for part in inventory.parts),
        **_model(manifest.model),
        **_sizes(inventory),
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
        "skus": {"one": fit.one, "one_per_tower": fit.one_per_tower},
    }
