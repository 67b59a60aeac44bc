"""The verb `twotower doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from twotower_engines.cli.diagnosis import Examination

EPILOG = """\b
Examples:
  twotower doctor
  twotower doctor --json
"""


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Report what works on this machine and what is missing."""
    from twotower_engines.cli.diagnosis import examine

    found = examine()
    print(json.dumps(asdict(found), indent=2) if as_json else _text(found))


def _text(found: Examination) -> str:
    gpus = [
        f"{gpu['name']}, compute capability {gpu['compute_cap']}, {gpu['memory.total']}, "
        f"driver {gpu['driver_version']}"
        for gpu in found.gpus
    ]
    width = max(len(name) for name in found.packages)
    lines = [
        "machine",
        f"  Python   {found.python}, {found.system}",
        f"  cores    {found.cores}",
        f"  memory   {found.memory_bytes / 2**30:.1f} GiB",
        *(f"  GPU      {gpu}" for gpu in gpus or ["none"]),
        f"  Triton   {found.server or 'no server found'}",
        "packages",
        *(f"  {name:{width}}  {version}" for name, version in found.packages.items()),
        "what works here",
    ]
    for ability in found.abilities:
        lines.append(f"  {'no ' if ability.missing else 'yes'}  {ability.name}")
        lines += [f"         missing: {one}" for one in ability.missing]
    return "\n".join(lines)
