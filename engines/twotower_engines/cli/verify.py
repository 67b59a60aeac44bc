"""`python -m twotower_engines.cli.verify`: verifies engines for a GPU for the verb `verify`.

`twotower verify ENGINES CHECKPOINT` compares graphs with PyTorch in the package that owns both, and
calls this for the engine sets that it cannot run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from twotower_contract.processes import INTERRUPTED, interruptible
from twotower_engines.errors import EnginesError

__all__ = ["main", "verify_engine_set"]


class VerificationError(EnginesError):
    """Something about an engine set is wrong."""

    exit_code = 1


@click.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--sku", help="Which engines, where ENGINES holds several.")
@click.option("--bundle", type=click.Path(path_type=Path), help="What ENGINES was built from.")
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
    from twotower_engines.artifacts.engine_set import open_engine_set
    from twotower_engines.verify.engines import verify_engines

    reference = open_engine_set(against) if against is not None else None
    found = verify_engines(open_engine_set(engines, sku), checkpoint, bundle, reference)
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        for line in found.verified:
            click.echo(f"  ok       {line}")
        for line in found.problems:
            click.echo(f"  FAILED   {line}")
        for line in found.not_verified:
            click.echo(f"  not verified: {line}")
        click.echo("PASSED, as far as this machine can tell" if found.passed else "FAILED")
    if not found.passed:
        raise VerificationError(f"{found.engines}: {'; '.join(found.problems)}")


def main() -> None:
    """Run the command with the exit codes of the `twotower` command line."""
    interruptible()
    try:
        verify_engine_set.main(prog_name="twotower verify", standalone_mode=False)
    except EnginesError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except click.ClickException as problem:
        problem.show()
        sys.exit(problem.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
