"""Options that several verbs of the engines have, each declared once."""

from __future__ import annotations

from pathlib import Path

import click

from twotower_contract.command_line import together
from twotower_contract.engine_set import MAX_BLOCK
from twotower_engines.planning.plan import BLOCK_SIZE_MAX, PREFILL_MS
from twotower_engines.planning.precisions import PRECISIONS
from twotower_engines.planning.sku_file import FLAVOURS
from twotower_engines.planning.sku_lookup import complete_skus


def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete `--sku` in the shell."""
    return complete_skus(incomplete)


opening_options = together(
    click.option("--sku", help="SKU of the engines, where ENGINES holds several."),
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        help="Where the checkpoint is now, if it was moved after the export.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [one per core]"),
)
"""Adds what a verb that opens engines asks for."""

prefill_option = click.option(
    "--prefill-ms",
    type=click.FloatRange(min=0),
    default=PREFILL_MS,
    help="Time that prompts may take from running rows in a turn. One chunk of a prompt always "
    "goes, whatever it takes; `build --chunk` makes it shorter.",
)

limit_options = together(
    click.option("--slots", default=16, help="Requests in flight."),
    click.option(
        "--context",
        type=int,
        help="Most tokens of a request, prompt and answer together.  "
        "[default: 8192, or the model's]",
    ),
    click.option(
        "--precision",
        default="auto",
        type=click.Choice(["auto", *PRECISIONS]),
        help="Precision of the weights, which `twotower quantize` makes narrower. `auto`: that of "
        "a bundle, else the widest that fits.",
    ),
    click.option(
        "--chunk",
        type=click.IntRange(min=16),
        help="Tokens of a prompt that one call reads; 256 where prompts share their beginnings.  "
        "[default: the most that fits]",
    ),
)
"""Adds what a plan is made for."""

engine_options = together(
    click.option(
        "--flavour",
        type=click.Choice(["auto", *FLAVOURS]),
        default="auto",
        help="Library that builds and runs the engines. `auto`: the SKU's default; `plan` shows "
        "the others beside it, and `build` takes tensorrt on an RTX card itself where it and the "
        "extra [kernels] are installed.",
    ),
    click.option(
        "--gpus",
        type=click.IntRange(1, 2),
        help="GPUs to use: 1 holds both towers, 2 hold one each.  [default: the fewest that fit]",
    ),
    click.option(
        "--block-size-max",
        type=click.IntRange(1, MAX_BLOCK),
        default=BLOCK_SIZE_MAX,
        help="Tokens of the largest block.",
    ),
    click.option(
        "--prefix-mib",
        type=click.IntRange(min=0),
        default=0,
        help="MiB to leave for the states of prompts' beginnings, as `package --prefix-mib` takes.",
    ),
)
"""Adds the rest of what engines are built for."""
