"""Time and memory of `twotower export` against the number of layers, at full width.

    python -m benchmarks.export

Checkpoints of the released sizes made of holes (real names, headers and layout, no weights), with
the first 2, 8, 26 and 52 layers; each is exported by the command in a process of its own. For
comparison, PyTorch's exporter traces a context tower of Mamba and attention layers of the same
sizes on the meta device (it cannot trace the experts' loop, which depends on data). The graphs of
the 52-layer bundle are loaded as they are, one function per kind of layer, and with all functions
inlined. What `twotower verify` takes of the 52 layers, on random weights, is measured by
`tests/export/test_full_size_verify.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import machine, today, write_results
from tests.support import ROOT, TWOTOWER
from tests.support.sparse_checkpoint import FULL_CONFIG, FULL_PATTERN, write_sparse_checkpoint

LAYERS = (2, 8, 26, 52)
REPEATS = 3
TRACED = ("M", "MM*MM*")

TRACE = """
import sys
from dataclasses import replace
import torch
from tests.support.sparse_checkpoint import full_config
from twotower_export.reference.towers import ContextTower, empty_states, on_meta
config = replace(full_config(), pattern=sys.argv[1])
tower = on_meta(lambda: ContextTower(config)).eval()
with torch.device("meta"):
    states = empty_states(config, 2, 64, torch.float32)
    ids, rows = torch.zeros(2, 16, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
torch.onnx.export(
    tower, (ids, rows, rows), kwargs={"states": states}, dynamo=True, verbose=False, optimize=False
)
"""


# Both print the seconds that the graph in their first argument takes, without the library's start.
LOAD = """
import sys, time
from twotower_contract.onnxruntime import import_onnxruntime
onnxruntime = import_onnxruntime()
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
start = time.perf_counter()
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(time.perf_counter() - start)
"""
PARSE = """
import importlib, sys, time
trt = importlib.import_module(sys.argv[2])
log = trt.Logger(trt.Logger.ERROR)
flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
network = trt.Builder(log).create_network(0 if flag is None else 1 << int(flag))
parser = trt.OnnxParser(network, log)
start = time.perf_counter()
assert parser.parse_from_file(sys.argv[1]), parser.get_error(0).desc()
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Measured:
    """A process: wall-clock seconds, and the most memory it held, in bytes."""

    seconds: float
    peak: int


def measure(command: list[str]) -> Measured:
    """Run a command to its end."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command}: {errors.read().decode()[-2000:]}")
    return Measured(time.perf_counter() - start, usage.ru_maxrss * 1024)


def twotower(*arguments: str | Path) -> list[str]:
    return [*TWOTOWER, *map(str, arguments)]


def measure_export(layers: int, folder: Path) -> dict[str, Any]:
    """Export a checkpoint of `layers` layers; the best time and the worst memory of some runs."""
    pattern = FULL_PATTERN[:layers]
    config = FULL_CONFIG | {"hybrid_override_pattern": pattern, "num_hidden_layers": layers}
    checkpoint = write_sparse_checkpoint(folder / f"cache-{layers}", config)
    bundle = folder / f"bundle-{layers}"
    runs = [measure(twotower("export", checkpoint, bundle)) for _ in range(REPEATS)]
    graphs = [path.stat().st_size for path in bundle.rglob("*.onnx")]
    return {
        "layers": layers,
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "seconds": round(min(run.seconds for run in runs), 2),
        "peak_bytes": max(run.peak for run in runs),
        "graph_bytes_largest": max(graphs),
        "bundle_bytes": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
    }


def measure_trace(pattern: str) -> dict[str, Any]:
    """Trace a context tower with PyTorch's exporter."""
    run = measure([sys.executable, "-c", TRACE, pattern])
    return {"pattern": pattern, "seconds": round(run.seconds, 2), "peak_bytes": run.peak}


def printed_seconds(program: str, *arguments: str) -> float:
    """The best of some runs of a program that prints seconds."""
    command = [sys.executable, "-c", program, *arguments]
    found = []
    for _ in range(REPEATS):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
        found.append(float(done.stdout))
    return round(min(found), 2)


def measure_functions(folder: Path) -> list[dict[str, Any]]:
    """Load each graph of the largest bundle, with its functions and with all of them inlined."""
    import onnx
    from onnx.inliner import inline_local_functions

    from twotower_engines.building.flavours.tensorrt_rtx import LIBRARY

    rows = []
    for tower in ("context", "denoiser"):
        for form in ("functions", "inlined"):
            row: dict[str, Any] = {"tower": tower, "form": form}
            for precision in ("float32", "native"):
                within = "graphs" if precision == "native" else "graphs/float32"
                graph = folder / f"bundle-{LAYERS[-1]}" / within / f"{tower}.onnx"
                model = onnx.load(graph)
                if form == "inlined":
                    model = inline_local_functions(model)
                    graph = folder / f"{tower}-{precision}-inlined.onnx"
                    onnx.save(model, graph)
                if precision == "float32":
                    row["nodes"] = len(model.graph.node)
                    row["bytes"] = graph.stat().st_size
                    row["onnxruntime_seconds"] = printed_seconds(LOAD, str(graph))
                else:
                    row["tensorrt_rtx_seconds"] = printed_seconds(PARSE, str(graph), LIBRARY.module)
            rows.append(row)
    return rows


def main() -> None:
    exports, traces = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layers in LAYERS:
            print(f"exporting {layers} layers", file=sys.stderr)
            exports.append(measure_export(layers, folder))
        for pattern in TRACED:
            print(f"tracing {pattern}", file=sys.stderr)
            traces.append(measure_trace(pattern))
        print("loading graphs with functions and inlined", file=sys.stderr)
        loaded = measure_functions(folder)
    report(exports, traces, loaded)


def report(
    exports: list[dict[str, Any]], traces: list[dict[str, Any]], loaded: list[dict[str, Any]]
) -> None:
    """Print the tables and write them to `results/`."""
    where = machine()
    lines = [
        "# Export at full width",
        "",
        f"`python -m benchmarks.export`, {today()}, {where}. Both towers, graphs in bf16 and in"
        f" float32; sparse checkpoints; best time and largest memory of {REPEATS} runs, start of"
        " the process included.",
        "",
        "| layers | checkpoint GB | seconds | peak MB | largest graph MB | bundle MB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in exports:
        sizes = [row[key] / 1e6 for key in ("peak_bytes", "graph_bytes_largest", "bundle_bytes")]
        lines.append(
            f"| {row['layers']} | {row['checkpoint_bytes'] / 1e9:.1f} | {row['seconds']} "
            f"| {sizes[0]:.0f} | {sizes[1]:.2f} | {sizes[2]:.1f} |"
        )
    lines += [
        "",
        "Tracing instead, one context tower, one precision, no experts"
        " (`torch.onnx.export(dynamo=True, optimize=False)`):",
        "",
        "| layers | seconds | peak MB |",
        "|---|---:|---:|",
        *(f"| `{t['pattern']}` | {t['seconds']} | {t['peak_bytes'] / 1e6:.0f} |" for t in traces),
        "",
        f"Graphs of {LAYERS[-1]} layers with one function per kind of layer, and with all functions"
        " inlined (`onnx.inliner`). Seconds for ONNX Runtime to make a session (float32) and for"
        f" TensorRT-RTX's parser (bf16), start of the library left out; best of {REPEATS}:",
        "",
        "| tower | form | nodes on top | MB | ONNX Runtime s | TensorRT-RTX parser s |",
        "|---|---|---:|---:|---:|---:|",
        *(
            f"| {row['tower']} | {row['form']} | {row['nodes']} | {row['bytes'] / 1e6:.2f}"
            f" | {row['onnxruntime_seconds']} | {row['tensorrt_rtx_seconds']} |"
            for row in loaded
        ),
    ]
    print("\n".join(lines))
    content = {"machine": where, "exports": exports, "traces": traces, "functions": loaded}
    write_results("export", lines, content)


if __name__ == "__main__":
    main()
