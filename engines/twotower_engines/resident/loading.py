"""From an engine set to a resident runtime: check, place, upload."""

from __future__ import annotations

from pathlib import Path

from twotower_engines.engine_set import EngineSet
from twotower_engines.resident.cuda_device import CudaDevice, check_peers
from twotower_engines.resident.runtime import ResidentRuntime, Tower
from twotower_engines.resident.tensorrt_engine import TensorRtEngine, check_build, import_tensorrt
from twotower_engines.resident.upload import upload_weights
from twotower_engines.weights import Progress, WeightStore

__all__ = ["open_resident_runtime"]


def open_resident_runtime(
    engines: EngineSet, checkpoint: Path | None = None, progress: Progress | None = None
) -> ResidentRuntime:
    """Load TensorRT plans: everything that can be refused is refused before one is deserialized.

    Args:
        engines: An engine set of flavour `tensorrt` or `tensorrt-rtx`. Where its memory plan says
            two GPUs, the denoiser goes to the second.
        checkpoint: The checkpoint's folder, where it is not the one in the manifest.
        progress: Told how many bytes of a tower's weights are on their way.

    Raises:
        RuntimeLoadError: The package, the GPU or its memory is not the one that is needed.
        EngineSetError: A plan is missing or changed.
        CheckpointError: The checkpoint is missing or changed.
    """
    build = engines.build
    engines.check_plans()
    store = WeightStore(engines.manifest, checkpoint)
    store.check()
    trt = import_tensorrt(build.flavour)
    gpus = int(build.memory.get("gpus", 1))
    devices = [CudaDevice(index) for index in range(gpus)]
    for device in devices:
        check_build(build, trt.__version__, device.name, device.compute_capability)
    if gpus == 2:
        check_peers(*devices)

    def tower(name: str, device: CudaDevice) -> Tower:
        weights = upload_weights(store, name, device, progress)
        return Tower(
            TensorRtEngine(engines.plan_path(name), build.flavour, device), device, weights
        )

    context = tower("context", devices[0])
    denoiser = tower("denoiser", devices[-1]) if "denoiser" in build.plans else None
    return ResidentRuntime(engines.manifest, build.limits, context, denoiser)
