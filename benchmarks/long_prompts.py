"""Long prompts on the CPU flavour: what they cost others, and what one spares the next.

    python -m benchmarks.long_prompts      # a minute; exports and builds the shipped checkpoint

- One request runs alone; then fifteen prompts of 3,000 tokens come at once, with the budget that
  prompts have in a turn and without one.
- Three prompts share 2,000 tokens: the time to the first block of each, prefixes kept.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import today, write_results
from tests.support import TWOTOWER
from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_engines.generation.costs import costs_of_engines
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import PREFILL_SECONDS, Scheduler
from twotower_engines.runtime.interface import Runtime
from twotower_engines.runtime.opening import open_runtime

LONG, COMING, SHARED = 3000, 15, 2000
BLOCKS = 60


def build(folder: Path) -> EngineSet:
    """Export and build the shipped checkpoint with the verbs that a user would call."""
    for verb in (
        ["tiny", "checkpoint", "--pretrained"],
        ["export", "checkpoint", "bundle"],
        ["build", "bundle", "--sku", "cpu", "engines", "--slots", "16", "--context", "4096"],
    ):
        subprocess.run([*TWOTOWER, *verb], check=True, capture_output=True, cwd=folder)
    return open_engine_set(folder / "engines")


def prompt(seed: int, tokens: int) -> tuple[int, ...]:
    """Return random tokens."""
    return tuple(random.Random(seed).choices(range(10, 600), k=tokens))


def gaps(runtime: Runtime, engines: EngineSet, coming: int, budget: float) -> dict[str, float]:
    """Return the time between blocks of a request that others join after its first ones, in ms."""
    scheduler = Scheduler(runtime, costs=costs_of_engines(engines), prefill_seconds=budget)
    running = Request("r", prompt(1, 20), max_new_tokens=16 * BLOCKS, ignore_eos=True)
    scheduler.submit(running)
    times: list[float] = []
    while not scheduler.idle:
        for event in scheduler.turn():
            if event.request_id == "r":
                times.append(time.perf_counter())
                if len(times) == 5:
                    for number in range(coming):
                        one = Request(str(number), prompt(number, LONG), max_new_tokens=16)
                        scheduler.submit(one)
    between = 1e3 * np.array([after - before for before, after in itertools.pairwise(times[4:])])
    return {"median": float(np.median(between)), "p95": float(np.percentile(between, 95)),
            "longest": float(between.max())}  # fmt: skip


def first_blocks(runtime: Runtime, engines: EngineSet) -> list[dict[str, Any]]:
    """Return the time to the first block of three prompts with a shared beginning, in ms."""
    scheduler = Scheduler(
        runtime, slots=1, costs=costs_of_engines(engines), prefix_bytes=256 * 2**20
    )
    found = []
    for number in range(3):
        ids = (*prompt(0, SHARED), *prompt(number + 1, 10))
        start = time.perf_counter()
        scheduler.submit(Request("r", ids, max_new_tokens=16, steps=4, ignore_eos=True))
        events = []
        while not scheduler.idle:
            events += scheduler.turn()
        seconds = time.perf_counter() - start
        reused = events[-1].reused_tokens
        found.append({"ms": 1e3 * seconds, "reused": reused, "tokens": len(ids)})
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        engines = build(Path(name))
        runtime = open_runtime(engines)
        found = {
            "alone": gaps(runtime, engines, 0, PREFILL_SECONDS),
            "with a budget": gaps(runtime, engines, COMING, PREFILL_SECONDS),
            "without a budget": gaps(runtime, engines, COMING, math.inf),
        }
        blocks = first_blocks(runtime, engines)
        runtime.close()
    load = os.getloadavg()[0]
    where = f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}"
    lines = [
        "# Long prompts on the CPU flavour",
        "",
        f"`python -m benchmarks.long_prompts`, {today()}, {where}; the shipped checkpoint.",
        "",
        "Time between two blocks of one request, alone and while others come at once:",
        f"{COMING} prompts of {LONG:,} tokens.",
        "",
        "| | median, ms | 95th, ms | longest, ms |",
        "|---|---:|---:|---:|",
        *(
            f"| {case} | {one['median']:.0f} | {one['p95']:.0f} | {one['longest']:.0f} |"
            for case, one in found.items()
        ),
        "",
        f"Time to the first block of prompts that share {SHARED:,} tokens.",
        "",
        "| prompt | tokens reused | ms |",
        "|---|---:|---:|",
        *(
            f"| {number} | {one['reused']:,} of {one['tokens']:,} | {one['ms']:.0f} |"
            for number, one in enumerate(blocks, 1)
        ),
    ]
    print("\n".join(lines))
    content = {"machine": where, "gaps_ms": found, "first_blocks": blocks}
    write_results("long-prompts-cpu", lines, content)


if __name__ == "__main__":
    main()
