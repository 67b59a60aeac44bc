"""The verb `twotower plan`: the GPUs that a model fits on, and how fast it can be."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from twotower_engines.cli.options import complete, engine_options, limit_options
from twotower_engines.errors import PlanError
from twotower_engines.planning.model_size import RELEASED, read_model_size
from twotower_engines.planning.plan import PlanRequest
from twotower_engines.planning.plan_report import plan_report, with_faster_flavours
from twotower_engines.planning.plan_text import text_of_many, text_of_one
from twotower_engines.planning.sku_lookup import resolve_skus

DEFAULT_CONTEXT = 8192


@click.command(
    epilog="""\b
Examples:
  twotower plan --sku all
  twotower plan CHECKPOINT --sku h200 --slots 32 --context 32768
  twotower plan BUNDLE --sku h100-sxm --gpus 2 --json
  twotower plan CHECKPOINT --sku all,my-gpu.toml
"""
)
@click.argument("checkpoint", type=click.Path(path_type=Path), default=RELEASED)
@click.option(
    "--sku",
    "skus",
    required=True,
    metavar="NAME[,NAME...]",
    shell_complete=complete,
    help="SKUs to plan for: names from the table, `all`, `local` (this machine's GPU), or the path "
    "of a SKU file (.toml, .json).",
)
@limit_options
@engine_options
@click.option(
    "--threshold",
    default=0.9,
    help="Confidence threshold for the estimate of tokens per second (measured: 0.5 to 0.95).",
)
@click.option("--json", "as_json", is_flag=True, help="Print all numbers for programs.")
def plan(
    checkpoint: Path,
    skus: str,
    context: int | None,
    flavour: str,
    chunk: int | None,
    prefix_mib: int,
    threshold: float,
    as_json: bool,
    **limits: Any,
) -> None:
    """Show whether a model fits on a GPU, and how fast it can be.

    CHECKPOINT is a checkpoint folder, its config.json, a bundle or engines: only sizes are read, no
    weights. Without one it is the released model. The plan counts weights, states, buffers and
    workspace per GPU, bounds the time of each call, and lists its assumptions.

    A plan that does not fit, or only in a precision that cannot be built yet, is refused with the
    nearest plans that can be built, and exit code 2. With several SKUs each has a line, and the
    exit code is 0.
    """
    model = read_model_size(checkpoint)
    if context is None:
        context = min(DEFAULT_CONTEXT, model.config.max_position_embeddings)
    chosen = resolve_skus(skus)
    several = len(chosen) > 1
    reports = []
    others = []
    problems = []
    for sku in chosen:
        try:
            request = PlanRequest(
                sku,
                context=context,
                flavour=None if flavour == "auto" else flavour,
                max_tokens_per_call=chunk,
                prefix_bytes=prefix_mib << 20,
                **limits,
            )
            reports.append(plan_report(model, request, threshold))
            others += [
                plan_report(model, replace(request, flavour=other), threshold)
                for other in (sku.flavours if flavour == "auto" else ())
                if other != reports[-1].plan.flavour
            ]
        except PlanError as problem:
            if not several:
                raise
            problems.append(f"{sku.name}: {problem}")
    if not reports:
        raise PlanError("; ".join(problems))
    if as_json:
        values = {
            "model": model.as_json(),
            "slots": limits["slots"],
            "context": context,
            "plans": [report.as_json() for report in reports],
            "other_flavours": [report.as_json() for report in others],
            "impossible": problems,
        }
        click.echo(json.dumps(values, indent=2))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        if several:
            click.echo(text_of_many(with_faster_flavours(reports, others), width))
        else:
            click.echo(text_of_one(reports[0], others, width))
        for text in problems:
            click.echo(f"  {text}")
    if not several and reports[0].refused is not None:
        raise PlanError(reports[0].refused)
