"""The verb `twotower quantize`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.errors import TwoTowerError, printable
from twotower_contract.tables import aligned
from twotower_export.progress import StepMeter

if TYPE_CHECKING:
    from twotower_export.checkpoint import Checkpoint
    from twotower_export.quantization.recipe import Recipe

EPILOG = """\b
Examples:
  twotower quantize checkpoint checkpoint-fp8 --format fp8
  twotower quantize checkpoint checkpoint-nvfp4 --format nvfp4 --keep mamba,shared-experts
  twotower quantize checkpoint checkpoint-mixed --recipe recipe.json
  twotower quantize checkpoint out --format int4 --dry-run

A run that was ended goes on where it was when the same command is given again.
"""


@click.command(epilog=EPILOG)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice(["fp8", "nvfp4", "int4"]),
    help="Format of the experts and of the Mamba projections.",
)
@click.option(
    "--keep",
    metavar="PARTS",
    default="",
    show_default=False,
    help="More parts that stay as they are, with commas: mamba, shared-experts, routed-experts. "
    "Attention, the Mamba layer before it, and heads always do.",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="A file of rules in place of --format and --keep; see docs/quantize.md.",
)
@click.option(
    "--tower", type=click.Choice(["context", "denoiser"]), help="Quantize this tower only.  [both]"
)
@click.option(
    "--scales",
    type=click.Choice(["search", "amax"]),
    default="search",
    help="`search` tries a few scales and takes the one with the least squared error; `amax` makes "
    "the largest weight the largest code, as ModelOpt does.",
)
@click.option(
    "--group-size",
    type=click.Choice(["16", "32", "64", "128"]),
    help="Weights that share a scale in int4; fewer are more exact and take more bytes.  "
    "[the most that divide all rows: 64 at the released sizes]",
)
@click.option("--revision", help="Commit, tag or branch on the hub.  [main, with a warning]")
@click.option("--force", is_flag=True, help="Replace OUT whatever it holds.")
@click.option("--dry-run", is_flag=True, help="Check everything, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def quantize(
    checkpoint: str,
    out: Path,
    format_: str | None,
    keep: str,
    recipe_file: Path | None,
    tower: str | None,
    scales: str,
    group_size: str | None,
    revision: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT with FP8, NVFP4 or INT4 weights to the folder OUT.

    FP8 and NVFP4 are laid out as NVIDIA's ModelOpt does, INT4 as compressed-tensors does. Only
    weights are quantized, and no calibration data is needed.
    """
    from twotower_contract.atomic import Writing
    from twotower_export.checkpoint import open_checkpoint
    from twotower_export.quantization.recipe import default_recipe, read_recipe
    from twotower_export.quantization.writing import quantize_checkpoint

    _check_options(format_, keep, recipe_file, tower)
    start = time.monotonic()
    meter = StepMeter()
    opened = open_checkpoint(checkpoint, revision=revision, progress=meter)
    for warning in opened.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    recipe: Recipe
    group = int(group_size) if group_size else None
    if recipe_file is not None:
        recipe = read_recipe(opened, recipe_file, scales, group)  # type: ignore[arg-type]  # click's
    else:
        parts = [part for part in keep.split(",") if part]
        towers = (tower,) if tower else ()
        recipe = default_recipe(opened, format_, parts, towers, scales, group)  # type: ignore[arg-type]
    try:
        report = quantize_checkpoint(opened, out, recipe, meter, Writing(force, dry_run))
    except KeyboardInterrupt:
        print(
            "the shards that are complete are kept: give the same command again to go on",
            file=sys.stderr,
        )
        raise
    meter.finish()
    seconds = time.monotonic() - start
    report |= {"path": str(out), "seconds": round(seconds, 2)}
    report["megabytes_per_second"] = round(report["bytes_before"] / 1e6 / seconds, 1)
    click.echo(json.dumps(report) if as_json else _text(report, opened))


def _check_options(
    format_: str | None, keep: str, recipe_file: Path | None, tower: str | None
) -> None:
    if format_ is None and recipe_file is None:
        raise TwoTowerError("there is no format; give --format fp8, nvfp4 or int4, or --recipe")
    given = {"--format": format_, "--keep": keep, "--tower": tower}
    for option, value in given.items():
        if recipe_file is not None and value:
            raise TwoTowerError(f"--recipe says what {option} would: leave one of them out")


def _text(report: dict[str, Any], opened: Checkpoint) -> str:
    unit, size = ("GB", 1e9) if report["bytes_before"] >= 1e9 else ("MB", 1e6)
    rows = [["part", "format", "matrices", f"{unit} before", "after", "error"]]
    for part in report["parts"]:
        rows.append(
            [
                *(f"{part['tower']}: {part['part']}", part["format"], str(part["matrices"])),
                *(f"{part[key] / size:.3f}" for key in ("bytes_before", "bytes_after")),
                f"{part['relative_rms']:.2%}",
            ]
        )
    lines = aligned(rows, left=(0, 1))
    worst = max(report["parts"], key=lambda part: part["worst_relative_rms"])
    lines.append(
        f"error: root mean square relative to the weights'; worst {worst['worst']}, "
        f"{worst['worst_relative_rms']:.2%}"
    )
    path = report["path"]
    lines.append(
        f"{path}: {opened.id or opened.path} in {report['bytes_after'] / size:.3f} {unit} of "
        f"{report['bytes_before'] / size:.3f}, {report['seconds']} s "
        f"({report['megabytes_per_second']} MB/s)"
    )
    lines.append(f"next: twotower export {shlex.quote(path)} BUNDLE")
    return "\n".join(lines)
