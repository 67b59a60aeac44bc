"""Bytes that compiled towers of the released size move in a call, against the least that they must.

    python -m benchmarks.traffic            # about five minutes on two cores, no GPU
    python -m benchmarks.traffic fp8        # one row, weights as the default recipe stores them

TensorRT-RTX compiles both towers for SM120 with a block of 16 tokens and a context of 8,192, and
says what each final kernel reads and writes. The least is every input of the graph read once (of
embeddings, the rows of the tokens) and every output written once (of a cache, the new rows).
TensorRT shares the compiler but times its choices: its engines may differ.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.compiled import TOWERS, compiled
from twotower_contract.json_file import write_json
from twotower_contract.traffic import traffic_of

RESULTS = ROOT / "benchmarks" / "results"
ROWS = (1, 4, 16)
CONTEXT, BLOCK = 8192, 16


def measure(tower: str, rows: int, folder: Path, format_: str | None) -> dict[str, Any]:
    """Compile one tower for one number of rows and add up what its kernels move."""
    start = time.perf_counter()
    listing = compiled(folder, tower, rows, BLOCK, CONTEXT, format_=format_)
    traffic = traffic_of(listing)
    return {
        "tower": tower,
        "rows": rows,
        "moved_bytes": traffic.moved.total,
        "least_bytes": traffic.least,
        "ratio": round(traffic.ratio, 3),
        "scratch_bytes": listing.scratch,
        "copied_inputs": len(traffic.copies),
        "kernels": traffic.moved.kernels,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(format_: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as name:
        results = []
        for tower in TOWERS:
            for rows in ROWS if format_ is None else ROWS[:1]:
                results.append(measure(tower, rows, Path(name), format_))
                print(results[-1], flush=True)
    day = datetime.date.today().isoformat()
    stem = RESULTS / "-".join(["traffic-rtx", *([format_] if format_ else []), day])
    write_json(stem.with_suffix(".json"), {"date": day, "results": results})
    lines = [
        "# Bytes that compiled towers move",
        "",
        f"`python -m benchmarks.traffic`, {day}, TensorRT-RTX's compiler on 2 cores, no GPU; the",
        f"released size, {format_ or 'bf16'}, function bodies, SM120, block {BLOCK}, context",
        f"{CONTEXT:,}.",
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
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
