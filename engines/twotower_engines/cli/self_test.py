"""The verb `twotower selftest`: engines answer a fixed prompt whose answer is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.command_line import output_file
from twotower_contract.errors import TwoTowerError
from twotower_engines.cli.options import opening_options

if TYPE_CHECKING:
    from twotower_contract.engine_set import EngineSet
    from twotower_engines.runtime.interface import Runtime

EPILOG = """\b
Examples:
  twotower selftest engines
  twotower selftest engines --sku h200 --json
  twotower selftest engines --record checkpoint/golden.json

Exits with 1 where the answer is wrong. Without a golden answer it says PLAUSIBLE where nothing is
plainly wrong (and exits with 0), or UNAVAILABLE where nothing could be tested (with 2). A server
runs the same test when it starts. `twotower golden CHECKPOINT` computes the golden answer of a
model of any size. Where that takes too long, --record takes the answer of engines that `twotower
verify` passed, and the file names them. The next export takes the answer from
CHECKPOINT/golden.json.
"""


class SelfTestError(TwoTowerError):
    """The engines answer the golden prompt wrongly."""

    exit_code = 1


@click.command(epilog=EPILOG)
@click.argument("engines", metavar="ENGINES", type=click.Path(path_type=Path))
@opening_options
@click.option(
    "--record",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=output_file,
    help="Write the answer of these engines as the golden one, and compare nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def selftest(
    engines: Path,
    sku: str | None,
    checkpoint: Path | None,
    threads: int | None,
    record: Path | None,
    as_json: bool,
) -> None:
    """Let ENGINES answer a fixed prompt, and compare with the answer that the bundle stores.

    The test detects engines that run without errors but produce garbage, such as word salad at one
    token per denoiser call.
    """
    from twotower_contract.engine_set import open_engine_set
    from twotower_engines.runtime.opening import open_runtime
    from twotower_engines.runtime.progress import ByteMeter

    opened = open_engine_set(engines, sku)
    runtime = open_runtime(opened, checkpoint, threads, ByteMeter("binding weights"))
    try:
        if record is not None:
            _record(opened, runtime, record, as_json)
        else:
            _check(opened, runtime, as_json)
    finally:
        runtime.close()


def _check(engines: EngineSet, runtime: Runtime, as_json: bool) -> None:
    from twotower_engines.verify.self_test import run_self_test

    result = run_self_test(engines, runtime)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        click.echo(f"{result.status.upper()}: {result.reason} ({result.seconds:.2f} s)")
    if result.status == "failed":
        raise SelfTestError(f"{engines.folder}: {result.reason}")
    if result.status == "unavailable":
        raise TwoTowerError(f"{engines.folder}: {result.reason}")


def _record(engines: EngineSet, runtime: Runtime, file: Path, as_json: bool) -> None:
    """Write the answer of these engines, unless it is plainly wrong.

    Raises:
        SelfTestError: The answer is plainly wrong.
    """
    from twotower_contract.golden import write_golden
    from twotower_engines.verify.invariants import objections, run_request
    from twotower_engines.verify.self_test import golden_request

    request = golden_request(engines)
    result = run_request(runtime, request)
    ids = result.output_ids[len(request.prompt_ids) :]
    calls = result.denoiser_calls
    flaws = objections(runtime, request, result)
    if flaws:
        raise SelfTestError(
            f"{engines.folder}: {'; '.join(flaws)}. Nothing was recorded; compare these engines "
            "with `twotower verify` first"
        )
    build = engines.build
    versions = ", ".join(f"{name} {version}" for name, version in build.versions.items())
    settings = ("mode", "max_new_tokens", "block_size", "steps", "threshold")
    golden: dict[str, Any] = {
        "prompt_ids": list(request.prompt_ids),
        **{name: getattr(request, name) for name in settings},
        "output_ids": list(ids),
        "denoiser_calls": calls,
        "tokens_per_call": round(len(ids) / calls, 4) if calls else None,
        "computed_with": f"{build.flavour} engines for {build.sku} ({versions}), {build.precision}",
    }
    content = write_golden(file, engines.manifest.checkpoint.fingerprint, golden)
    click.echo(json.dumps(content) if as_json else f"{file}: {len(ids)} tokens in {calls} calls")
