"""Long prompts on the CPU flavour: what they cost others, and what one spares the next.

    python -m benchmarks.long_prompts      # half a minute

- One request runs alone; then fifteen prompts of 3,000 tokens come at once, with the budget that
  prompts have in a turn and without one: the time between its blocks, and of a turn.
- Three prompts share 2,000 tokens: the time until each is read and its first denoise step begins,
  and until its first block, prefixes kept.

Times are CPU time of the engine's thread, which does all the work: another process on the machine
hardly changes them. The cases take turns, and the best of some repeats counts.
"""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import thread_time
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.record import machine, today, write_results
from tests.support import TWOTOWER
from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_engines.generation import turns
from twotower_engines.generation.costs import costs_of_engines
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.planning.plan import PREFILL_MS
from twotower_engines.runtime.interface import Denoised, DenoiseRow, Runtime
from twotower_engines.runtime.opening import open_runtime

LONG, COMING, SHARED = 3000, 15, 2000
BLOCKS, REPEATS, STEPS = 60, 3, 4
CASES = {"alone": (0, True), "with a budget": (COMING, True), "without a budget": (COMING, False)}


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


def gaps(runtime: Runtime, engines: EngineSet, case: str) -> dict[str, list[float]]:
    """Return times in ms: between blocks of a request, of its turns, and of others' answers."""
    coming, has_budget = CASES[case]
    budget = PREFILL_MS / 1e3 if has_budget else math.inf
    shared_cost = turns.SHARED_COST if has_budget else math.inf
    with mock.patch.object(turns, "SHARED_COST", shared_cost):
        return _gaps(runtime, engines, coming, budget)


def _gaps(
    runtime: Runtime, engines: EngineSet, coming: int, budget: float
) -> dict[str, list[float]]:
    scheduler = Scheduler(runtime, costs=costs_of_engines(engines), prefill_seconds=budget)
    running = Request("r", prompt(1, 20), max_new_tokens=16 * BLOCKS, ignore_eos=True)
    scheduler.submit(running)
    blocks: list[float] = []
    durations: list[float] = []
    answers: list[float] = []
    while not scheduler.idle:
        start = thread_time()
        for event in scheduler.turn():
            if event.request_id == "r":
                blocks.append(thread_time())
                if len(blocks) == 5:
                    for number in range(coming):
                        one = Request(str(number), prompt(number, LONG), max_new_tokens=16)
                        scheduler.submit(one)
            elif event.is_last:
                answers.append(thread_time() - blocks[4])
        if 5 <= len(blocks) < BLOCKS:
            durations.append(thread_time() - start)
    between = [after - before for before, after in itertools.pairwise(blocks[4:])]
    times = {"block": between, "turn": durations, "answer": answers}
    return {kind: [1e3 * one for one in some] for kind, some in times.items() if some}


def shown(values: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile and largest."""
    quantiles = np.percentile(values, [50, 95, 100])
    return dict(zip(("median", "p95", "longest"), map(float, quantiles), strict=True))


class TimedRuntime:
    """A runtime that knows when its first denoise step began."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.first_step = math.inf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Denoised]:
        """Refine a block, and note the time if it is the first."""
        self.first_step = min(self.first_step, thread_time())
        return self._runtime.denoise(rows)


def first_blocks(runtime: Runtime, engines: EngineSet) -> list[dict[str, Any]]:
    """Return the times to the first step and block of three prompts with a shared beginning."""
    timed = TimedRuntime(runtime)
    scheduler = Scheduler(timed, slots=1, costs=costs_of_engines(engines), prefix_bytes=256 * 2**20)
    times = []
    for number in range(3):
        ids = (*prompt(0, SHARED), *prompt(number + 1, 10))
        timed.first_step, start = math.inf, thread_time()
        scheduler.submit(Request("r", ids, max_new_tokens=16, steps=STEPS, ignore_eos=True))
        events = []
        while not scheduler.idle:
            events += scheduler.turn()
        step, block = timed.first_step - start, thread_time() - start
        reused = events[-1].reused_tokens
        times.append(
            {"step_ms": 1e3 * step, "block_ms": 1e3 * block, "reused": reused, "tokens": len(ids)}
        )
    return times


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        engines = build(Path(name))
        runtime = open_runtime(engines, threads=1)
        repeats = []
        for _ in range(REPEATS):
            repeats.append({case: gaps(runtime, engines, case) for case in CASES})
        found = {
            case: {
                kind: min((shown(one[case][kind]) for one in repeats), key=lambda one: one["p95"])
                for kind in repeats[0][case]
            }
            for case in CASES
        }
        several = [first_blocks(runtime, engines) for _ in range(REPEATS)]
        runtime.close()
    blocks = [min(same, key=lambda one: one["block_ms"]) for same in zip(*several, strict=True)]
    cold, warm = blocks[0], blocks[1]
    lines = [
        "# Long prompts on the CPU flavour",
        "",
        f"`python -m benchmarks.long_prompts`, {today()}, {machine()}; the shipped checkpoint, CPU",
        f"time of the engine's one thread, best of {REPEATS}.",
        "",
        "Time between two blocks of one request, alone and while others come at once:",
        f"{COMING} prompts of {LONG:,} tokens. Beside it the time of a turn, in which every row",
        "gets one denoise step, and the time until the others are answered.",
        "",
        "| | block: median, ms | 95th | longest | turn: median, ms | 95th | longest | "
        "others' answers: median, ms | 95th | longest |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {case} | "
            + " | ".join(
                f"{one[kind][figure]:.0f}" if kind in one else "-"
                for kind in ("block", "turn", "answer")
                for figure in ("median", "p95", "longest")
            )
            + " |"
            for case, one in found.items()
        ),
        "",
        f"Time of prompts that share {SHARED:,} tokens, until all is read and the first denoise",
        f"step begins, and until the first block, {STEPS} steps later.",
        "",
        "| prompt | tokens reused | first step, ms | first block, ms |",
        "|---|---:|---:|---:|",
        *(
            f"| {number} | {one['reused']:,} of {one['tokens']:,} | {one['step_ms']:.1f} | "
            f"{one['block_ms']:.1f} |"
            for number, one in enumerate(blocks, 1)
        ),
        "",
        f"The second prompt's steps begin {cold['step_ms'] / warm['step_ms']:.0f} times sooner",
        "than the first's,",
        f"its first block comes {cold['block_ms'] / warm['block_ms']:.1f} times sooner.",
    ]
    print("\n".join(lines))
    content = {"machine": machine(), "gaps_ms": found, "first_blocks": blocks}
    write_results("long-prompts-cpu", lines, content)


if __name__ == "__main__":
    main()
