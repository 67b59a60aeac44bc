"""Bytes that compiled towers of the released size move in a call, against the least that they must.

    python -m benchmarks.traffic            # about fifteen minutes on two cores, no GPU

TensorRT-RTX compiles both towers for SM120 with a context of 8,192 tokens and room for a call, and
says what each final kernel reads and writes. The least is every input of the graph read once (of
embeddings, the rows of the tokens) and every output written once (of a cache, the new rows). Each
tower is compiled twice: with the ops' bodies, as TensorRT-RTX runs it, and cut at our plugins,
which is what TensorRT compiles between them: there, what a plugin reads is an output. TensorRT
shares the compiler but times its choices: its engines may differ. Quantized weights, as the default
recipe stores them, are compiled for one row: FP8 in both forms, 4 bits cut at our plugins.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import today, write_results
from tests.support.compiled import TOWERS, compiled
from twotower_contract.traffic import traffic_of

CAPACITY = 8192 + 256
CALLS = {"block": [(rows, 16) for rows in (1, 4, 16)], "chunk": [(1, 256), (4, 256)]}
FORMS: dict[str, tuple[bool, str | None]] = {
    "bodies": (False, None),
    "cut at plugins": (True, None),
    "bodies, fp8": (False, "fp8"),
    "cut at plugins, fp8": (True, "fp8"),
    "cut at plugins, nvfp4": (True, "nvfp4"),
    "cut at plugins, int4": (True, "int4"),
}
"""Whether a graph is cut, and the format of its weights."""


def cases() -> Iterator[tuple[str, str, str, int, int]]:
    """Yield the form, the kind of call, the tower, and rows and tokens of each measurement."""
    for form, (_, format_) in FORMS.items():
        for kind, calls in CALLS.items():
            for tower in TOWERS if kind == "block" else ("context",):
                for rows, tokens in calls:
                    if format_ is None or (rows, kind) == (1, "block"):
                        yield form, kind, tower, rows, tokens


def measure(
    form: str,
    kind: str,
    tower: str,
    rows: int,
    tokens: int,
    folder: Path,
    capability: str = "12.0",
) -> dict[str, Any]:
    """Compile one tower for one size of call and add up what its kernels move."""
    start = time.perf_counter()
    is_cut, format_ = FORMS[form]
    listing = compiled(
        folder, tower, rows, tokens, CAPACITY, capability=capability, format_=format_, is_cut=is_cut
    )
    traffic = traffic_of(listing)
    return {
        "form": form,
        "tower": tower,
        "call": kind,
        "rows": rows,
        "tokens": tokens,
        "moved_bytes": traffic.moved.total,
        "least_bytes": traffic.least,
        "ratio": round(traffic.ratio, 3),
        "scratch_bytes": listing.scratch,
        "copied_inputs": len(traffic.copies),
        "kernels": traffic.moved.kernels,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        results = []
        for case in cases():
            results.append(measure(*case, Path(name)))
            print(results[-1], flush=True)
    lines = [
        "# Bytes that compiled towers move",
        "",
        f"`python -m benchmarks.traffic`, {today()}, TensorRT-RTX's compiler on 2 cores, no GPU;",
        f"the released size, bf16, SM120, caches of {CAPACITY:,} tokens.",
        "",
        "| form | tower | rows x tokens | GB moved | least | ratio | scratch, MB | inputs copied |"
        " kernels | compiled in, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {one['form']} | {one['tower']} | {one['rows']} x {one['tokens']} | "
            f"{one['moved_bytes'] / 1e9:.1f} | {one['least_bytes'] / 1e9:.1f} | "
            f"{one['ratio']:.2f} | {one['scratch_bytes'] / 1e6:.0f} | {one['copied_inputs']} | "
            f"{one['kernels']} | {one['seconds']:.0f} |"
            for one in results
        ),
    ]
    write_results("traffic-rtx", lines, {"results": results})


if __name__ == "__main__":
    main()
