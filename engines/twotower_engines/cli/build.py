"""The verb `twotower build`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.atomic import Writing
from twotower_contract.errors import DryRunEndsError, TwoTowerError
from twotower_engines.planning.skus import FLAVOURS

if TYPE_CHECKING:
    from twotower_engines.building.build import BuildOptions

EPILOG = """\b
Examples:
  twotower build bundle --sku cpu engines
  twotower build bundle --sku h200 engines --slots 32 --context 16384
  twotower build bundle --sku l40s,rtx-pro-6000 engines --flavour tensorrt-rtx
  twotower build bundle --sku all engines --json

The build is refused if it does not fit in memory; `twotower plan` shows what fits. Engines for
data-centre GPUs (flavour tensorrt) are built on the GPU, engines for RTX GPUs (flavour
tensorrt-rtx) on any machine. Engine files are kept in $XDG_CACHE_HOME/twotower/builds, so that
building the same again takes no time. With several SKUs, every one that can be built is built, and
the exit code is 1 if any could not be.
"""


class PartlyBuiltError(TwoTowerError):
    """Engines of some SKUs were built, of others not."""

    exit_code = 1


def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete `--sku` in the shell."""
    from twotower_engines.planning.sku_lookup import complete_skus

    return complete_skus(incomplete)


@click.command(epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("engines", type=click.Path(path_type=Path))
@click.option(
    "--sku",
    "skus",
    metavar="NAME[,NAME...]|all",
    shell_complete=complete,
    help="SKUs to build for: names from `twotower plan --sku all`, `local`, or SKU files.  "
    "[default: this machine's GPU]",
)
@click.option(
    "--flavour",
    type=click.Choice(["auto", *FLAVOURS]),
    default="auto",
    show_default=True,
    help="Library that builds and runs them. `auto`: the SKU's default; on an RTX card itself "
    "tensorrt, where it and the extra [kernels] are installed.",
)
@click.option(
    "--slots", type=click.IntRange(min=1), default=16, show_default=True, help="Requests in flight."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Most tokens of a request, prompt and answer together.  [default: 8192, or the model's]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bf16", "fp8", "nvfp4", "int4"]),
    default="auto",
    show_default=True,
    help="Precision of the weights: that of the bundle, which `twotower quantize` makes narrower.",
)
@click.option(
    "--gpus",
    type=click.IntRange(1, 2),
    help="GPUs to use: 1 holds both towers, 2 hold one each.  [default: the fewest that fit]",
)
@click.option(
    "--block-size-max",
    type=click.IntRange(1, 256),
    default=64,
    show_default=True,
    help="Tokens of the largest block.",
)
@click.option(
    "--chunk",
    type=click.IntRange(min=16),
    help="Tokens of a prompt that one call reads; 256 where prompts share their beginnings.  "
    "[default: as the plan has room for]",
)
@click.option(
    "--prefix-mib",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="MiB to leave for the states of prompts' beginnings, as `package --prefix-mib` takes.",
)
@click.option(
    "--same-capability",
    is_flag=True,
    help="Let one engine serve every GPU of the SKU's compute capability, and be built on any of "
    "them (flavour tensorrt). It may be slower than one that is tuned for its GPU alone.",
)
@click.option("--force", is_flag=True, help="Build again, even where engines exist or are cached.")
@click.option("--dry-run", is_flag=True, help="Check everything, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(
    bundle: Path,
    engines: Path,
    skus: str | None,
    flavour: str,
    slots: int,
    context: int | None,
    precision: str,
    gpus: int | None,
    block_size_max: int,
    chunk: int | None,
    prefix_mib: int,
    same_capability: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build a bundle's engines for one or more SKUs, into ENGINES/<sku>."""
    from twotower_engines.building.build import BuildOptions
    from twotower_engines.planning.sku_lookup import default_skus, resolve_skus

    # a misspelt one is refused before the first is built
    chosen = resolve_skus(default_skus() if skus is None else skus)
    results = []
    for sku in chosen:
        options = BuildOptions(
            sku,
            slots,
            context,
            flavour,
            precision,
            gpus,
            block_size_max,
            same_capability,
            chunk,
            prefix_mib << 20,
        )
        try:
            results.append(_build_one(bundle, engines, options, Writing(force, dry_run)))
        except DryRunEndsError as told:
            results.append({"sku": sku.name, "dry_run": str(told)})
        except TwoTowerError as problem:
            if len(chosen) == 1:
                raise
            results.append({"sku": sku.name, "error": str(problem)})
        if not as_json:
            print(_line(results[-1]), flush=True)
    if as_json:
        print(json.dumps({"engine_sets": results}, indent=2))
    failed = [result["sku"] for result in results if "error" in result]
    if failed:
        raise PartlyBuiltError(
            f"not built: {', '.join(failed)} ({len(failed)} of {len(chosen)}); "
            "the reasons are above"
        )


def _build_one(
    bundle: Path, engines: Path, options: BuildOptions, writing: Writing
) -> dict[str, Any]:
    from twotower_engines.building.build import build_engines
    from twotower_engines.building.progress import BuildProgress

    progress = BuildProgress(options.sku.name)
    start = time.monotonic()
    try:
        made, is_new = build_engines(bundle, engines, options, progress, writing)
    finally:
        progress.close()
    record = made.build
    return {
        "sku": record.sku,
        "engines": str(made.folder),
        "built": is_new,
        "flavour": record.flavour,
        "precision": record.precision,
        "compute_capability": record.compute_capability,
        "gpus": record.memory["gpus"],
        "slots": record.limits.slots,
        "context": record.limits.context,
        "plans": {tower: made.engine_path(tower).stat().st_size for tower in record.plans},
        "seconds": round(time.monotonic() - start, 3),
    }


def _line(result: dict[str, Any]) -> str:
    if "dry_run" in result:
        return f"{result['sku']}: {result['dry_run']}"
    if "error" in result:
        return f"{result['sku']}: not built: {result['error']}"
    size = sum(result["plans"].values()) / 1e6
    what = f"built in {result['seconds']:.1f} s" if result["built"] else "up to date"
    gpus = f"{result['gpus']} GPU{'s' if result['gpus'] > 1 else ''}"
    place = "CPU" if result["compute_capability"] is None else gpus
    slots = f"{result['slots']} slot{'s' if result['slots'] > 1 else ''}"
    return (
        f"{result['engines']}: {what}; {result['flavour']}, {result['precision']}, {place}, "
        f"{slots} x {result['context']} tokens, engine files {size:.1f} MB"
    )
