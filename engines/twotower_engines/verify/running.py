"""Verifies what engines for a GPU compute, on that GPU: the golden answer, and every output.

The reference is an engine set of the CPU flavour of the same model: the one that was named, the one
beside the engines, or one that is built for this.
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_contract.errors import EngineSetError, TwoTowerError
from twotower_contract.skus import known_skus
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.building.checkpoint_engines import cached_engines
from twotower_engines.planning.fit import require_fit
from twotower_engines.planning.local_gpu import local_gpu
from twotower_engines.planning.model_size import read_model_size
from twotower_engines.planning.plan import PlanRequest, plan_memory
from twotower_engines.runtime.interface import Runtime
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.runtime.resident.runtime import Tower
from twotower_engines.verify.differences import TOLERANCES, Array, Difference
from twotower_engines.verify.outputs import Reference, compare_tower
from twotower_engines.verify.report import Sources, Verification
from twotower_engines.verify.runtimes import compare_runtimes
from twotower_engines.verify.self_test import run_self_test

SLOTS, CONTEXT = 3, 256
"""Limits of a reference that is built for this: what the comparisons use."""

TowerOpener = Callable[[str], AbstractContextManager[Tower]]
"""Load a tower by its name, for as long as it is compared."""


def verify_running(found: Verification, engines: EngineSet, sources: Sources) -> None:
    """Load the engines, if this machine has their GPU, and verify what they compute."""
    reason = _not_here(engines)
    if reason is not None:
        found.not_verified.append(f"that the engines load and what they compute: {reason}")
        return
    with contextlib.ExitStack() as stack:
        try:
            runtime = open_runtime(engines, sources.checkpoint)
        except TwoTowerError as problem:
            found.problems.append(f"the engines cannot be loaded: {problem}")
            return
        try:
            verify_golden(found, engines, runtime)
            reference = _reference(found, engines, sources, stack)
            if reference is None:
                return
            verify_loaded(found, engines, runtime, reference, sources.checkpoint)
        finally:
            runtime.close()

        def open_tower(name: str) -> AbstractContextManager[Tower]:
            return _on_device(engines, name, sources.checkpoint)

        verify_outputs(found, engines, open_tower, reference, sources.checkpoint)


def _not_here(engines: EngineSet) -> str | None:
    """Say why this machine cannot run the engines; None where it can."""
    build = engines.build
    gpu = local_gpu()
    if gpu is None:
        return (
            "no NVIDIA GPU was found here; run the same on a machine with one for "
            f"{build.sku} (compute capability {build.compute_capability})"
        )
    if gpu.compute_capability not in build.extra.get("compute_capabilities", []):
        return f"they are for compute capability {build.compute_capability}, this machine has {gpu}"
    if build.machine not in (None, platform.machine()):
        return f"they are for {build.machine}, this machine is {platform.machine()}"
    return None


def verify_golden(found: Verification, engines: EngineSet, runtime: Runtime) -> None:
    """Ask loaded engines for the bundle's golden answer."""
    golden = run_self_test(engines, runtime)
    if golden.status in ("unavailable", "plausible"):
        found.not_verified.append(f"the golden answer: {golden.reason}")
    else:
        found.take(f"golden answer: {golden.reason}", [] if golden.ok else [golden.reason])


def _reference(
    found: Verification, engines: EngineSet, sources: Sources, stack: contextlib.ExitStack
) -> EngineSet | None:
    """Return engines to compare with; None, and a note or problem, where there are none."""
    if engines.build.precision not in TOLERANCES:
        found.not_verified.append(f"outputs: no tolerance is known for {engines.build.precision}")
        return None
    try:
        return stack.enter_context(cpu_engines(engines, sources))
    except EngineSetError as problem:
        found.problems.append(str(problem))
    except TwoTowerError as problem:
        found.not_verified.append(f"outputs against the CPU flavour: {problem}")
    return None


@contextlib.contextmanager
def cpu_engines(engines: EngineSet, sources: Sources) -> Iterator[EngineSet]:
    """Give engines of the CPU flavour of the same model.

    In this order: those that were named; a folder `cpu` beside the engines; built from the bundle,
    for as long as they are needed; exported and built from the checkpoint, into the cache.

    Raises:
        EngineSetError: Those that were named are no such engines.
        PlanError: The CPU flavour, in float32, does not fit into this machine's memory.
        BuildError: They cannot be built.
    """
    fingerprint = engines.manifest.checkpoint.fingerprint
    if sources.against is not None:
        _check_reference(sources.against, fingerprint)
        yield sources.against
        return
    context = min(CONTEXT, engines.build.limits.context)
    size = read_model_size(engines.folder)
    cpu = known_skus()["cpu"]
    require_fit(plan_memory(size, PlanRequest(cpu, slots=SLOTS, context=context)))
    beside = _beside(engines)
    if beside is not None:
        yield beside
        return
    if sources.bundle is not None:
        with tempfile.TemporaryDirectory() as folder:
            options = BuildOptions(cpu, slots=SLOTS, context=context)
            yield build_engines(sources.bundle, Path(folder), options)[0]
        return
    checkpoint = sources.checkpoint or WeightStore(engines.manifest).folder
    yield open_engine_set(cached_engines(str(checkpoint)))


def _beside(engines: EngineSet) -> EngineSet | None:
    """Return the CPU's engines in the same folder, if they are there and of the same checkpoint."""
    with contextlib.suppress(TwoTowerError):
        found = open_engine_set(engines.folder.parent, "cpu")
        _check_reference(found, engines.manifest.checkpoint.fingerprint)
        return found
    return None


def _check_reference(reference: EngineSet, fingerprint: str) -> None:
    if reference.build.flavour != "onnxruntime":
        raise EngineSetError(
            f"{reference.folder}: is of flavour {reference.build.flavour}, and engines are "
            "compared with those of the CPU; build them with `twotower build BUNDLE --sku cpu`"
        )
    if reference.manifest.checkpoint.fingerprint != fingerprint:
        raise EngineSetError(
            f"{reference.folder}: is of another checkpoint; build it from the same"
        )


def verify_loaded(
    found: Verification,
    engines: EngineSet,
    runtime: Runtime,
    reference: EngineSet,
    checkpoint: Path | None = None,
) -> None:
    """Compare what loaded engines hand out, call after call, with the CPU flavour."""
    other = open_runtime(reference, checkpoint)
    try:
        differences = compare_runtimes(runtime, other, engines.build.precision)
    finally:
        other.close()
    _take(found, f"generation against {reference.folder}", differences)


def verify_outputs(
    found: Verification,
    engines: EngineSet,
    open_tower: TowerOpener,
    reference: EngineSet,
    checkpoint: Path | None = None,
) -> None:
    """Compare every output of every engine with the CPU flavour, given the same inputs.

    Args:
        open_tower: Loads one of its towers; one at a time.
    """
    store = WeightStore(reference.manifest, checkpoint)
    states: dict[str, Array] = {}
    build = engines.build
    for name in (one for one in ("context", "denoiser") if one in build.plans):
        graph = Reference(reference.engine_path(name), dict(store.all_float32(name)))
        with open_tower(name) as tower:
            differences = compare_tower(
                name, tower, graph, engines.manifest, build.limits, build.precision, states
            )
        what = f"all {len(differences)} outputs of {name} calls against {reference.folder}"
        _take(found, what, differences)


def _take(found: Verification, what: str, differences: list[Difference]) -> None:
    found.differences += differences
    found.take(what, [str(one) for one in differences if not one.passed])


@contextlib.contextmanager
def _on_device(engines: EngineSet, name: str, checkpoint: Path | None) -> Iterator[Tower]:
    """Load one tower onto the first GPU; digests and checkpoint were checked."""
    from twotower_engines.runtime.resident.cuda_device import CudaDevice
    from twotower_engines.runtime.resident.tensorrt_engine import TensorRtEngine
    from twotower_engines.runtime.resident.upload import upload_weights

    device = CudaDevice(0)
    try:
        engine = TensorRtEngine(engines.engine_path(name), engines.build.flavour, device)
        try:
            store = WeightStore(engines.manifest, checkpoint)
            yield Tower(engine, device, upload_weights(store, name, device, inputs=engine.inputs))
        finally:
            engine.close()
    finally:
        device.close()
