"""Opens an engine set: the runtime of its flavour, with the weights bound."""

from __future__ import annotations

from pathlib import Path

from twotower_contract.engine_set import EngineSet
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime.interface import LoadProgress, Runtime


def open_runtime(
    engines: EngineSet,
    checkpoint: Path | None = None,
    threads: int | None = None,
    progress: LoadProgress | None = None,
    int8: bool = False,
) -> Runtime:
    """Load an engine set: check its files and the checkpoint, then bind the weights.

    Args:
        engines: The engine set.
        checkpoint: The checkpoint's folder, where it is not the one in the manifest.
        threads: CPU threads; None for one per core.
        progress: Receives the weights that are bound and the calls that are prepared.
        int8: Whether the CPU computes products in 8 bits.

    Raises:
        RuntimeLoadError: This flavour cannot run here.
        EngineSetError: An engine file is missing or changed.
        CheckpointError: The checkpoint is missing or changed.
    """
    if engines.build.flavour == "onnxruntime":
        from twotower_engines.runtime.onnxruntime import OnnxRuntime

        return OnnxRuntime(engines, checkpoint, threads, progress, int8)
    if int8:
        raise RuntimeLoadError(
            f"engines of flavour {engines.build.flavour} compute in the precision that they were "
            "built for: --int8 is for those of a CPU (`build --sku cpu`)"
        )
    from twotower_engines.runtime.resident.loading import open_resident_runtime

    return open_resident_runtime(engines, checkpoint, progress)
