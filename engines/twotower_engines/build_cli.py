"""The verb `twotower build`."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["build"]

EPILOG = """\b
Examples:
  twotower build bundle --sku cpu engines
  twotower build bundle --sku cpu engines --slots 16 --context 4096
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--sku", default="cpu", show_default=True, help="What to build for.")
@click.option("--slots", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--context", type=click.IntRange(min=1), default=8192, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(bundle: Path, engines: Path, sku: str, slots: int, context: int, as_json: bool) -> None:
    """Build a bundle's engines for a SKU into ENGINES/<sku>."""
    from twotower_engines.build import BuildOptions, build_engines
    from twotower_engines.errors import BuildError

    if sku != "cpu":
        raise BuildError(f"sku {sku!r} cannot be built yet")
    made, is_new = build_engines(bundle, engines, BuildOptions(sku, slots, context))
    if as_json:
        print(json.dumps({"engines": str(made.folder), "sku": sku, "built": is_new}))
    else:
        print(f"{made.folder}: {'built' if is_new else 'up to date'}")
