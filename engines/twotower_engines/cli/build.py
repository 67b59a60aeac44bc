"""The verb `twotower build`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.atomic import Writing
from twotower_contract.errors import DryRunEndsError, TwoTowerError
from twotower_contract.progress import StatusLine
from twotower_engines.cli.options import complete, engine_options, limit_options

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
@limit_options
@engine_options
@click.option(
    "--same-capability",
    "is_shared",
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
    chunk: int | None,
    prefix_mib: int,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Build a bundle's engines for one or more SKUs, into ENGINES/<sku>."""
    from twotower_engines.building.build import BuildOptions
    from twotower_engines.planning.sku_lookup import default_skus, resolve_skus

    # a misspelt one is refused before the first is built
    chosen = resolve_skus(default_skus() if skus is None else skus)
    results = []
    for sku in chosen:
        options = BuildOptions(
            sku, max_tokens_per_call=chunk, prefix_bytes=prefix_mib << 20, **limits
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


class BuildProgress:
    """Shows on standard error what each tower's build is doing; call it with a tower and a text."""

    def __init__(self, sku: str) -> None:
        self._sku = sku
        self._line = StatusLine(log_seconds=10.0)
        self._towers: dict[str, str] = {}

    def __call__(self, tower: str, text: str) -> None:
        """Take in news, and show it if it is time."""
        self._towers[tower] = text
        if self._line.is_due():
            doing = "; ".join(f"{name}: {what}" for name, what in self._towers.items())
            self._line.draw(f"building {self._sku}, {self._line.seconds:.0f} s: {doing}"[:100])

    def close(self) -> None:
        """Clear the line."""
        self._line.clear()
