"""The part of the verb `twotower verify` that verifies engines for a GPU.

`twotower verify ENGINES CHECKPOINT` compares graphs with PyTorch in the package that owns both, and
runs `python -m twotower_engines.cli.verify` for the engine sets that it cannot run itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from twotower_contract.errors import TwoTowerError
from twotower_contract.processes import INTERRUPTED, interruptible


class VerificationError(TwoTowerError):
    """Something about an engine set is wrong."""

    exit_code = 1


@click.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--sku", help="SKU of the engines, where ENGINES holds several.")
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Bundle that ENGINES was built from."
)
@click.option("--against", type=click.Path(path_type=Path), help="CPU engines to compare with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify_engine_set(
    engines: Path,
    checkpoint: Path,
    sku: str | None,
    bundle: Path | None,
    against: Path | None,
    as_json: bool,
) -> None:
    """Verify ENGINES for a GPU as far as this machine can."""
    from twotower_contract.engine_set import open_engine_set
    from twotower_engines.verify.engines import verify_engines

    reference = open_engine_set(against) if against is not None else None
    result = verify_engines(open_engine_set(engines, sku), checkpoint, bundle, reference)
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


def main() -> None:
    """Run the command with the exit codes of the `twotower` command line."""
    interruptible()
    try:
        verify_engine_set.main(prog_name="twotower verify", standalone_mode=False)
    except TwoTowerError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except click.ClickException as problem:
        problem.show()
        sys.exit(problem.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
