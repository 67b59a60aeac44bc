"""From a bundle to an engine set of one SKU.

In order: what is asked must fit (`plan_memory`) and be buildable here (the flavour's `check`); an
engine set that is there already and was built from the same is kept; engine files come from the
cache or from the flavour; the memory that TensorRT reports must fit as well, where it is known. The
set is put together beside its place and takes it in one step. Nothing here knows how an engine is
made.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from twotower_contract.atomic import WITH_CARE, Writing, partial_folder, put_in_place, write_text
from twotower_contract.digests import file_sha256, file_state
from twotower_contract.engine_set import (
    BUILD_FILE,
    BuildRecord,
    EngineFile,
    EngineSet,
    Limits,
    open_engine_set,
    write_build_record,
)
from twotower_contract.errors import TwoTowerError
from twotower_contract.json_file import read_json
from twotower_contract.manifest import MANIFEST_FILE, Manifest, read_manifest
from twotower_contract.skus import Sku, known_skus
from twotower_contract.tokenizer import TOKENIZER_FILES
from twotower_engines.building.build_cache import CachedEngine, EngineCache, digest_of
from twotower_engines.building.code_digest import code_digest
from twotower_engines.building.device_memory import check_device_memory
from twotower_engines.building.flavours.flavour import Flavour, Order, Target, traffic_file
from twotower_engines.building.flavours.onnxruntime import OnnxRuntimeFlavour
from twotower_engines.building.flavours.process import Progress
from twotower_engines.building.flavours.tensorrt import TensorRtFlavour
from twotower_engines.building.flavours.tensorrt_rtx import TensorRtRtxFlavour
from twotower_engines.errors import BuildError, PlanError
from twotower_engines.planning.fit import refusal, require_fit
from twotower_engines.planning.model_size import read_model_size
from twotower_engines.planning.plan import BLOCK_SIZE_MAX, MemoryPlan, PlanRequest, plan_memory
from twotower_engines.planning.precisions import flavour_for

FLAVOURS: dict[str, Flavour] = {
    flavour.name: flavour
    for flavour in (OnnxRuntimeFlavour(), TensorRtFlavour(), TensorRtRtxFlavour())
}
CONTEXT = 8192
ENGINE_CODE = (
    "twotower_engines/building/flavours/*.py",
    "twotower_engines/planning/compiled.py",
    "twotower_engines/runtime/nodes.py",
    "twotower_contract/layout.py",
    "twotower_contract/traffic.py",
)
SET_CODE = ("twotower_engines/building/build.py", "twotower_contract/engine_set.py")
"""Sources that decide the bytes of an engine, and those of a set; recipes add the kernels'."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        sku: The GPU, or the CPU of this machine.
        slots: Requests that can be in flight at once.
        context: Tokens of a request, prompt and answer together; None for 8192, or all that the
            model takes where that is less.
        flavour: `auto` for the SKU's default.
        precision: Precision of the weights; `auto` for the widest that fits.
        gpus: 1, or 2 for one tower on each; None for the fewest that fit.
        block_size_max: Tokens of the largest block that the denoiser takes.
        is_shared: Whether one engine must serve every GPU of the SKU's compute capability.
        max_tokens_per_call: Tokens of a prompt in one call; None for as many as the plan has room
            for.
        prefix_bytes: Memory that must be left for the states of prompts' beginnings.
    """

    sku: Sku = field(default_factory=lambda: known_skus()["cpu"])
    slots: int = 16
    context: int | None = None
    flavour: str = "auto"
    precision: str = "auto"
    gpus: int | None = None
    block_size_max: int = BLOCK_SIZE_MAX
    is_shared: bool = False
    max_tokens_per_call: int | None = None
    prefix_bytes: int = 0


def build_engines(
    bundle: Path,
    engines: Path,
    options: BuildOptions,
    progress: Progress | None = None,
    writing: Writing = WITH_CARE,
) -> tuple[EngineSet, bool]:
    """Build `ENGINES/<sku>`, unless it is there already and was built from the same.

    Args:
        writing: Whether to build again what is there, or to write nothing.

    Returns:
        The engine set, and whether anything was written.

    Raises:
        BundleError: The folder is no bundle.
        PlanError: The request does not fit on the SKU.
        BuildError: A graph is missing or changed, or the engines cannot be built.
    """
    progress = progress or (lambda tower, text: None)
    manifest = read_manifest(bundle)
    sku = options.sku
    plan = _plan(bundle, manifest, options)
    flavour = FLAVOURS[plan.flavour]
    chunk = min(plan.max_tokens_per_call, manifest.max_tokens_per_call)
    limits = Limits(plan.slots, plan.context, chunk, plan.block_size_max)
    target = Target(sku, limits, plan.precision, options.is_shared)
    flavour.check(target)
    graphs = _checked_graphs(bundle, manifest, flavour.graphs)
    wanted = _wanted(bundle, manifest, flavour, target, plan, graphs)
    folder = engines / sku.name
    present = _present(folder, wanted.record.key)
    if present is not None and not writing.force:
        return _of_bundle(present, bundle), False
    writing.begin(folder, f"{flavour.name} engines in {plan.precision}")
    with (
        partial_folder(engines) as work,
        _built(flavour, wanted, progress, writing.force) as built,
    ):
        check_device_memory(plan, built)
        made = work / sku.name
        made.mkdir()
        _write_set(made, bundle, flavour, wanted, built)
        if folder.exists() and not writing.force and not (folder / BUILD_FILE).is_file():
            raise BuildError(f"{folder}: is there and is no engine set; choose another folder")
        put_in_place(made, folder)
    return open_engine_set(folder), True


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The description of an engine set to build.

    Attributes:
        target: SKU, limits and precision.
        graphs: Tower to ONNX file.
        recipes: Tower to the flavour's recipe.
        keys: Tower to the cache key of its engine.
        record: The build record, without the engine files.
    """

    target: Target
    graphs: Mapping[str, Path]
    recipes: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, str]
    record: BuildRecord


def _plan(bundle: Path, manifest: Manifest, options: BuildOptions) -> MemoryPlan:
    """Return the memory plan of a build.

    Raises:
        PlanError: It does not fit in a precision that can be built, or the SKU cannot serve it.
        BuildError: The bundle's weights are in another precision.
    """
    model = read_model_size(bundle)
    flavour = _chosen_flavour(options, model.precision)
    request = PlanRequest(
        options.sku,
        options.gpus,
        options.slots,
        options.context or min(CONTEXT, manifest.model.max_position_embeddings),
        flavour=flavour,
        max_tokens_per_call=options.max_tokens_per_call,
        block_size_max=options.block_size_max,
        prefix_bytes=options.prefix_bytes,
        kernels=FLAVOURS[flavour].has_kernels(),
    )

    def planned(precision: str) -> MemoryPlan:
        return plan_memory(model, replace(request, precision=precision))

    plan = planned(options.precision)
    if plan.needs_quantizing:
        if options.precision != "auto":
            raise BuildError(
                f"--precision is {plan.precision}, but the weights of this bundle are in "
                f"{model.config.dtype}: quantize the checkpoint first (twotower quantize "
                f"CHECKPOINT OUT --format {plan.precision}), export OUT and build that"
            )
        raise PlanError(refusal(planned("bf16")))
    if plan.fits and not plan.is_built:
        raise PlanError(refusal(plan))
    return require_fit(plan)


def _chosen_flavour(options: BuildOptions, precision: str | None) -> str:
    """Return the flavour to build with.

    `auto` is the SKU's default, but on an RTX card itself TensorRT with our kernels, where both are
    installed: such engines read the routed experts only. For quantized weights (`precision`) the
    default is the SKU's first flavour that takes them.

    Raises:
        BuildError: There is no such flavour.
    """
    if options.flavour in FLAVOURS:
        return options.flavour
    if options.flavour != "auto":
        raise BuildError(f"--flavour is {options.flavour!r}, none of auto, {', '.join(FLAVOURS)}")
    best, sku = FLAVOURS["tensorrt"], options.sku
    default = sku.flavour if precision is None else flavour_for(sku, precision)
    if best.name in sku.flavours and default != best.name and best.has_kernels():
        limits = Limits(options.slots, options.context or CONTEXT, 1, options.block_size_max)
        with contextlib.suppress(BuildError):
            best.versions()
            best.check(Target(sku, limits, options.precision, options.is_shared))
            return best.name
    return default


def _checked_graphs(bundle: Path, manifest: Manifest, precision: str) -> dict[str, Path]:
    graphs: dict[str, Path] = {}
    for tower in manifest.towers:
        entry = manifest.graph(precision, tower)
        path = bundle / entry.file
        state = file_state(path, entry.sha256)
        if state != "ok":
            what = "is missing" if state == "missing" else "was changed since export"
            raise BuildError(f"{path}: {what}; export the checkpoint again")
        graphs[tower] = path
    return graphs


def _wanted(
    bundle: Path,
    manifest: Manifest,
    flavour: Flavour,
    target: Target,
    plan: MemoryPlan,
    graphs: Mapping[str, Path],
) -> _Wanted:
    """Describe an engine set in full, before anything is built.

    Raises:
        BuildError: The library that builds is missing.
    """
    versions = {"twotower": importlib.metadata.version("twotower"), **flavour.versions()}
    recipes = {tower: flavour.recipe(tower, target) for tower in graphs}
    digests = {tower: file_sha256(path) for tower, path in graphs.items()}
    keys = {
        tower: digest_of(
            {
                "graph": digests[tower],
                "flavour": flavour.name,
                "versions": versions,
                "code": code_digest(*ENGINE_CODE),
                "recipe": recipes[tower],
            }
        )
        for tower in graphs
    }
    memory = plan.as_json()
    memory |= {"gpus": len(plan.gpus), "per_gpu": memory["gpus"]}
    extra = {
        **flavour.loader(target),
        "weights": "inputs of the plans, by name; manifest.json says which bytes of which shard",
        "placement": {tower: i for i, gpu in enumerate(plan.gpus) for tower in gpu.towers},
    }
    needs = flavour.needs(target)
    copied = {path.name: _content_digest(path) for path in _copied(bundle)}
    key = digest_of(
        {
            "plans": keys,
            "limits": asdict(target.limits),
            "sku": [target.sku.name, target.sku.compute_capability],
            "needs": asdict(needs),
            "versions": versions,
            "code": code_digest(*SET_CODE),
            "memory": memory,
            "extra": extra,
            "copied": copied,
        }
    )
    record = BuildRecord(
        sku=target.sku.name,
        flavour=flavour.name,
        precision=target.precision,
        limits=target.limits,
        plans={},
        compute_capability=target.sku.compute_capability,
        machine=needs.machine,
        cuda=needs.cuda,
        versions=versions,
        graph_sha256=digests,
        profiles={tower: recipe["profiles"] for tower, recipe in recipes.items()},
        memory=memory,
        key=key,
        bundle_fingerprint=manifest.checkpoint.fingerprint,
        extra=extra,
    )
    return _Wanted(target, graphs, recipes, keys, record)


def _present(folder: Path, key: str) -> EngineSet | None:
    """Return an engine set that is complete, unchanged and of this key."""
    with contextlib.suppress(TwoTowerError):
        present = open_engine_set(folder)
        if present.build.key == key:
            present.check_engine_files()
            return present
    return None


def _of_bundle(present: EngineSet, bundle: Path) -> EngineSet:
    """Return an engine set that was there, pointed at where the bundle's checkpoint lies now."""
    theirs, ours = (folder / MANIFEST_FILE for folder in (bundle, present.folder))
    if file_sha256(theirs) == file_sha256(ours):
        return present
    write_text(ours, theirs.read_text(encoding="utf-8"))
    return open_engine_set(present.folder)


@contextlib.contextmanager
def _built(
    flavour: Flavour, wanted: _Wanted, progress: Progress, is_forced: bool
) -> Iterator[dict[str, CachedEngine]]:
    """Give the engine files: from the cache, or built now and, if the flavour says so, kept."""
    cache = EngineCache()
    with cache.workplace() as work, cache.holding(wanted.keys.values(), _say_waiting):
        cached = {
            tower: None if is_forced else cache.find(key) for tower, key in wanted.keys.items()
        }
        orders = {
            tower: Order(
                wanted.graphs[tower], work / f"{tower}{flavour.suffix}", wanted.recipes[tower]
            )
            for tower, engine in cached.items()
            if engine is None
        }
        engines = {tower: engine for tower, engine in cached.items() if engine is not None}
        reports = flavour.build(orders, wanted.target, progress) if orders else {}
        for tower, order in orders.items():
            if flavour.is_cached:
                engines[tower] = cache.keep(wanted.keys[tower], order.engine, reports[tower])
            else:
                digest = file_sha256(order.engine)
                engines[tower] = CachedEngine(order.engine, digest, reports[tower])
        yield engines


def _say_waiting() -> None:
    print("waiting for another build of the same engine to end", file=sys.stderr, flush=True)


def _write_set(
    folder: Path, bundle: Path, flavour: Flavour, wanted: _Wanted, built: Mapping[str, CachedEngine]
) -> None:
    """Write everything into a new folder, build.json last."""
    files, traffic = {}, {}
    for tower in wanted.graphs:
        engine = built[tower]
        path = folder / f"{tower}{flavour.suffix}"
        shutil.copyfile(engine.path, path)
        files[tower] = EngineFile(path.name, engine.sha256)
        engine.copy_beside(path)
        if traffic_file(path).is_file():
            listing = traffic_file(path)
            traffic[tower] = EngineFile(listing.name, file_sha256(listing))
    for path in _copied(bundle):
        shutil.copyfile(path, folder / path.name)
    extra = {**wanted.record.extra, "reports": {t: engine.report for t, engine in built.items()}}
    write_build_record(folder, replace(wanted.record, plans=files, traffic=traffic, extra=extra))


def _copied(bundle: Path) -> list[Path]:
    """Return the files of a bundle that an engine set carries as they are."""
    return [
        bundle / MANIFEST_FILE,
        *(p for p in map(bundle.joinpath, TOKENIZER_FILES) if p.is_file()),
    ]


def _content_digest(path: Path) -> str:
    """Return the digest of a file that is copied; of a manifest, not of where its weights lie."""
    if path.name != MANIFEST_FILE:
        return file_sha256(path)
    values = read_json(path).values
    fingerprint = values["checkpoint"]["fingerprint"]
    return digest_of(values | {"checkpoint": fingerprint})
