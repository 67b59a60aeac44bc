"""Bytes that compiled towers of the released size move in a call, against the least that they must.

    python -m benchmarks.traffic            # about five minutes on two cores, no GPU

TensorRT-RTX compiles both towers for SM120 with a block of 16 tokens and a context of 8,192, and
says what each final kernel reads and writes. The least is every input of the graph read once and
every output written once. TensorRT shares the compiler but times its choices: its engines may
differ.
"""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from tests.support import ROOT
from tests.support.compiled import BYTES, made_static
from tests.support.sparse_checkpoint import FULL_CONFIG
from twotower_contract.config import ModelConfig
from twotower_contract.json_file import write_json
from twotower_contract.layout import graph_weights
from twotower_engines.building.flavours.branches import without_branches
from twotower_export.graph import build_context_graph, build_denoiser_graph
from twotower_export.graph.layers import FLOAT_WEIGHTS

RESULTS = ROOT / "benchmarks" / "results"
ROWS = (1, 4, 16)
CONTEXT, BLOCK = 8192, 16
TOWERS = {"context": (build_context_graph, "tokens"), "denoiser": (build_denoiser_graph, "block")}
SIZES = {
    onnx.TensorProto.BFLOAT16: BYTES["BFloat16"],
    onnx.TensorProto.FLOAT: BYTES["Float"],
    onnx.TensorProto.INT32: BYTES["Int32"],
}


def graph_of(tower: str) -> onnx.ModelProto:
    """Return a tower's graph as GPU flavours compile it, without weights."""
    config = ModelConfig.from_json(FULL_CONFIG)
    weights = graph_weights(config, tower)
    stored = {name: "F32" if name.endswith(FLOAT_WEIGHTS) else "BF16" for name in weights}
    return without_branches(ir.to_proto(TOWERS[tower][0](config, "bfloat16", stored, {})))


def least_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes of all inputs and outputs of a graph with fixed sizes."""
    types = [value.type.tensor_type for value in (*model.graph.input, *model.graph.output)]
    return sum(
        SIZES[one.elem_type] * math.prod(dim.dim_value for dim in one.shape.dim) for one in types
    )


def measure(tower: str, rows: int, folder: Path) -> dict[str, Any]:
    """Compile one tower for one number of rows and add up what its kernels move."""
    sizes = {"batch": rows, TOWERS[tower][1]: BLOCK, "context": CONTEXT}
    model, path = graph_of(tower), folder / f"{tower}.onnx"
    onnx.save(model, path)
    least = least_bytes(made_static(model, sizes))
    given = [f"{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, str(ROOT / "tests/support/compiled.py"), str(path), *given]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    compiled = json.loads(done.stdout)
    moved = sum(
        size
        for kernel in compiled["kernels"]
        for *_, size in (*kernel["inputs"], *kernel["outputs"])
    )
    return {
        "tower": tower,
        "rows": rows,
        "moved_bytes": moved,
        "least_bytes": least,
        "ratio": round(moved / least, 3),
        "scratch_bytes": compiled["scratch"],
        "kernels": len(compiled["kernels"]),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        results = []
        for tower in TOWERS:
            for rows in ROWS:
                results.append(measure(tower, rows, Path(name)))
                print(results[-1], flush=True)
    day = datetime.date.today().isoformat()
    write_json(RESULTS / f"traffic-rtx-{day}.json", {"date": day, "results": results})
    lines = [
        "# Bytes that compiled towers move",
        "",
        f"`python -m benchmarks.traffic`, {day}, TensorRT-RTX's compiler on 2 cores, no GPU; the",
        f"released size, bf16, function bodies, SM120, block {BLOCK}, context {CONTEXT:,}.",
        "",
        "| tower | rows | GB moved | least | ratio | scratch, MB | kernels | compiled in, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {one['tower']} | {one['rows']} | {one['moved_bytes'] / 1e9:.1f} | "
            f"{one['least_bytes'] / 1e9:.1f} | {one['ratio']:.2f} | "
            f"{one['scratch_bytes'] / 1e6:.0f} | {one['kernels']} | {one['seconds']:.0f} |"
            for one in results
        ),
    ]
    (RESULTS / f"traffic-rtx-{day}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
