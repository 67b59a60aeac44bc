"""From an engine set to a resident runtime: check, deserialize, upload, prepare."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from twotower_contract.engine_set import EngineSet
from twotower_engines.artifacts.cache_root import cache_root
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.errors import BuildError
from twotower_engines.runtime.interface import LoadProgress
from twotower_engines.runtime.resident.cuda_device import (
    CudaDevice,
    driver_cuda,
    enable_peer_access,
)
from twotower_engines.runtime.resident.refusals import (
    check_build,
    check_gpus,
    check_room,
    placement,
)
from twotower_engines.runtime.resident.runtime import ResidentRuntime, Tower
from twotower_engines.runtime.resident.tensorrt_engine import TensorRtEngine, import_tensorrt
from twotower_engines.runtime.resident.upload import tower_bytes, upload_weights, weight_sizes


def open_resident_runtime(
    engines: EngineSet, checkpoint: Path | None = None, progress: LoadProgress | None = None
) -> ResidentRuntime:
    """Load TensorRT engines, after everything that can be checked without loading them.

    All engines are deserialized before the first weight is uploaded: TensorRT must not refuse the
    second one after minutes of uploading the first one's weights. On failure everything is freed.

    Args:
        engines: An engine set of flavour `tensorrt` or `tensorrt-rtx`, which says on which GPU each
            of its towers runs.

    Raises:
        RuntimeLoadError: The package, the GPU, its driver or its memory is not what is needed.
        EngineSetError: An engine file is missing or changed.
        CheckpointError: The checkpoint is missing or changed.
        CudaError: CUDA failed.
    """
    build = engines.build
    engines.check_engine_files()
    store = WeightStore(engines.manifest, checkpoint)
    store.check()
    trt = import_tensorrt(build.flavour)
    check_gpus(build)
    placed, driver = placement(build), driver_cuda()
    with ExitStack() as stack:
        devices = {}
        for index in sorted(set(placed.values())):
            devices[index] = device = CudaDevice(index)
            stack.callback(device.close)
            name = f"{device.name} ({device.model})"
            check_build(build, trt.__version__, name, device.compute_capability, driver)
            towers = [tower for tower, place in placed.items() if place == index]
            weights = sum(tower_bytes(engines.manifest, tower) for tower in towers)
            check_room(build, device, index, weights)
        if len(devices) == 2:
            enable_peer_access(*devices.values())
        loaded = {}
        for tower, index in placed.items():
            engine = TensorRtEngine(
                engines.engine_path(tower),
                build.flavour,
                devices[index],
                _kernels_file(build.plans[tower].sha256),
            )
            stack.callback(engine.close)
            loaded[tower] = engine
        made = _upload(store, loaded, {t: devices[i] for t, i in placed.items()}, progress)
        runtime = ResidentRuntime(
            engines.manifest,
            build.limits,
            made["context"],
            made.get("denoiser"),
            None if progress is None else progress.prepared,
        )
        for engine in loaded.values():
            engine.keep_kernels()
        stack.pop_all()
    return runtime


def _kernels_file(plan: str) -> Path | None:
    """Return where the kernels compiled for an engine are kept; None where there is no cache."""
    with suppress(BuildError):
        return cache_root() / "rtx-kernels" / f"{plan}.cache"
    return None


def _upload(
    store: WeightStore,
    engines: dict[str, TensorRtEngine],
    devices: dict[str, CudaDevice],
    progress: LoadProgress | None,
) -> dict[str, Tower]:
    """Upload each tower's weights to its device; progress counts all towers together."""
    made: dict[str, Tower] = {}
    manifest = store.manifest
    sizes = {tower: sum(weight_sizes(manifest, tower)) for tower in engines}
    total = sum(sizes.values())
    before = 0

    def told(offset: int, done: int, _: int) -> None:
        if progress is not None:
            progress(offset + done, total)

    for tower, engine in engines.items():
        addresses = upload_weights(
            store, tower, devices[tower], partial(told, before), inputs=engine.inputs
        )
        made[tower] = Tower(engine, devices[tower], addresses)
        before += sizes[tower]
    return made
