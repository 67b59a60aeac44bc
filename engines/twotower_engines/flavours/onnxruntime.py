"""The CPU flavour: the float32 graphs as they are, once ONNX Runtime has shown that it takes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from twotower_engines.engine_set import PlanFile, file_sha256
from twotower_engines.errors import BuildError

__all__ = ["build_tower", "versions"]


def versions() -> dict[str, str]:
    """Return the version of what takes part in a build."""
    return {"onnxruntime": _import().__version__}


def build_tower(graph: Path, folder: Path, tower: str) -> PlanFile:
    """Write the engine of one tower.

    Args:
        graph: The float32 graph.
        folder: Where the engine goes.
        tower: `context` or `denoiser`.

    Raises:
        BuildError: ONNX Runtime refuses the graph.
    """
    ort = _import()
    target = folder / f"{tower}.onnx"
    shutil.copyfile(graph, target)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        ort.InferenceSession(str(target), options, ["CPUExecutionProvider"])
    except Exception as problem:  # ONNX Runtime's own exceptions share no useful base
        raise BuildError(
            f"{graph}: ONNX Runtime {ort.__version__} refuses it: {problem}; "
            "export the checkpoint again with this version of twotower"
        ) from problem
    return PlanFile(target.name, file_sha256(target))


def _import() -> Any:
    import onnxruntime

    return onnxruntime
