"""Read a graph with TensorRT's own parser: its inputs and outputs, without building anything.

`python -m twotower_engines.building.flavours.parsing MODULE GRAPH RESULT SIZES` is the process that
loads the library, for the reasons given in `worker.py`; SIZES is JSON.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower_engines.artifacts.engine_interface import Interface, TensorSpec
from twotower_engines.building.flavours.gpu_graph import set_sizes
from twotower_engines.building.flavours.library_build import RefusedError, parsed_graph
from twotower_engines.building.flavours.process import Library
from twotower_engines.errors import BuildError

SECONDS = 300


def parse(graph: Path, library: Library, sizes: Mapping[str, int]) -> Interface:
    """Let a library parse an ONNX file.

    Args:
        graph: The file.
        library: The TensorRT to parse with.
        sizes: Named dimensions that become numbers, as in the engine.

    Raises:
        BuildError: The library cannot be loaded, or refuses the graph.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "interface.json"
        command = [sys.executable, "-m", "twotower_engines.building.flavours.parsing"]
        done = subprocess.run(
            [*command, library.module, str(graph), str(result), json.dumps(sizes)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if done.returncode or not result.is_file():
            said = done.stderr.strip().splitlines()
            raise BuildError(
                f"{graph}: {library.title} does not parse it: {said[-1] if said else 'no reason'}; "
                "export the checkpoint again, and see `twotower doctor`"
            )
        found = json.loads(result.read_text(encoding="utf-8"))
    return Interface(specs_of(found["inputs"]), specs_of(found["outputs"]))


def specs_of(values: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Return inputs or outputs as they were written: name to dtype and shape."""
    return {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in values.items()}


def _main(module: str, graph: str, result: str, sizes: str) -> None:
    import onnx

    model = onnx.load(graph, load_external_data=False)
    set_sizes(model, json.loads(sizes))
    try:
        parsed = parsed_graph(importlib.import_module(module), model.SerializeToString())
    except RefusedError as problem:
        sys.exit(str(problem))
    Path(result).write_text(json.dumps(parsed), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
