"""What `twotower inspect` finds out, as data, and the same as text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from twotower_export.agreement import check_agreement
from twotower_export.bundle import FORMAT, MANIFEST_FILE, read_manifest
from twotower_export.checkpoint import Checkpoint, Progress, open_checkpoint
from twotower_export.config import ModelConfig, read_json
from twotower_export.errors import BundleError, ConfigError, ExportError
from twotower_export.inventory import Inventory, fitting_skus, take_inventory

BUILD_FILE: Final = "build.json"


def inspect_source(
    source: str, checkpoint: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Recognise a folder or hub id and describe it.

    Args:
        source: a checkpoint, a bundle, or an engine set or the folder of several.
        checkpoint: for a bundle, the checkpoint to compare it with.
        progress: told about each shard.

    Returns:
        A dictionary with `kind`: `checkpoint`, `bundle` or `engines`.

    Raises:
        ExportError: it is none of them, is damaged, or `checkpoint` is not the bundle's.
    """
    folder = Path(source).expanduser()
    builds = _builds(folder)
    if checkpoint is not None and (builds or not _is_bundle(folder)):
        raise BundleError(f"{source}: is no bundle, so --checkpoint means nothing: leave it out")
    if builds:
        return _engines(folder, builds)
    if _is_bundle(folder):
        return _bundle(folder, checkpoint, progress)
    opened = open_checkpoint(source, local_only=True, progress=progress)
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
        **_model(opened.config),
        **_sizes(take_inventory(opened.config, tensors)),
    }


def _bundle(folder: Path, checkpoint: Path | None, progress: Progress | None) -> dict[str, Any]:
    manifest = read_manifest(folder)
    found = {
        "kind": "bundle",
        "path": str(folder.resolve()),
        **_manifest(manifest),
        "graphs": _graph_files(folder, manifest),
    }
    source = checkpoint or Path(manifest["checkpoint"]["path"])
    try:
        check_agreement(manifest, open_checkpoint(source, local_only=True, progress=progress))
        state = "is there and unchanged"
    except ExportError as error:
        if checkpoint is not None:
            raise
        state = str(error)
    found["checkpoint"] = {**manifest["checkpoint"], "path": str(source), "state": state}
    return found


def _engines(folder: Path, builds: Sequence[Path]) -> dict[str, Any]:
    sets = []
    for path in builds:
        build = read_json(path)
        plans = {
            name: {**plan, "bytes": _size(path.parent / plan["file"])}
            for name, plan in build.get("plans", {}).items()
        }
        sets.append({"path": str(path.parent), "build": {**build, "plans": plans}})
    manifest = read_manifest(builds[0].parent)
    return {
        "kind": "engines",
        "path": str(folder.resolve()),
        "engines": sets,
        "checkpoint": manifest["checkpoint"],
        **_manifest(manifest),
    }


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _graph_files(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each graph file once, with its size and whether it is as it was written."""
    entries = {one["file"]: one for some in manifest["graphs"].values() for one in some.values()}
    found = []
    for file, entry in entries.items():
        content = (folder / file).read_bytes() if (folder / file).is_file() else None
        state = "missing"
        if content is not None:
            same = hashlib.sha256(content).hexdigest() == entry["sha256"]
            state = "ok" if same else "changed"
        found.append({"file": file, "bytes": len(content or b""), "state": state})
    return found


def _manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of its model; sizes count the towers that were exported."""
    model = dict(manifest["model"])
    config = ModelConfig(
        **model,
        mask_token_id=manifest["mask_token_id"],
        eos_token_ids=tuple(manifest["eos_token_ids"]),
        dtype=manifest["dtype"],
    )
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


def report(found: Mapping[str, Any]) -> str:
    """The text that `twotower inspect` prints."""
    lines = [*_head(found), "", *_table(found["sizes"]), "", *_context(found)]
    return "\n".join(lines)


def _head(found: Mapping[str, Any]) -> Iterable[str]:
    what = {"checkpoint": "TwoTower checkpoint", "bundle": "bundle", "engines": "engines"}
    kind = "single-tower base checkpoint" if found.get("base") else what[found["kind"]]
    yield f"{found['path']}: {kind}, {' and '.join(found['towers'])}"
    if found.get("id"):
        yield f"  {found['id']}@{found['revision']}"
    yield f"  fingerprint {found['fingerprint'][:16]}, {found['shards']} shards"
    model = found["model"]
    dtypes = ", ".join(f"{n} {dtype}" for dtype, n in found["sizes"]["dtypes"].items())
    yield f"  {len(model['pattern'])} layers {model['pattern']}"
    yield f"  computes in {found['dtype']}; tensors: {dtypes}"
    yield f"  mask {found['mask_token_id']}, ends with {found['eos_token_ids']}"
    source = found.get("checkpoint")
    if source is not None:
        revision = f" at {source['revision']}" if source["revision"] else ""
        state = source.get("state")
        yield f"  of {source['id'] or source['path']}{revision}" + (f": {state}" if state else "")
    for graph in found.get("graphs", ()):
        yield f"  {graph['file']:32} {graph['bytes'] / 1e6:8.2f} MB  {graph['state']}"
    for one in found.get("engines", ()):
        yield from _build(one)


def _build(one: Mapping[str, Any]) -> Iterable[str]:
    build = one["build"]
    versions = ", ".join(f"{k} {v}" for k, v in build.get("versions", {}).items())
    capability = build.get("compute_capability")
    yield (
        f"  {build.get('sku')}: {build.get('flavour')}, {build.get('precision')}"
        + (f", compute capability {capability}" if capability else "")
        + (f" ({versions})" if versions else "")
    )
    limits = ", ".join(f"{k} {v}" for k, v in build.get("limits", {}).items())
    yield f"    limits: {limits}"
    for name, plan in build["plans"].items():
        size = "missing" if plan["bytes"] is None else f"{plan['bytes'] / 1e6:.1f} MB"
        yield f"    {name}: {plan['file']}, {size}{_builder_saw(build, name)}"
        for profile in build.get("profiles", {}).get(name, ()):
            ranges = (f"{k} {' to '.join(map(str, v))}" for k, v in profile.items() if k != "name")
            yield f"      profile {profile.get('name')} (least, usual, most): {', '.join(ranges)}"


def _builder_saw(build: Mapping[str, Any], tower: str) -> str:
    """What the builder reported of a plan, where its flavour reports."""
    report = build.get("extra", {}).get("reports", {}).get(tower, {})
    if "layers" not in report:
        return ""
    return f", {report['layers']:,} layers, {report['inputs']:,} inputs"


def _table(sizes: Mapping[str, Any]) -> Iterable[str]:
    def row(name: str, one: Mapping[str, Any]) -> str:
        tensors = f"{one['tensors']:,}" if "tensors" in one else ""
        return f"  {name:28}{tensors:>10}{one['parameters']:>18,}{one['bytes']:>18,}"

    yield f"  {'':28}{'tensors':>10}{'parameters':>18}{'bytes':>18}"
    for tower, one in sizes["towers"].items():
        for name, part in one["parts"].items():
            yield row(f"{tower} {name}", part)
        yield row(f"{tower} tower", {"parameters": one["parameters"], "bytes": one["bytes"]})
    yield row("all", {"parameters": sizes["parameters"], "bytes": sizes["bytes"]})


def _context(found: Mapping[str, Any]) -> Iterable[str]:
    sizes = found["sizes"]
    for tower, one in sizes["towers"].items():
        yield (
            f"  {tower}: {_scaled(one['active_parameters_per_token'])} parameters active per "
            f"token; reads {_scaled(one['bytes_read_per_token'])}B for a token, "
            f"{_scaled(one['bytes_read_per_16_tokens'])}B for 16 (uniform routing)"
        )
    tokens = sizes["tokens_per_context_gigabyte"]
    yield (
        f"  context: {sizes['kv_bytes_per_token']:,} bytes per token"
        + (f", {tokens:,} tokens per gigabyte" if tokens else "")
        + f", and {_scaled(sizes['state_bytes_per_sequence'])}B of states per sequence"
    )
    skus = found["skus"]
    if skus is None:
        yield "  GPUs: install twotower's engines to see which could hold it"
        return
    yield f"  one GPU could hold it: {', '.join(skus['one']) or 'none'}"
    if skus["one_per_tower"]:
        yield f"  one GPU per tower: {', '.join(skus['one_per_tower'])}"
    yield "  (weights, 4,096 tokens of context, 5% for workspace; `twotower plan` counts slots)"


def _scaled(value: float) -> str:
    """Three digits and a decimal prefix: `62.5 G`."""
    for prefix in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} G"
