"""The verb `twotower bench`: load on a server, or single calls of engines without one."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from twotower_client.access_cli import SECRETS, secret_options, secrets_of
from twotower_client.errors import ClientError, RequestRefusedError
from twotower_client.prompts import random_prompts, read_prompts
from twotower_contract.atomic import write_text
from twotower_contract.command_line import given_options, output_file, request_options
from twotower_contract.progress import StatusLine

if TYPE_CHECKING:
    from twotower_client.aio import AsyncTwoTowerClient
    from twotower_client.bench.load import Level, Record, Tell, Work
    from twotower_contract.options import Options

SECONDS = 20.0
RANDOM_TOKENS = 64
RANDOM_PROMPTS = 1000
FILE = click.Path(path_type=Path, dir_okay=False)
EPILOG = """\b
Examples:
  twotower bench --url localhost:8001 --concurrency 1,4,16
  twotower bench --url localhost:8001 --rate 2,4 --prompts prompts.jsonl --duration 60
  twotower bench --url localhost:8001 --save new.json --html new.html
  twotower bench --compare old.json new.json
  twotower bench engines

Figures are named as by vLLM's `bench serve` where they are the same: ttft is the time to the first
block, itl the time between two blocks, tpot the time per token after the first block, e2el the
time of a whole answer. Rates count what arrives while requests are begun.
"""


class LoadFailedError(ClientError):
    """No request of the load test was answered."""

    exit_code = 1


def _numbers(kind: Callable[[str], float], noun: str) -> Callable[..., tuple[Any, ...]]:
    def read(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[Any, ...]:
        try:
            numbers = tuple(kind(part) for part in text.split(",")) if text is not None else ()
        except ValueError:
            numbers = (0,)
        if any(not 0 < number < 1e6 for number in numbers):
            raise click.BadParameter(f"{text!r}; give {noun} above 0 with commas between them")
        return numbers

    return read


@click.command(epilog=EPILOG)
@click.argument("engines", required=False)
@click.option("--url", help="host:port of the server's gRPC endpoint.")
@click.option(
    "--concurrency",
    metavar="1,4,16",
    callback=_numbers(int, "whole numbers"),
    help="Requests under way at a time; one load for each number.  [default: 1]",
)
@click.option(
    "--rate",
    metavar="R,...",
    callback=_numbers(float, "numbers"),
    help="Requests per second, sent however busy the server is; --concurrency then limits those "
    "under way.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of prompts: one a line, or .jsonl objects with prompt or prompt_ids.",
)
@click.option(
    "--random",
    "random_tokens",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help=f"Prompts of so many random token ids.  [default: {RANDOM_TOKENS}]",
)
@click.option(
    "--duration",
    type=click.FloatRange(0, min_open=True),
    help=f"Seconds in which a load begins requests.  [default: {SECONDS:g}]",
)
@click.option(
    "--num-prompts", type=click.IntRange(min=1), help="Requests of a load, instead of a duration."
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    help="Requests before each load that do not count.  [default: those at a time]",
)
@click.option("--save", type=FILE, callback=output_file, help="Write the result as JSON to FILE.")
@click.option("--html", type=FILE, callback=output_file, help="Write a page with charts to FILE.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="OLD NEW",
    help="Compare two results of --save; nothing is sent.",
)
@secret_options
@request_options
def bench(
    engines: str | None,
    url: str | None,
    concurrency: tuple[int, ...],
    rate: tuple[float, ...],
    prompts: Path | None,
    random_tokens: int | None,
    duration: float | None,
    num_prompts: int | None,
    warmup: int | None,
    save: Path | None,
    html: Path | None,
    compare: tuple[Path, Path] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a server under load (--url), or the calls of ENGINES without a server."""
    from twotower_client.bench.load import Work
    from twotower_client.request import check_options

    files = {name: options.pop(name) for name in SECRETS}
    _check_one(ENGINES=engines, **{"--url": url, "--compare": compare or None})
    _check_pair("--prompts", prompts, "--random", random_tokens)
    _check_pair("--duration", duration, "--num-prompts", num_prompts)
    if compare is not None:
        _compare(*compare, html, as_json)
        return
    if engines is not None:
        from twotower_engines.cli.bench import measure_engines

        measure_engines(engines, duration, save, as_json)
        return
    assert url is not None
    given = cast("Options", given_options(options))
    check_options(given)
    seconds = None if num_prompts else duration or SECONDS
    work = Work(_prompts_of(prompts, random_tokens), given, seconds, num_prompts)
    levels = _levels(concurrency, rate)
    measured = asyncio.run(_measure(url, secrets_of(**files), work, levels, warmup))
    result = {
        "kind": "twotower bench",
        "about": {
            "url": url,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": importlib.metadata.version("twotower"),
            "client": f"{platform.node()}, {platform.machine()}",
            "prompts": str(prompts) if prompts else f"{random_tokens or RANDOM_TOKENS} random ids",
            "options": given,
            "seconds": seconds,
            "requests": num_prompts,
        },
        "levels": measured,
    }
    _report(result, save, html, as_json)
    if not any(level["completed"] for level in measured):
        raise LoadFailedError("no request was answered; the errors stand above")


def _check_one(**given: object) -> None:
    """Refuse a call that names none of these, or several.

    Raises:
        RequestRefusedError: Names them.
    """
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise RequestRefusedError(
            f"{' and '.join(named) or 'nothing'} is given; give one of {', '.join(given)}"
        )


def _check_pair(name: str, value: object, other: str, value_of_other: object) -> None:
    if value is not None and value_of_other is not None:
        raise RequestRefusedError(f"{name} and {other} are both given; leave one of them out")


def _prompts_of(path: Path | None, tokens: int | None) -> Sequence[str | Sequence[int]]:
    """Return the prompts of the load."""
    if path is not None:
        return [prompt.ids or prompt.text or "" for prompt in read_prompts(path)]
    return list(itertools.islice(random_prompts(tokens or RANDOM_TOKENS, 0), RANDOM_PROMPTS))


def _levels(concurrency: tuple[int, ...], rates: tuple[float, ...]) -> list[Level]:
    from twotower_client.bench.load import Level

    if not rates:
        return [Level(count) for count in concurrency or (1,)]
    if len(concurrency) > 1:
        raise RequestRefusedError("--concurrency is a list beside --rate; give one number")
    return [Level(concurrency[0] if concurrency else None, rate) for rate in rates]


async def _measure(
    url: str,
    secrets: dict[str, Any],
    work: Work,
    levels: Sequence[Level],
    warmup: int | None,
) -> list[dict[str, Any]]:
    """Send every load, and return its figures."""
    from twotower_client.aio import AsyncTwoTowerClient
    from twotower_client.bench.load import measure
    from twotower_client.bench.summary import summarize

    figures = []
    async with AsyncTwoTowerClient(url, **secrets) as client:
        await client.check_ready()
        for level in levels:
            await _warm_up(client, work, level, warmup)
            line = StatusLine(10.0)
            measured = await measure(client, work, level, _teller(line, level, work))
            line.clear()
            figures.append(summarize(level, *measured))
    return figures


async def _warm_up(
    client: AsyncTwoTowerClient, work: Work, level: Level, count: int | None
) -> None:
    """Send some requests that do not count, as many at a time as the load will."""
    from twotower_client.bench.load import Level, measure

    at_a_time = level.concurrency or 1
    count = at_a_time if count is None else count
    if count:
        few = dataclasses.replace(work, seconds=None, requests=count)
        await measure(client, few, Level(at_a_time), lambda *_: None)


def _teller(line: StatusLine, level: Level, work: Work) -> Tell:
    """Return what shows the progress of a load."""

    def tell(records: Sequence[Record], under_way: int) -> None:
        if line.is_due():
            limit = f"{work.requests} requests" if work.requests else f"{work.seconds:g} s"
            failed = sum(record.error is not None for record in records)
            line.draw(
                f"{level.name}: {line.seconds:.0f} s of {limit}, {len(records)} done, "
                f"{failed} failed, {under_way} under way"
            )

    return tell


def _report(result: dict[str, Any], save: Path | None, html: Path | None, as_json: bool) -> None:
    """Print a result, and write its files."""
    from twotower_client.bench.report import page, table

    if save is not None:
        write_text(save, json.dumps(result, indent=1) + "\n")
    if html is not None:
        write_text(html, page([result]))
    print(json.dumps(result) if as_json else table(result))


def _compare(old: Path, new: Path, html: Path | None, as_json: bool) -> None:
    """Print what changed between two results."""
    from twotower_client.bench.report import comparison, page, read_result

    results = [read_result(path) for path in (old, new)]
    text = comparison(*results)
    if html is not None:
        write_text(html, page(results))
    print(json.dumps(results) if as_json else text)
