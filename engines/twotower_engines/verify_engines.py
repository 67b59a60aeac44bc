"""Verifies an engine set for a GPU: what this machine can check, and what it cannot.

Anywhere: digests, the checkpoint, the profiles, and the inputs and outputs that TensorRT's own
parser found in the graphs. On the GPU: the golden answer, and logits against an engine set of the
CPU flavour. What was not verified is said, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .compare_runtimes import TOLERANCES, Difference, compare_runtimes
from .document import Document
from .engine_set import BUILD_FILE, EngineSet, Limits, file_sha256
from .errors import BuildError, EnginesError, EngineSetError, PlanError
from .interface import Interface, TensorSpec, differences, interface_of
from .manifest import read_manifest
from .runtime import Runtime, open_runtime
from .self_test import check
from .skus import find_sku, local_sku
from .weights import WeightStore

__all__ = ["Verification", "verify_engines"]

LISTED_AT_MOST = 5

# Which dimension of a profile is bounded by which limit, for each tower.
BOUNDS: Mapping[str, Mapping[str, Callable[[Limits], int]]] = {
    "context": {
        "batch": lambda limits: limits.slots,
        "tokens": lambda limits: limits.max_tokens_per_call,
        "context": lambda limits: limits.context,
    },
    "denoiser": {
        "batch": lambda limits: limits.slots,
        "block": lambda limits: limits.block_size_max,
        "context": lambda limits: limits.context,
    },
}


@dataclass(slots=True)
class Verification:
    """What was found.

    Attributes:
        engines: Folder of the engine set.
        verified: What was checked and is right, a sentence for each.
        problems: What is wrong.
        not_verified: What could not be checked here, and why.
        differences: Outputs that were compared on the GPU.
    """

    engines: Path
    verified: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_verified: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether something was verified and nothing is wrong."""
        return bool(self.verified) and not self.problems

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "target": str(self.engines),
            "passed": self.passed,
            "verified": self.verified,
            "problems": self.problems,
            "notes": self.not_verified,
            "tensors": [asdict(one) for one in self.differences],
        }

    def take(self, what: str, found: list[str]) -> None:
        """Note that `what` is right, or what is wrong with it."""
        if not found:
            self.verified.append(what)
        shown = found[:LISTED_AT_MOST]
        if len(found) > len(shown):
            shown.append(f"{len(found) - len(shown)} more like these")
        self.problems += shown


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
        bundle: What the engines were built from, so that TensorRT parses its graphs again.
        against: An engine set of the CPU flavour of the same model, to compare logits with.

    Raises:
        BundleError: The bundle is none.
    """
    found = Verification(engines.folder)
    plans = ", ".join(sorted(engines.build.plans))
    found.take(f"digests of the plans ({plans})", _raised(engines.check_plans))
    store = WeightStore(engines.manifest, checkpoint)
    count = len(engines.manifest.tensors)
    found.take(f"checkpoint {store.folder}: {count} tensors as exported", _raised(store.check))
    found.take("SKU and compute capability", _capability_problems(engines))
    for tower in engines.build.plans:
        found.take(
            f"profiles of the {tower} plan: all calls within the limits",
            _profile_problems(engines, tower),
        )
        _verify_interface(found, engines, tower, bundle)
    _verify_running(found, engines, checkpoint, against)
    return found


def _raised(check: Callable[[], None]) -> list[str]:
    """The message of the error that a check raises."""
    try:
        check()
    except EnginesError as problem:
        return [str(problem)]
    return []


def _capability_problems(engines: EngineSet) -> list[str]:
    build = engines.build
    try:
        expected = find_sku(build.sku).compute_capability
    except PlanError:  # a SKU file of the user's: nothing to compare with
        expected = build.compute_capability
    runs_on = build.extra.get("compute_capabilities", [])
    problems = []
    if build.compute_capability != expected:
        problems.append(
            f"{BUILD_FILE}: compute capability {build.compute_capability}, but {build.sku} has "
            f"{expected}; build again"
        )
    elif expected not in runs_on:
        problems.append(
            f"{BUILD_FILE}: the plans run on {', '.join(map(str, runs_on)) or 'nothing'}, not on "
            f"{build.sku} ({expected}); build again"
        )
    return problems


def _profile_problems(engines: EngineSet, tower: str) -> list[str]:
    """Sizes of calls that no profile takes: each dimension must be covered from 1 to its limit."""
    profiles = engines.build.profiles.get(tower)
    if not isinstance(profiles, list) or not profiles:
        return [f"{BUILD_FILE}: the {tower} plan has no profiles; build again"]
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
                f"{BUILD_FILE}: the profiles of the {tower} plan take `{dim}` up to {reached}, but "
                f"the limits promise {wanted}; build again"
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
    expected = interface_of(engines.manifest, tower)
    counts = f"{len(expected.inputs)} inputs and {len(expected.outputs)} outputs of the {tower}"
    if bundle is not None:
        try:
            title, parsed = _parsed(engines, tower, bundle)
        except BuildError as problem:
            found.problems.append(str(problem))
        else:
            found.take(f"{counts} graph, as {title} parses it", differences(parsed, expected))
        return
    reported = engines.build.extra.get("reports", {}).get(tower, {})
    outputs = reported.get("outputs")
    if not isinstance(outputs, dict):
        found.not_verified.append(
            f"inputs and outputs of the {tower} plan: its builder reported none; --bundle lets "
            "TensorRT parse the graph again"
        )
        return
    specs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in outputs.items()}
    problems = differences(Interface({}, specs), Interface({}, expected.outputs))
    if reported.get("inputs") != len(expected.inputs):
        problems.append(
            f"the {tower} plan has {reported.get('inputs')} inputs, not {len(expected.inputs)}"
        )
    found.take(f"{counts} plan, as its builder reported them", problems)
    found.not_verified.append(
        f"names and shapes of the inputs of the {tower} plan: --bundle lets TensorRT parse the "
        "graph again"
    )


def _parsed(engines: EngineSet, tower: str, bundle: Path) -> tuple[str, Interface]:
    """The name of the library, and what it finds in the graph that the plan was built from.

    Raises:
        BuildError: The graph is another one, or cannot be parsed.
    """
    from .flavours.parsing import parse
    from .flavours.rtx_library import find_library

    manifest = read_manifest(bundle)
    digest = engines.build.graph_sha256.get(tower)
    for precision in manifest.graphs:
        path = bundle / manifest.graph(precision, tower).file
        if path.is_file() and file_sha256(path) == digest:
            # One of both parses for either flavour: it is the same parser, and here without a GPU.
            library = find_library()
            return library.title, parse(path, library)
    raise BuildError(
        f"{bundle}: has no {tower} graph with sha256 {str(digest)[:12]}, from which the plan was "
        "built; name the bundle that the engines were built from"
    )


def _verify_running(
    found: Verification, engines: EngineSet, checkpoint: Path | None, against: EngineSet | None
) -> None:
    """On a GPU, load the engines, ask for the golden answer and compare logits."""
    try:
        present = local_sku()
    except PlanError:
        found.not_verified.append(
            "that the plans load and what they compute: no GPU of the table was found here; run "
            f"the same on a machine with one for {engines.build.sku}"
        )
        return
    if present.compute_capability != engines.build.compute_capability:
        found.not_verified.append(
            f"that the plans load and what they compute: they are for compute capability "
            f"{engines.build.compute_capability}, this machine's {present.title} has "
            f"{present.compute_capability}"
        )
        return
    try:
        runtime = open_runtime(engines, checkpoint)
    except EnginesError as problem:
        found.problems.append(f"the engines cannot be loaded: {problem}")
        return
    try:
        verify_loaded(found, engines, runtime, checkpoint, against)
    finally:
        runtime.close()


def verify_loaded(
    found: Verification,
    engines: EngineSet,
    runtime: Runtime,
    checkpoint: Path | None = None,
    against: EngineSet | None = None,
) -> None:
    """Verify what loaded engines compute.

    Args:
        found: Receives what is found.
        engines: The engine set.
        runtime: The same, loaded.
        checkpoint: As of `verify_engines`.
        against: As of `verify_engines`.
    """
    golden = check(engines, runtime)
    if golden.status in ("unavailable", "plausible"):
        found.not_verified.append(f"the golden answer: {golden.reason}")
    else:
        found.take(f"golden answer: {golden.reason}", [] if golden.ok else [golden.reason])
    if against is None:
        found.not_verified.append(
            "logits: --against CPU_ENGINES compares them with those of the CPU flavour"
        )
        return
    if engines.build.precision not in TOLERANCES:
        found.not_verified.append(f"logits: no tolerance is known for {engines.build.precision}")
        return
    if against.manifest.checkpoint.fingerprint != engines.manifest.checkpoint.fingerprint:
        found.problems.append(f"{against.folder}: is of another checkpoint; build it from the same")
        return
    reference = open_runtime(against, checkpoint)
    try:
        found.differences = compare_runtimes(runtime, reference, engines.build.precision)
    finally:
        reference.close()
    wrong = [str(one) for one in found.differences if not one.passed]
    found.take(f"logits against {against.folder}", wrong)
