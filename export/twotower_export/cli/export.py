"""The verbs `twotower export` and `twotower inspect`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.errors import TwoTowerError, listed, printable
from twotower_contract.machine import memory_bytes
from twotower_export.progress import StepMeter

if TYPE_CHECKING:
    from twotower_export.inventory import Inventory

EXPORT_EPILOG = """\b
Examples:
  twotower export checkpoint bundle
  twotower export nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16@COMMIT bundle
  twotower export base-checkpoint bundle --towers context
  twotower export checkpoint nemotron-h --target tensorrt-llm

The weights stay where they are: a bundle holds graphs, a map of the weights, and the tokenizer.
"""

INSPECT_EPILOG = """\b
Examples:
  twotower inspect checkpoint
  twotower inspect bundle --checkpoint /models/moved-here
  twotower inspect bundle --full
  twotower inspect engines --json
  twotower inspect engines --traffic
"""


class InspectionError(TwoTowerError):
    """Files are missing or not as they were written."""

    exit_code = 1


@click.command(epilog=EXPORT_EPILOG)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--mask-token-id", type=int, help="Id of the mask.  [the checkpoint's, or 3]")
@click.option(
    "--towers",
    type=click.Choice(["both", "context"]),
    help="`context` for autoregressive generation only, as from a single-tower base checkpoint.  "
    "[both]",
)
@click.option("--revision", help="Commit, tag or branch on the hub.  [main, with a warning]")
@click.option(
    "--target",
    type=click.Choice(["bundle", "tensorrt-llm"]),
    default="bundle",
    help="`tensorrt-llm` writes the context tower as a standard Nemotron-H checkpoint.",
)
@click.option(
    "--full",
    is_flag=True,
    help="Hash every shard and record its sha256 for `inspect --full`; shards of a Hugging Face "
    "cache are recorded without it.",
)
@click.option("--force", is_flag=True, help="Replace OUT whatever it holds.")
@click.option("--dry-run", is_flag=True, help="Check everything, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    checkpoint: str,
    out: Path,
    mask_token_id: int | None,
    towers: str | None,
    revision: str | None,
    target: str,
    full: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the bundle of a CHECKPOINT to the folder OUT.

    CHECKPOINT is a folder or a hub id, ORGANISATION/NAME[@REVISION]. A bundle that is there already
    is replaced; any other folder is refused.
    """
    from twotower_contract.atomic import Writing
    from twotower_contract.layout import TOWERS, Tower
    from twotower_export.checkpoint import open_checkpoint, with_full_digests
    from twotower_export.tokens import tokenizer_warnings

    if target != "bundle":
        _refuse_options_of_bundles(target, towers, full)
        towers = "context"
    writing = Writing(force, dry_run)
    start = time.monotonic()
    meter = StepMeter()
    chosen: tuple[Tower, ...] = ("context",) if towers == "context" else TOWERS
    opened = open_checkpoint(
        checkpoint,
        revision=revision,
        mask_token_id=mask_token_id,
        towers=chosen,
        progress=meter,
    )
    warnings = [*opened.warnings, *tokenizer_warnings(opened.path)]
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if full:
        opened = with_full_digests(opened, meter)
    if target == "bundle":
        from twotower_export.bundle import write_bundle

        manifest = write_bundle(opened, out, towers=chosen, progress=meter, writing=writing)
        exported: list[str] = list(manifest.towers)
        if manifest.golden_missing is not None:
            reason = manifest.golden_missing["reason"]
            print(f"note: no golden self-test: {reason}", file=sys.stderr)
    else:
        from twotower_export.nemotron_h import write_nemotron_h

        write_nemotron_h(opened, out, progress=meter, writing=writing)
        exported = ["context"]
    meter.finish()
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    result = {
        "target": target,
        "path": str(out),
        "towers": exported,
        "checkpoint": str(opened.path),
        "id": opened.id,
        "revision": opened.revision,
        "fingerprint": opened.fingerprint,
        "bytes": size,
        "seconds": round(time.monotonic() - start, 2),
        "warnings": warnings,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{out}: {' and '.join(exported)} tower{'s' * (len(exported) > 1)} of "
        f"{opened.id or opened.path}, {size / 1e6:.1f} MB in {result['seconds']} s"
    )
    if target == "bundle":
        from twotower_export.inventory import inventory_of

        click.echo(f"next: {next_build(out, inventory_of(manifest), memory_bytes())}")


def next_build(out: Path, inventory: Inventory, memory: int) -> str:
    """Name a build that can be done: for the CPU of this machine, or for a GPU that holds it.

    Args:
        out: The bundle.
        inventory: Inventory of its towers.
        memory: Bytes of this machine; half of them may be weights, in float32.
    """
    from twotower_export.inventory import fitting_skus

    bundle = shlex.quote(str(out))
    if 4 * inventory.parameters < memory // 2:
        return f"twotower build {bundle} --sku cpu ENGINES"
    fit = fitting_skus(inventory)
    names = fit.one or fit.one_per_tower
    if not names:
        return f"twotower plan {bundle} --sku all"
    others = f" (or for {', '.join(names[1:])})" if names[1:] else ""
    return f"twotower build {bundle} --sku {names[0]} ENGINES{others}"


def _refuse_options_of_bundles(target: str, towers: str | None, full: bool) -> None:
    """Refuse what would be ignored: a standard checkpoint has one tower and no manifest."""
    for option, is_given in {"--towers both": towers == "both", "--full": full}.items():
        if is_given:
            raise TwoTowerError(
                f"{option} means nothing with --target {target}, which writes the context tower "
                "only, as a standard checkpoint: leave it out"
            )


@click.command(epilog=INSPECT_EPILOG)
@click.argument("source", metavar="CHECKPOINT|BUNDLE|ENGINES")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Check a BUNDLE against this checkpoint; another one is refused, with what differs.",
)
@click.option(
    "--full",
    is_flag=True,
    help="Read every byte of the checkpoint, and compare it with the sha256 that were recorded: of "
    "a bundle by its export, of a CHECKPOINT by the Hugging Face cache.",
)
@click.option(
    "--traffic",
    is_flag=True,
    help="Print the bytes that the kernels of ENGINES move in a call, by kind of layer, beside the "
    "least that the call must move.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(source: str, checkpoint: Path | None, full: bool, traffic: bool, as_json: bool) -> None:
    """Say what a checkpoint, bundle or engine set holds, weighs, and which GPUs could hold it.

    Nothing is downloaded: a hub id is looked up in the local cache. Exits with 1 where a file of a
    BUNDLE or of ENGINES is missing or changed, or a bundle's checkpoint is another one.
    """
    from twotower_export.inspection import inspect_source
    from twotower_export.inspection_text import report

    if traffic:
        _print_traffic(source, checkpoint is not None or full, as_json)
        return
    meter = StepMeter()
    found: dict[str, Any] = inspect_source(source, checkpoint, progress=meter, full=full)
    meter.finish()
    for warning in found.get("warnings", ()):
        print(f"warning: {printable(warning)}", file=sys.stderr)
    click.echo(json.dumps(found) if as_json else report(found))
    if found.get("problems"):
        raise InspectionError(f"{source}: {listed(found['problems'])}")


def _print_traffic(source: str, has_others: bool, as_json: bool) -> None:
    from twotower_export.engine_traffic import engines_traffic, traffic_text

    if has_others:
        raise TwoTowerError("--traffic is about ENGINES: leave out --checkpoint and --full")
    found = engines_traffic(Path(source).expanduser())
    click.echo(json.dumps(found) if as_json else traffic_text(found))
