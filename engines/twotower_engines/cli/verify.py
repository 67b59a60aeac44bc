"""Verify engines for a GPU: the part of `twotower verify` that the exporter hands over."""

from __future__ import annotations

import json
from pathlib import Path

import click

from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_contract.errors import TwoTowerError
from twotower_engines.verify.engines import verify_engines


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
    """Verify engines for a GPU as far as this machine can, and print what was found.

    Args:
        engines: The engines.
        checkpoint: The checkpoint that they were exported from.
        bundle: The bundle that they were built from; None where it is not named.
        against: CPU engines to compare with; None where none are named.
        as_json: Whether to print JSON instead of lines.

    Raises:
        VerificationError: Something is wrong.
    """
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
