"""The asyncio client against the real server: as the other, awaited."""

from __future__ import annotations

import asyncio
import time

import pytest

import twotower_client as tt

pytestmark = pytest.mark.server

LONG = {"max_new_tokens": 4000, "threshold": 1.0}  # many seconds


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


def test_blocks_arrive_one_by_one(server) -> None:
    async def work(client):
        await client.generate(prompt_ids=[7], max_new_tokens=1)  # connects
        async with client.stream(prompt_ids=[7], max_new_tokens=480, threshold=1.0) as stream:
            return [block async for block in stream], await stream.answer()

    blocks, answer = with_client(server, work)
    assert tuple(blocks) == answer.blocks
    assert blocks[0].seconds < blocks[-1].seconds / 2
    assert answer.prompt_ids == (7,)


def assert_slots_are_free(client) -> None:
    start = time.monotonic()
    client.generate(prompt_ids=[7], max_new_tokens=4)
    assert time.monotonic() - start < 3


def test_cancelling_the_task_stops_the_request(server, client) -> None:
    async def work(asynchronous):
        tasks = [asyncio.create_task(asynchronous.generate(prompt_ids=[n], **LONG)) for n in (5, 6)]
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(one) for one in with_client(server, work)] == [asyncio.CancelledError] * 2
    assert_slots_are_free(client)


def test_leaving_a_stream_stops_the_request(server, client) -> None:
    async def work(asynchronous):
        for number in (5, 6):
            async with asynchronous.stream(prompt_ids=[number], **LONG) as stream:
                await anext(stream)
            with pytest.raises(tt.RequestCancelledError):
                await anext(stream)

    with_client(server, work)
    assert_slots_are_free(client)


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

    with_client(server, work, **options)
    assert_slots_are_free(client)


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
