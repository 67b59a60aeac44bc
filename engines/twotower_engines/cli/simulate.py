"""The verb `twotower simulate`: what a server of some GPU does under some load."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from twotower_contract.progress import StatusLine
from twotower_engines.cli.options import complete, limit_options, prefill_option
from twotower_engines.cli.plan import DEFAULT_CONTEXT
from twotower_engines.errors import PlanError
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.planning.acceptance import load_acceptance
from twotower_engines.planning.model_size import RELEASED, read_model_size
from twotower_engines.planning.plan import PlanRequest, plan_memory
from twotower_engines.planning.sku_lookup import resolve_skus
from twotower_engines.simulation.engines import SimulatedRuntime, runtime_of_plan
from twotower_engines.simulation.report import chart, passes, table
from twotower_engines.simulation.simulate import Outcome
from twotower_engines.simulation.simulate import simulate as run_simulation
from twotower_engines.simulation.workload import Arrival, Kind, at_concurrency, at_rate, read_trace


@click.command(
    epilog="""\b
Examples:
  twotower simulate --sku h200 --precision fp8 --rate 4
  twotower simulate BUNDLE --sku h200 --slots 64 --concurrency 1,16,64
  twotower simulate CHECKPOINT --sku rtx-pro-6000 --trace requests.jsonl --json
  twotower simulate CHECKPOINT --sku h200 --rate 8 --shared-prompt 2000 --prefix-cache 4

A line of a trace is a JSON object: {"at": 0.5, "prompt_tokens": 300, "max_new_tokens": 64}.
"""
)
@click.argument("checkpoint", type=click.Path(path_type=Path), default=RELEASED)
@click.option("--sku", required=True, shell_complete=complete, help="The GPU, as for `plan`.")
@click.option(
    "--rate", metavar="N[,N...]", help="Requests a second, at random; several with commas."
)
@click.option(
    "--concurrency",
    metavar="N[,N...]",
    help="Callers who each wait for an answer; several with commas.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of requests and their times, one JSON object a line.",
)
@click.option("--requests", default=300, help="Requests to answer.")
@click.option("--prompt-tokens", default=300, help="Tokens of a prompt, mean.")
@click.option("--shared-prompt", default=0, help="Tokens that all prompts begin with besides.")
@click.option("--new-tokens", default=256, help="Tokens of an answer, mean.")
@click.option("--threshold", default=0.8, help="Confidence threshold.")
@click.option(
    "--task",
    type=click.Choice(load_acceptance().tasks),
    default="open",
    help="Task whose measured steps per block are taken.",
)
@limit_options
@click.option(
    "--prefix-cache",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=False,
    help="GiB for prefixes of prompts.  [default: none]",
)
@prefill_option
@click.option(
    "--calls",
    type=click.Choice(["grouped", "at-once"]),
    default="grouped",
    help="Whether rows wait for each other's context calls where that pays.",
)
@click.option("--seed", default=0, help="Seed of all that is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print all numbers for programs.")
def simulate(
    checkpoint: Path,
    sku: str,
    rate: str | None,
    concurrency: str | None,
    trace: Path | None,
    requests: int,
    prompt_tokens: int,
    shared_prompt: int,
    new_tokens: int,
    threshold: float,
    task: str,
    slots: int,
    context: int | None,
    precision: str,
    chunk: int | None,
    prefix_cache: float,
    prefill_ms: float,
    calls: str,
    seed: int,
    as_json: bool,
) -> None:
    """Simulate a server: the real scheduler on engines that only take time.

    CHECKPOINT is a checkpoint folder, its config.json, a bundle or engines; without one it is the
    released model. The times are the
    planner's, the steps of a block are drawn as they were measured. Give one of --rate,
    --concurrency and --trace.
    """
    kind = Kind(prompt_tokens, shared_prompt, new_tokens, threshold, seed)
    loads = _loads(kind, requests, rate, concurrency, trace)
    model = read_model_size(checkpoint)
    (chosen, *others) = resolve_skus(sku)
    if others:
        raise PlanError(f"--sku is {sku!r}; simulate one GPU at a time")
    room = min(context or DEFAULT_CONTEXT, model.config.max_position_embeddings)
    kept = int(prefix_cache * 2**30)
    request = PlanRequest(
        chosen,
        slots=slots,
        context=room,
        precision=precision,
        max_tokens_per_call=chunk,
        prefix_bytes=kept,
    )
    plan = plan_memory(model, request)
    if not plan.fits:
        named = "" if checkpoint == RELEASED else f"{checkpoint} "
        beside = f"--slots {slots} --context {room} --prefix-mib {kept >> 20}"
        raise PlanError(f"this does not fit; `twotower plan {named}--sku {sku} {beside}` says why")
    outcomes = []
    for name, arrivals in loads:
        runtime = runtime_of_plan(plan, task)
        scheduler = Scheduler(
            runtime,
            costs=runtime.costs,
            prefill_seconds=prefill_ms / 1e3,
            groups_calls=calls == "grouped",
            prefix_bytes=kept,
            clock=runtime.clock,
        )
        outcomes.append((name, _with_progress(name, runtime, scheduler, arrivals)))
    settings = {"sku": chosen.name, "precision": plan.precision, "slots": slots, "context": room}
    if as_json:
        loads_json = [{"load": name, **one.as_json()} for name, one in outcomes]
        click.echo(json.dumps({**settings, "kind": asdict(kind), "loads": loads_json}, indent=2))
        return
    click.echo(
        f"{chosen.title}, {plan.precision}, {slots} slots x {room} tokens; {task}, threshold "
        f"{threshold:g}, prompts of {prompt_tokens + shared_prompt}, answers of {new_tokens}\n"
    )
    for text in (table(outcomes), chart(outcomes), passes(outcomes)):
        click.echo(f"{text}\n")
    click.echo("a floor for the times, not a measurement: `twotower plan` lists the assumptions")


def _loads(
    kind: Kind, count: int, rate: str | None, concurrency: str | None, trace: Path | None
) -> list[tuple[str, list[Arrival]]]:
    """Return the name and the requests of each load."""
    if sum(one is not None for one in (rate, concurrency, trace)) != 1:
        raise PlanError("give one of --rate, --concurrency and --trace")
    if min(count, kind.prompt, kind.new) < 1 or kind.shared < 0:
        raise PlanError("--requests, --prompt-tokens and --new-tokens are at least 1")
    if trace is not None:
        return [(trace.name, read_trace(trace, kind))]
    if rate is not None:
        return [(f"{one:g}/s", at_rate(kind, count, one)) for one in _numbers("--rate", rate)]
    return [
        (f"{one:g} callers", at_concurrency(kind, max(count, int(one)), int(one)))
        for one in _numbers("--concurrency", concurrency or "")
    ]


def _numbers(name: str, text: str) -> list[float]:
    try:
        numbers = [float(one) for one in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < one < 1e6 for one in numbers):
        raise PlanError(f"{name} is {text!r}; give numbers above 0 with commas, as 1,16,64")
    return numbers


def _with_progress(
    name: str, runtime: SimulatedRuntime, scheduler: Scheduler, arrivals: list[Arrival]
) -> Outcome:
    line = StatusLine(log_seconds=30)

    def show(done: int, total: int) -> None:
        if line.is_due():
            line.draw(f"{name}: {done} of {total} requests")

    try:
        return run_simulation(runtime, scheduler, arrivals, show)
    finally:
        line.clear()
