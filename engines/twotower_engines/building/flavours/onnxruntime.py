"""The CPU flavour: the float32 graphs as they are, once ONNX Runtime has opened them.

Its engines run in `runtime/onnxruntime.py`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.building.flavours.flavour import Flavour, Needs, Order, Target
from twotower_engines.building.flavours.process import Progress
from twotower_engines.errors import BuildError


class OnnxRuntimeFlavour(Flavour):
    """See `flavour.Flavour`."""

    name = "onnxruntime"
    suffix = ".onnx"
    is_cached = False  # a copy of the graph is made as fast as it is found
    graphs = "float32"  # the CPU provider has no bf16 products

    def versions(self) -> dict[str, str]:
        """Return the version of ONNX Runtime."""
        try:
            return {"onnxruntime": importlib.metadata.version("onnxruntime")}
        except importlib.metadata.PackageNotFoundError as problem:
            raise BuildError(
                "ONNX Runtime is not installed; install it with: pip install 'twotower[build]'"
            ) from problem

    def check(self, target: Target) -> None:
        """Nothing to refuse: a CPU is always there."""

    def recipe(self, tower: str, target: Target) -> dict[str, Any]:
        """Nothing but the graph decides: sessions take any shape."""
        return {"profiles": []}

    def build(
        self, orders: Mapping[str, Order], target: Target, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """Copy each graph and open it once."""
        made = {}
        for tower, order in orders.items():
            progress(tower, "opening it with ONNX Runtime")
            shutil.copyfile(order.graph, order.engine)
            made[tower] = _opened(order.engine, order.graph)
        return made

    def needs(self, target: Target) -> Needs:
        """Nothing: an ONNX file is the same everywhere."""
        return Needs()

    def loader(self, target: Target) -> dict[str, Any]:
        """Nothing that the runtime does not see."""
        return {}


def _opened(plan: Path, graph: Path) -> dict[str, Any]:
    """Return what ONNX Runtime sees in a graph.

    Raises:
        BuildError: It refuses the graph.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(plan), options, ["CPUExecutionProvider"])
    except Exception as problem:  # ONNX Runtime's own exceptions share no useful base
        raise BuildError(
            f"{graph}: ONNX Runtime {ort.__version__} refuses it: {problem}; "
            "export the checkpoint again with this version of twotower"
        ) from problem
    return {"inputs": len(session.get_inputs()), "outputs": len(session.get_outputs())}
