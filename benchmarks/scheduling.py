"""The scheduler's choices on a simulated H200: shared calls, budget, chunks, slots and prefixes.

    python -m benchmarks.scheduling        # half a minute, no GPU

The simulator's times are the planner's, so these are comparisons, not measurements. Prompts have
300 tokens, answers 256, both by half up or down; steps per block as measured on arithmetic at
threshold 0.8. Callers send their next request when one is answered.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import today, write_results
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.planning.model_size import RELEASED, ModelSize, read_model_size
from twotower_engines.planning.plan import PlanRequest, plan_memory
from twotower_engines.planning.sku_lookup import find_sku
from twotower_engines.simulation.engines import runtime_of_plan
from twotower_engines.simulation.simulate import Outcome, simulate
from twotower_engines.simulation.workload import Arrival, Kind, at_concurrency, at_rate

TASK, CONTEXT = "arithmetic", 6144
KIND = Kind(prompt=300, shared=0, new=256, threshold=0.8)
GIB = 2**30
OTHERS = "interactive other"


def run(
    model: ModelSize,
    arrivals: list[Arrival],
    slots: int = 16,
    chunk: int | None = None,
    sku: str = "h200",
    **options: Any,
) -> Outcome:
    """Simulate one load on a GPU, in the widest precision that fits."""
    request = PlanRequest(find_sku(sku), slots=slots, context=CONTEXT, max_tokens_per_call=chunk)
    runtime = runtime_of_plan(plan_memory(model, request), TASK)
    scheduler = Scheduler(runtime, costs=runtime.costs, clock=runtime.clock, **options)
    return simulate(runtime, scheduler, arrivals)


def mixed(priority: str, tenant: str) -> list[Arrival]:
    """Return 64 callers who always ask, and requests of others at random beside them."""
    many = [
        replace(one, request=replace(one.request, priority=priority, tenant=tenant))
        for one in at_concurrency(KIND, 300, 64)
    ]
    others = at_rate(replace(KIND, seed=1), 60, 1.0)
    return [
        *many,
        *(replace(one, request=replace(one.request, request_id=f"other {n}", tenant="other"))
          for n, one in enumerate(others)),
    ]  # fmt: skip


def cases(model: ModelSize) -> Iterator[tuple[str, str, Outcome]]:
    """Yield the question, the setting, and what came of it."""
    for slots in (1, 4, 16, 32, 64):
        for shared in (False, True):
            found = run(model, at_concurrency(KIND, 10 * slots, slots), slots, groups_calls=shared)
            yield "calls", f"{slots} rows, {'shared' if shared else 'at once'}", found
    long = replace(KIND, prompt=3000)
    for budget in (0.0, 0.015, 0.03, 0.06, 0.12):
        found = run(model, at_rate(long, 100, 3.0), prefill_seconds=budget)
        yield "budget", f"{1e3 * budget:g} ms", found
    for chunk in (64, 128, 256, 512, 1024):
        yield "chunk", f"{chunk} tokens", run(model, at_rate(long, 100, 2.0), chunk=chunk)
    for sku, rate in (("a100-80", 1.0), ("rtx-5090", 1.0), ("dgx-spark", 0.2)):
        for chunk in (1024, 64):
            found = run(model, at_rate(long, 60, rate), chunk=chunk, sku=sku)
            yield "chunk on slower GPUs", f"{sku}, {rate:g}/s, {chunk} tokens", found
    for slots in (8, 16, 32, 64):
        yield "slots", f"{slots} slots", run(model, at_concurrency(KIND, 300, 64), slots)
    for name, priority, tenant in (
        ("all alike", "interactive", "other"),
        ("the 64 are batch", "batch", "other"),
        ("callers have names", "interactive", "many"),
    ):
        yield "first block of 60 others", name, run(model, mixed(priority, tenant))
    beginning = replace(KIND, shared=2000)
    for memory, size in ((0, 1024), (4, 1024), (0, 256), (1, 256), (4, 256)):
        found = run(model, at_rate(beginning, 100, 3.0), chunk=size, prefix_bytes=memory * GIB)
        yield "prefixes", f"{memory} GiB, chunks of {size}", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", default=RELEASED, help="[released sizes]"
    )
    model = read_model_size(parser.parse_args().checkpoint)
    results, lines = [], [
        "# The scheduler's choices, simulated",
        "",
        f"`python -m benchmarks.scheduling`, {today()}: an H200 in bf16 or the GPU named,",
        "released size, by the planner's times. Comparisons, not measurements; times at the 50th",
        "and 95th percentile.",
    ]  # fmt: skip
    for question, setting, one in cases(model):
        if not results or results[-1]["question"] != question:
            lines += [
                "",
                f"| {question} | tokens/s | first block, s | between blocks, ms | denoiser calls | "
                "context calls | waiting for prompts |",
                "|---|---:|---:|---:|---:|---:|---:|",
            ]
        first = one.first_block_of.get(OTHERS, one.first_block)
        gap = one.block_gap
        waits = one.row_share["waiting for others' prompts"]
        cells = (
            setting,
            f"{one.tokens_per_second:,.0f}",
            f"{first[50]:.2f}, {first[95]:.2f}",
            f"{1e3 * gap[50]:.0f}, {1e3 * gap[95]:.0f}",
            f"{one.counters.denoiser_calls:,}",
            f"{one.counters.context_calls:,}",
            f"{waits:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        results.append({"question": question, "setting": setting, **one.as_json()})
    write_results("scheduling-simulated", lines, {"results": results})


if __name__ == "__main__":
    main()
