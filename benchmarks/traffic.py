"""Bytes that compiled towers of the released size move in a call, against the least that they must.

    python -m benchmarks.traffic              # about half an hour on two cores, no GPU
    python -m benchmarks.traffic plugins      # cut at our plugins alone: five minutes
    python -m benchmarks.traffic denoiser     # its bodies; the rest is kept from the newest results
    python -m benchmarks.traffic quantized    # ten minutes

TensorRT-RTX compiles both towers for SM120 with a context of 8,192 tokens and room for a call of
256, or for the longer chunk that is measured, and says what each final kernel reads and writes. The
least is every input of the graph read once (of embeddings, the rows of the tokens) and every output
written once (of a cache, the new rows). Each tower is compiled twice: with the ops' bodies, as
TensorRT-RTX runs it, and cut at our plugins, which is what TensorRT compiles between them: there,
what a plugin reads is an output. TensorRT shares the compiler but times its choices: its engines
may differ. A denoiser of bodies is compiled for greedy rows, whose entropy and logits nobody asks
for, and for rows that draw noise. Quantized weights are those of the default recipe, at one row:
FP8 in both forms, 4 bits cut at our plugins.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, today, write_results
from tests.support.compiled import TOWERS, compiled, copies
from twotower_contract.traffic import traffic_of

CONTEXT, ROOM = 8192, 256
BLOCKS = [(rows, 16) for rows in (1, 4, 16)]
CHUNKS = {
    "bodies": [(1, 256), (4, 256)],
    "cut at plugins": [(1, 256), (4, 256), (1, 1024)],
}
"""Rows and tokens of a prompt's chunks, which are longer with our kernels."""
FORMS = {"bodies": False, "cut at plugins": True}
"""Whether a graph is cut."""

QUANTIZED = (
    ("cut at plugins", "int4", "12.0"),
    ("cut at plugins", "nvfp4", "12.0"),
    ("cut at plugins", "fp8", "12.0"),
    ("bodies", "fp8", "12.0"),
    ("bodies", "fp8", "8.9"),
)
"""Forms, formats and compute capabilities of what is measured with quantized weights."""


def cases() -> Iterator[tuple[str, str, int, int, tuple[str, ...]]]:
    """Yield the form, the tower, rows, tokens, and the lists that name all rows."""
    for form in FORMS:
        for tower in TOWERS:
            for call in BLOCKS:
                yield form, tower, *call, ()
        for call in CHUNKS[form]:
            yield form, "context", *call, ()
    for call in BLOCKS:
        yield "bodies", "denoiser", *call, ("sampled_rows",)


def measure(
    form: str,
    tower: str,
    rows: int,
    tokens: int,
    lists: tuple[str, ...] = (),
    format_: str | None = None,
    capability: str = "12.0",
) -> dict[str, Any]:
    """Compile one tower for one size of call and add up what its kernels move."""
    start = time.perf_counter()
    sizes = (rows, tokens, CONTEXT + max(tokens, ROOM))
    with tempfile.TemporaryDirectory() as folder:
        listing = compiled(
            Path(folder),
            tower,
            *sizes,
            capability=capability,
            format_=format_,
            is_cut=FORMS[form],
            lists=lists,
        )
    traffic = traffic_of(listing)
    return {
        "form": form,
        "weights": format_ or "bf16",
        "compute_capability": capability,
        "tower": tower,
        "rows": rows,
        "tokens": tokens,
        "lists": list(lists),
        "moved_bytes": traffic.moved.total,
        "least_bytes": traffic.least,
        "ratio": round(traffic.ratio, 3),
        "scratch_bytes": listing.scratch,
        "copied_inputs": len(copies(listing)),
        "kernels": traffic.moved.kernels,
        "seconds": round(time.perf_counter() - start, 1),
        # of the largest process until now
        "peak_memory": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    }


def newest() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the newest results, by their cases."""
    path = max(RESULTS.glob("traffic-rtx-2*.json"))
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    keys = ("form", "tower", "rows", "tokens")
    return {
        (*(one[key] for key in keys), tuple(one.get("lists", ()))): {"lists": [], **one}
        for one in results
    }


def write(name: str, command: str, results: list[dict[str, Any]]) -> None:
    """Write what was measured."""
    peak = max(one["peak_memory"] for one in results)
    lines = [
        "# Bytes that compiled towers move",
        "",
        f"`{command}`, {today()}, TensorRT-RTX's compiler on 2 cores, no GPU; the released size,",
        f"caches of {CONTEXT:,} tokens and room for a call of {ROOM}, or for the longer chunk. A",
        f"compiler's process took {peak / 1e9:.2f} GB at most.",
        "",
        "| form | weights | for | tower | rows x tokens | lists of all rows | GB moved | least |"
        " ratio | scratch, MB | inputs copied | kernels | compiled in, s |",
        "|---|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {one['form']} | {one['weights']} | {one['compute_capability']} | {one['tower']} | "
            f"{one['rows']} x {one['tokens']} | {', '.join(one['lists'])} | "
            f"{one['moved_bytes'] / 1e9:.1f} | {one['least_bytes'] / 1e9:.1f} | "
            f"{one['ratio']:.2f} | {one['scratch_bytes'] / 1e6:.0f} | {one['copied_inputs']} | "
            f"{one['kernels']} | {one['seconds']:.0f} |"
            for one in results
        ),
    ]
    write_results(name, lines, {"results": results})


def main() -> None:
    command = " ".join(["python -m benchmarks.traffic", *sys.argv[1:]])
    results = []
    if sys.argv[1:] == ["quantized"]:
        for form, format_, capability in QUANTIZED:
            for tower in TOWERS:
                results.append(measure(form, tower, 1, 16, (), format_, capability))
                print(results[-1], flush=True)
        write("traffic-rtx-quantized", command, results)
        return
    is_part = sys.argv[1:] == ["plugins"]
    kept = newest() if sys.argv[1:] == ["denoiser"] else {}
    for case in cases():
        if kept and case[:2] != ("bodies", "denoiser"):
            results.append(kept[case])
        elif FORMS[case[0]] or not is_part:
            results.append(measure(*case))
            print(results[-1], flush=True)
    write("traffic-rtx-plugins" if is_part else "traffic-rtx", command, results)


if __name__ == "__main__":
    main()
