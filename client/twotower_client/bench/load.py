"""Send load to a server, and record what becomes of each request.

A closed loop keeps so many requests under way: each that ends is followed by the next. An open loop
sends so many per second, at times drawn like those of callers who know nothing of each other,
however busy the server is.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.errors import ClientError
from twotower_contract.options import Options

TICK_SECONDS = 0.1  # between two looks of whoever shows the progress
ERROR_SECONDS = 0.1  # that a request's place stays taken after an error: refusals come at once


@dataclass(frozen=True, slots=True)
class Record:
    """One request, with times in seconds since the load began.

    Attributes:
        sent: Time at which it was sent.
        delay: Seconds between the time at which an open loop wanted to send it and `sent`.
        ended: Time of its last block, or of its error.
        blocks: Time and number of tokens of each block.
        prompt_tokens: Tokens of its prompt, as the server saw it.
        denoiser_calls: Denoiser calls that it took.
        error: Class and text of the error that ended it; None where it is complete.
    """

    sent: float
    delay: float
    ended: float
    blocks: tuple[tuple[float, int], ...]
    prompt_tokens: int
    denoiser_calls: int
    error: tuple[str, str] | None

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return sum(tokens for _, tokens in self.blocks)


@dataclass(frozen=True, slots=True)
class Level:
    """A load: a closed loop where it has no rate, an open loop otherwise.

    Attributes:
        concurrency: Requests under way at a time; the most of them in an open loop, None for any
            number.
        rate: Requests per second; None for a closed loop.
    """

    concurrency: int | None
    rate: float | None = None

    @property
    def name(self) -> str:
        """Words for tables and charts."""
        if self.rate is None:
            return f"{self.concurrency} at a time"
        return f"{self.rate:g} per second"


@dataclass(frozen=True, slots=True)
class Work:
    """The requests of a load test, and how long each of its loads goes on.

    Attributes:
        prompts: Texts or token ids, taken in turn.
        options: Options of every request.
        seconds: Seconds in which requests are begun; None for no limit.
        requests: Number of requests of a load; None for no limit.
    """

    prompts: Sequence[str | Sequence[int]]
    options: Options
    seconds: float | None
    requests: int | None


Tell = Callable[[Sequence[Record], int], None]
"""Is told the requests that have ended, and how many are under way."""


async def measure(
    client: AsyncTwoTowerClient, work: Work, level: Level, tell: Tell
) -> tuple[float, list[Record]]:
    """Send one load, and wait for all of its answers.

    Args:
        client: Client of the server.
        work: The requests.
        level: How many of them at a time, or per second.
        tell: Called several times per second.

    Returns:
        Seconds that throughput is counted over (until no request was begun any more, or to the last
        end where the number of requests was given), and all requests.
    """
    records: list[Record] = []
    open_tasks: set[asyncio.Task[None]] = set()
    free = asyncio.Semaphore(level.concurrency) if level.concurrency is not None else None
    start = time.monotonic()

    async def send(number: int, due: float) -> None:
        try:
            records.append(await _request(client, work, number, start, due))
            if records[-1].error is not None:
                await asyncio.sleep(ERROR_SECONDS)
        finally:
            if free is not None:
                free.release()

    async def watch() -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            tell(records, len(open_tasks))

    watcher = asyncio.create_task(watch())
    try:
        number = 0
        async for due in _times(level, work, start):
            if free is not None:
                await free.acquire()
            if level.rate is None:
                due = time.monotonic() - start
            if work.seconds is not None and time.monotonic() - start >= work.seconds:
                break
            task = asyncio.create_task(send(number, due))
            open_tasks.add(task)
            task.add_done_callback(open_tasks.discard)
            number += 1
        seconds = time.monotonic() - start
        while open_tasks:
            await asyncio.wait(open_tasks)
    finally:
        for task in (watcher, *open_tasks):
            task.cancel()
        await asyncio.gather(watcher, *open_tasks, return_exceptions=True)
    if work.seconds is None:
        seconds = max((record.ended for record in records), default=seconds)
    return min(seconds, work.seconds or seconds), records


async def _times(level: Level, work: Work, start: float) -> AsyncIterator[float]:
    """Yield the time of each request when it has come; in a closed loop, 0 at once."""
    draw = random.Random(0)
    numbers = itertools.count() if work.requests is None else range(work.requests)
    due = 0.0
    for _ in numbers:
        if level.rate is not None:
            due += draw.expovariate(level.rate)
            if work.seconds is not None and due >= work.seconds:
                await asyncio.sleep(max(0.0, start + work.seconds - time.monotonic()))
                return
            await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        yield due


async def _request(
    client: AsyncTwoTowerClient, work: Work, number: int, start: float, due: float
) -> Record:
    """Send one request, and record it."""
    prompt = work.prompts[number % len(work.prompts)]
    text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    sent = time.monotonic() - start
    blocks: list[tuple[float, int]] = []
    error: tuple[str, str] | None = None
    stream = client.stream(text, prompt_ids=ids, **work.options)
    try:
        async for block in stream:
            blocks.append((time.monotonic() - start, len(block.ids)))
    except ClientError as problem:
        error = type(problem).__name__, str(problem)
    return Record(
        sent=sent,
        delay=max(0.0, sent - due),
        ended=blocks[-1][0] if error is None and blocks else time.monotonic() - start,
        blocks=tuple(blocks),
        prompt_tokens=len(stream.prompt_ids),
        denoiser_calls=stream.blocks[-1].denoiser_calls if stream.blocks else 0,
        error=error,
    )
