"""Time and memory of `twotower build` against the number of layers, at full width, cold and cached.

    python -m benchmarks.build

Bundles of checkpoints of the released sizes made of holes, with the first 2, 8, 26 and 52 layers,
are built into TensorRT-RTX plans by the command in a process of its own, both towers at once on two
cores; then once more, into another folder, from the cache. A build is bound by NVIDIA's code
generator, whose time grows faster than the layers: it compiles a tower as one piece.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import machine, today, write_results
from tests.support import engine_bundles as bundles
from tests.support import sparse_checkpoint as sparse
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint

LAYERS = (2, 8, 26, 52)
SKU = "rtx-pro-6000"


def measure(bundle: Path, engines: Path) -> tuple[float, int]:
    """Build once; returns seconds, and the most memory of all its processes in bytes."""
    start = time.perf_counter()
    process = bundles.start_build(bundle, engines, "--sku", SKU, "--json")
    watch = bundles.MemoryWatch(process.pid)
    _, said = process.communicate()
    peak = watch.stop()
    assert process.returncode == 0, said
    return time.perf_counter() - start, peak


def reports_of(engines: Path) -> list[dict[str, Any]]:
    """Return the builder's report on each tower's plan."""
    build = json.loads((engines / "build.json").read_text(encoding="utf-8"))
    return [build["extra"]["reports"][tower] for tower in ("context", "denoiser")]


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for layers in LAYERS:
            kept = {"hybrid_override_pattern": sparse.FULL_PATTERN[:layers]}
            config = sparse.FULL_CONFIG | kept | {"num_hidden_layers": layers}
            checkpoint = sparse.write_sparse_checkpoint(folder / f"hub-{layers}", config)
            bundle = folder / f"bundle-{layers}"
            write_bundle(open_checkpoint(checkpoint), bundle)
            cold, peak = measure(bundle, folder / f"engines-{layers}")
            cached, _ = measure(bundle, folder / f"again-{layers}")
            reports = reports_of(folder / f"engines-{layers}" / SKU)
            plans = sum(p.stat().st_size for p in (folder / f"engines-{layers}").rglob("*.plan"))
            rows.append(
                {
                    "layers": layers,
                    "cold_seconds": round(cold, 1),
                    # of the tower that waited longer: what other work on this machine took away
                    "waited_seconds": max(one["waited_seconds"] for one in reports),
                    "cpu_seconds": [one["cpu_seconds"] for one in reports],
                    "cached_seconds": round(cached, 2),
                    "peak_gb": round(peak / 1e9, 2),
                    "plans_mb": round(plans / 1e6, 1),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    report(rows)


def table_row(row: dict[str, Any]) -> str:
    ratio = f"{row['cold_seconds'] / row['cached_seconds']:.0f}x"
    keys = ("layers", "cold_seconds", "waited_seconds")
    cpu = " + ".join(f"{seconds:.1f}" for seconds in row["cpu_seconds"])
    cells = [*(row[key] for key in keys), cpu, row["cached_seconds"], ratio]
    cells += [row["peak_gb"], row["plans_mb"]]
    return f"| {' | '.join(map(str, cells))} |"


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table and write it to `results/`."""
    where = machine()
    lines = [
        "# Building TensorRT-RTX plans",
        "",
        f"`python -m benchmarks.build`, {today()}, {where}; full width, both towers,",
        f'`--sku {SKU}`. The plans were not run: that needs the GPU. "Waited" is what other',
        "processes of the machine took from the tower that waited longer, a part of the seconds",
        'before it; "CPU" is what the two builders computed, context and denoiser.',
        "",
        "| layers | cold, s | waited, s | CPU, s | cached, s | ratio | memory, GB | plans, MB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        *map(table_row, rows),
    ]
    print("\n".join(lines))
    write_results("build-rtx", lines, {"machine": where, "sku": SKU, "rows": rows})


if __name__ == "__main__":
    main()
