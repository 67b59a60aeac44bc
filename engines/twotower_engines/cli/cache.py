"""The verb `twotower cache`: what is kept to be found again, and how to be rid of it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import click

from twotower_contract.atomic import reported
from twotower_engines.artifacts.cache_root import cache_root
from twotower_engines.errors import BuildError

DAY = 86400

EPILOG = """\b
Examples:
  twotower cache list
  twotower cache clean --older-than 30
  twotower cache clean --dry-run

The cache holds engine files of `twotower build`, engines of `twotower run CHECKPOINT`, and timings.
All of it is made again where it is missing. It lies in $XDG_CACHE_HOME/twotower, or in
~/.cache/twotower.
"""


@click.group(epilog=EPILOG)
def cache() -> None:
    """List what twotower keeps to find again, or delete it."""


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(as_json: bool) -> None:
    """Print every entry of the cache with its size and its age."""
    root, now = cache_root(), time.time()
    found = [
        {
            "entry": str(entry.relative_to(root)),
            "bytes": _size(entry),
            "days": round((now - entry.stat().st_mtime) / DAY, 1),
        }
        for entry in _entries(root)
    ]
    total = sum(int(str(one["bytes"])) for one in found)
    if as_json:
        click.echo(json.dumps({"cache": str(root), "bytes": total, "entries": found}))
        return
    for one in found:
        size = int(str(one["bytes"])) / 1e6
        click.echo(f"{size:10.1f} MB  {one['days']:6.1f} days  {one['entry']}")
    click.echo(f"{total / 1e6:10.1f} MB  in {root}")


@cache.command()
@click.option(
    "--older-than",
    "days",
    type=click.FloatRange(min=0),
    default=0,
    metavar="DAYS",
    help="Delete only entries older than this many days.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
def clean(days: float, dry_run: bool) -> None:
    """Delete the entries of the cache; let no build run meanwhile."""
    root, now = cache_root(), time.time()
    old = [entry for entry in _entries(root) if now - entry.stat().st_mtime >= days * DAY]
    freed = sum(map(_size, old))
    if not dry_run:
        with reported(root, BuildError):
            for entry in old:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    what = "would delete" if dry_run else "deleted"
    click.echo(f"{what} {len(old)} entries, {freed / 1e6:.1f} MB, of {root}")


def _entries(root: Path) -> list[Path]:
    """Return each engine, engine set, cache of kernels and timing cache, but no lock."""
    if not root.is_dir():
        return []
    kinds = ("builds", "rtx-kernels", "timing")
    found = [one for one in root.iterdir() if one.name not in kinds]
    for kind in kinds:
        folder = root / kind
        found += folder.iterdir() if folder.is_dir() else ()
    return sorted(one for one in found if one.name != "locks")


def _size(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else [entry]
    return sum(one.lstat().st_size for one in files if one.is_file() or one.is_symlink())
