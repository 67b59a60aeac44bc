"""Verifies an engine set for a GPU: what this machine can check, and what it cannot.

Anywhere: digests, the checkpoint, the profiles, and the inputs and outputs that TensorRT's own
parser found in the graphs. On the GPU: what the engines compute (`running.py`). Anything that was
not verified is reported, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from twotower_contract.digests import file_sha256
from twotower_contract.engine_set import BUILD_FILE, EngineSet, Limits
from twotower_contract.errors import EngineSetError, TwoTowerError
from twotower_contract.json_file import Document
from twotower_contract.manifest import read_manifest
from twotower_contract.skus import known_skus
from twotower_engines.artifacts.engine_interface import Interface, differences, interface_of
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.building.flavours.parsing import parse, specs_of
from twotower_engines.errors import BuildError
from twotower_engines.verify.report import Sources, Verification
from twotower_engines.verify.running import verify_running

# Which dimension of a profile is bounded by which limit, for each tower.
BOUNDS: Mapping[str, Mapping[str, Callable[[Limits], int]]] = {
    "context": {
        "batch": lambda limits: limits.slots,
        "tokens": lambda limits: limits.max_tokens_per_call,
    },
    "denoiser": {
        "batch": lambda limits: limits.slots,
        "block": lambda limits: limits.block_size_max,
    },
}


def verify_engines(
    engines: EngineSet,
    checkpoint: Path | None = None,
    bundle: Path | None = None,
    against: EngineSet | None = None,
) -> Verification:
    """Verify as much as this machine can.

    Args:
        engines: An engine set of a flavour that needs a GPU.
        checkpoint: The checkpoint's folder, where it is not the one in the manifest.
        bundle: Bundle that the engines were built from, so that TensorRT parses its graphs again.
        against: An engine set of the CPU flavour of the same model, to compare with on the GPU;
            found or built where not given.

    Raises:
        BundleError: The bundle is none.
    """
    found = Verification(engines.folder)
    plans = ", ".join(sorted(engines.build.plans))
    found.take(f"digests of the engine files ({plans})", _raised(engines.check_engine_files))
    store = WeightStore(engines.manifest, checkpoint)
    count = len(engines.manifest.tensors)
    found.take(f"checkpoint {store.folder}: {count} tensors as exported", _raised(store.check))
    found.take("SKU and compute capability", _capability_problems(engines))
    for tower in engines.build.plans:
        found.take(
            f"profiles of the {tower} engine: all calls within the limits",
            _profile_problems(engines, tower),
        )
        _verify_interface(found, engines, tower, bundle)
    verify_running(found, engines, Sources(checkpoint, bundle, against))
    return found


def _raised(check: Callable[[], None]) -> list[str]:
    """Return the message of the error that a check raises."""
    try:
        check()
    except TwoTowerError as problem:
        return [str(problem)]
    return []


def _capability_problems(engines: EngineSet) -> list[str]:
    build = engines.build
    known = known_skus().get(build.sku)  # None for a SKU file: nothing to compare with
    expected = build.compute_capability if known is None else known.compute_capability
    runs_on = build.extra.get("compute_capabilities", [])
    problems = []
    if build.compute_capability != expected:
        problems.append(
            f"{BUILD_FILE}: compute capability {build.compute_capability}, but {build.sku} has "
            f"{expected}; build again"
        )
    elif expected not in runs_on:
        problems.append(
            f"{BUILD_FILE}: the engines run on {', '.join(map(str, runs_on)) or 'nothing'}, not on "
            f"{build.sku} ({expected}); build again"
        )
    return problems


def _profile_problems(engines: EngineSet, tower: str) -> list[str]:
    """Return sizes of calls that no profile takes: each must be covered from 1 to its limit."""
    profiles = engines.build.profiles.get(tower)
    if not profiles:
        return [f"{BUILD_FILE}: the {tower} engine has no profiles; build again"]
    problems = []
    for dim, limit in BOUNDS[tower].items():
        wanted = limit(engines.build.limits)
        reached = 0
        for least, _, most in sorted(_sizes(profile, dim) for profile in profiles):
            if least > reached + 1:
                break
            reached = max(reached, most)
        if reached != wanted:
            problems.append(
                f"{BUILD_FILE}: profiles of the {tower} engine take `{dim}` up to {reached}, but "
                f"the limits promise {wanted}; build again"
            )
    room = engines.build.limits.cache_tokens
    given = {_sizes(profile, "context") for profile in profiles}
    if given != {(room, room, room)}:
        problems.append(
            f"{BUILD_FILE}: caches of the {tower} engine have room for {max(given)[2]} tokens, but "
            f"the limits ask for {room}; build again"
        )
    return problems


def _sizes(profile: Any, dim: str) -> tuple[int, int, int]:
    document = Document(profile if isinstance(profile, dict) else {}, BUILD_FILE, EngineSetError)
    sizes = document.integers(dim)
    if len(sizes) != 3:
        raise EngineSetError(f"{BUILD_FILE}: `{dim}` of a profile is {sizes}, not three sizes")
    return sizes


def _verify_interface(
    found: Verification, engines: EngineSet, tower: str, bundle: Path | None
) -> None:
    """Compare what TensorRT parsed, now or when it built, with what the manifest implies."""
    room = engines.build.limits.cache_tokens
    expected = interface_of(engines.manifest, tower, room)
    if bundle is not None:
        try:
            title, parsed = _parsed(engines, tower, bundle)
        except BuildError as problem:
            found.problems.append(str(problem))
        else:
            what = f"{_counts(expected, tower)} graph, as {title} parses it"
            found.take(what, differences(parsed, expected))
        return
    report = engines.build.extra.get("reports", {}).get(tower, {})
    reported = _reported(report.get("parsed"))
    if reported is None:
        found.not_verified.append(
            f"inputs and outputs of the {tower} engine: its builder reported none; --bundle lets "
            "TensorRT parse the graph again"
        )
        return
    expected = interface_of(engines.manifest, tower, room, reported.inputs)
    what = f"{_counts(expected, tower)} engine, as its builder parsed them"
    found.take(what, differences(reported, expected))


def _counts(interface: Interface, tower: str) -> str:
    return f"{len(interface.inputs)} inputs and {len(interface.outputs)} outputs of the {tower}"


def _reported(parsed: Any) -> Interface | None:
    """Return the interface that a builder wrote into build.json; None where it wrote none."""
    if not isinstance(parsed, dict) or not {"inputs", "outputs"} <= parsed.keys():
        return None

    try:
        return Interface(specs_of(parsed["inputs"]), specs_of(parsed["outputs"]))
    except (AttributeError, TypeError, ValueError) as problem:
        raise EngineSetError(
            f"{BUILD_FILE}: the builder's report of inputs and outputs is malformed; build again"
        ) from problem


def _parsed(engines: EngineSet, tower: str, bundle: Path) -> tuple[str, Interface]:
    """Return the name of the library, and what it finds in the graph of the engine.

    Raises:
        BuildError: The graph is another one, or cannot be parsed.
    """
    from twotower_engines.building.flavours.tensorrt_rtx import LIBRARY

    manifest = read_manifest(bundle)
    digest = engines.build.graph_sha256.get(tower)
    for precision in manifest.graphs:
        path = bundle / manifest.graph(precision, tower).file
        if path.is_file() and file_sha256(path) == digest:
            # One of both parses for either flavour: it is the same parser, and here without a GPU.
            sizes = {"context": engines.build.limits.cache_tokens}
            return LIBRARY.title, parse(path, LIBRARY, sizes)
    raise BuildError(
        f"{bundle}: has no {tower} graph with sha256 {str(digest)[:12]}, from which the engine was "
        "built; name the bundle that the engines were built from"
    )
