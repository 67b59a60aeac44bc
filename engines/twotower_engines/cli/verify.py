"""The part of the verb `twotower verify` that verifies engines for a GPU.

The verb itself, in the exporter's package, compares graphs with PyTorch; this one knows engines.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_contract.errors import TwoTowerError


class VerificationError(TwoTowerError):
    """Something about an engine set is wrong."""

    exit_code = 1


def verify_device_engines(
    engines: EngineSet,
    checkpoint: Path,
    bundle: Path | None,
    against: Path | None,
    as_json: bool,
) -> None:
    """Verify engines for a GPU as far as this machine can, and print the findings.

    Args:
        checkpoint: The checkpoint's folder.
        bundle: Bundle that the engines were built from.
        against: CPU engines to compare with.
        as_json: Whether to print one JSON object.

    Raises:
        VerificationError: Something is wrong.
    """
    from twotower_engines.verify.engines import verify_engines

    reference = open_engine_set(against) if against is not None else None
    result = verify_engines(engines, checkpoint, bundle, reference)
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        for line in result.verified:
            click.echo(f"  ok       {line}")
        for line in result.problems:
            click.echo(f"  FAILED   {line}")
        for line in result.not_verified:
            click.echo(f"  not verified: {line}")
        click.echo("PASSED, as far as this machine can tell" if result.passed else "FAILED")
    if not result.passed:
        raise VerificationError(f"{result.engines}: {'; '.join(result.problems)}")
