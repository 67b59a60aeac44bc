"""The asyncio client against the real server: as the other, awaited."""

from __future__ import annotations

import asyncio

import pytest

import twotower_client as tt
from tests.support.served import LONG, freed_early
from tests.support.waiting import wait_until

pytestmark = pytest.mark.server


def with_client(server, work, **options):
    """Run a coroutine function with a connected client."""

    async def whole():
        async with tt.AsyncTwoTowerClient(server.grpc_address, **options) as client:
            return await asyncio.wait_for(work(client), 60)

    return asyncio.run(whole())


def test_answers_are_those_of_the_other_client(server, client) -> None:
    expected = client.generate("Once upon", max_new_tokens=40)

    async def work(asynchronous):
        await asynchronous.check_ready()
        return await asynchronous.generate("Once upon", max_new_tokens=40)

    answer = with_client(server, work)
    assert answer.output_ids == expected.output_ids
    assert answer.text == expected.text
    assert [block.masked_counts for block in answer.blocks] == [
        block.masked_counts for block in expected.blocks
    ]


def test_many_at_once(server, client) -> None:
    async def work(asynchronous):
        calls = (asynchronous.generate(prompt_ids=[n], max_new_tokens=20) for n in range(4, 12))
        return await asyncio.gather(*calls)

    answers = with_client(server, work)
    for number, answer in enumerate(answers, 4):
        assert answer.ids == client.generate(prompt_ids=[number], max_new_tokens=20).ids


def test_blocks_arrive_one_by_one(server, client) -> None:
    async def part(asynchronous):
        async with asynchronous.stream(prompt_ids=[7], **LONG) as stream:
            return [await anext(stream) for _ in range(20)]

    async def whole(asynchronous):
        async with asynchronous.stream(prompt_ids=[7], max_new_tokens=320, threshold=1.0) as stream:
            return [block async for block in stream], await stream.answer()

    with freed_early(client):  # they are here long before the last one is made
        first = with_client(server, part)
    blocks, answer = with_client(server, whole)
    assert tuple(blocks) == answer.blocks
    assert [block.ids for block in first] == [block.ids for block in blocks]
    assert answer.prompt_ids == (7,)


def test_cancelling_the_task_stops_the_request(server, client) -> None:
    async def work(asynchronous):
        ask = asynchronous.generate
        with freed_early(client):  # before the end of the connection
            tasks = [asyncio.create_task(ask(prompt_ids=[n], **LONG)) for n in (5, 6)]
            await asyncio.to_thread(wait_until, lambda: client.probe()["running"] == 2)
            for task in tasks:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(one) for one in with_client(server, work)] == [asyncio.CancelledError] * 2


def test_leaving_a_stream_stops_the_request(server, client) -> None:
    async def work(asynchronous):
        with freed_early(client):  # before the end of the connection
            for number in (5, 6):
                async with asynchronous.stream(prompt_ids=[number], **LONG) as stream:
                    await anext(stream)
                with pytest.raises(tt.RequestCancelledError):
                    await anext(stream)

    with_client(server, work)


@pytest.mark.parametrize(
    ("call", "options", "kind"),
    [
        ({"prompt_ids": [99999]}, {}, tt.RequestRefusedError),
        ({"prompt": ""}, {}, tt.RequestRefusedError),
        ({"prompt_ids": [5], "timeout": 0.3, **LONG}, {}, tt.DeadlineError),
        ({"prompt_ids": [5], **LONG}, {"inactivity_timeout": 0.001}, tt.InactivityError),
    ],
    ids=["refused by the server", "refused by the client", "deadline", "inactivity"],
)
def test_errors_are_those_of_the_other_client(server, client, call, options, kind) -> None:
    async def work(asynchronous):
        with pytest.raises(kind):
            await asynchronous.generate(**call)

    with freed_early(client):
        with_client(server, work, **options)


def test_nobody_listens() -> None:
    async def work():
        async with tt.AsyncTwoTowerClient("127.0.0.1:9") as client:
            with pytest.raises(tt.ServerUnavailableError):
                await client.generate("a")
            with pytest.raises(tt.ServerUnavailableError):
                await client.check_ready()
            with pytest.raises(tt.ServerUnavailableError):
                await client.wait_until_ready(0.3)

    asyncio.run(work())
