"""Many answers at a time, in the order of their prompts, for asyncio: as `many`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.errors import ClientError
from twotower_client.many import InOrder, Job, Progress, Prompt, check_concurrency
from twotower_client.result import Answer
from twotower_client.retry import Retry, Servers
from twotower_contract.options import Options


async def answer(
    servers: Servers[AsyncTwoTowerClient], job: Job, retry: Retry
) -> Answer | ClientError:
    """Return the answer of one job, or the error that its last attempt ended with."""
    waits = retry.waits()
    while True:
        number, client = servers.take()
        problem: ClientError | None = None
        try:
            async with client.stream(**job.arguments()) as stream:
                return await stream.answer()
        except ClientError as error:
            problem = error
        finally:
            servers.give_back(number, problem)
        wait = servers.wait(problem, waits, client, job.timeout)
        if wait is None:
            return problem
        await asyncio.sleep(wait)


async def generate_many(
    servers: Servers[AsyncTwoTowerClient],
    prompts: Iterable[Prompt],
    concurrency: int,
    timeout: float | None,
    retry: Retry,
    progress: Progress | None,
    options: Options,
) -> AsyncIterator[Answer | ClientError]:
    """Yield the answer to each prompt, or its error, in the order of the prompts."""
    check_concurrency(concurrency)
    jobs = enumerate(Job(prompt, options, timeout) for prompt in prompts)
    under_way: dict[asyncio.Task[Answer | ClientError], int] = {}
    ordered = InOrder(progress)
    try:
        while True:
            while len(under_way) < concurrency and (item := next(jobs, None)):
                under_way[asyncio.create_task(answer(servers, item[1], retry))] = item[0]
            if not under_way:
                return
            ended, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                for outcome in ordered.add(under_way.pop(task), task.result()):
                    yield outcome
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
