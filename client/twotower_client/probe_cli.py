"""The verb `twotower probe`: does a server live, is it ready, has it started."""

from __future__ import annotations

import json
from typing import Any

import click

from twotower_client.access_cli import access_options
from twotower_client.errors import ModelNotReadyError

EPILOG = """\b
Examples:
  twotower probe live
  twotower probe ready --url localhost:8001 --timeout 2 --json
  twotower probe ready --url llm.example:8001 --tls-authority ca.pem --key-file key

live passes where the engine's thread answers, ready where the server takes new requests, too: not
while it drains, nor while its models load. The thread answers before all requests that wait, so a
busy server passes. startup asks as ready does: a cluster that has one asks it with patience. Exits
with 0 where the probe passes and with 1 where it fails.
"""


@click.command(epilog=EPILOG)
@click.argument("kind", type=click.Choice(["live", "ready", "startup"]))
@access_options
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=3,
    help="Seconds that the answer may take.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def probe(kind: str, timeout: float, as_json: bool, **access: Any) -> None:
    """Ask a server whether it is live, ready or started; for the probes of a cluster."""
    from twotower_client.access_cli import connect

    with connect(access) as client:
        state = client.probe(timeout)
    if kind != "live" and state["draining"]:
        raise ModelNotReadyError(
            f"the server at {client.url} is shutting down and takes no new requests; ask another"
        )
    if as_json:
        click.echo(json.dumps({"probe": kind, **state}))
    else:
        click.echo(f"{kind}: {state['running']} running, {state['waiting']} waiting")
