"""Many streams for minutes, with everything that callers do: nothing is left, no answer changes."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

import twotower_client as tt

pytestmark = pytest.mark.server
PROMPTS = tuple(tuple(range(5, 5 + size)) for size in range(1, 9))
SEED = 11
MOST_FILES = 16  # more than before, when all callers have left


async def references(client: tt.AsyncTwoTowerClient) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The answer to each prompt, asked alone."""
    return {
        prompt: (await client.generate(prompt_ids=prompt, max_new_tokens=48)).ids
        for prompt in PROMPTS
    }


async def one_caller(
    address: str, number: int, expected: dict, until: float, counts: dict[str, int]
) -> None:
    """Ask again and again, as callers of every kind do."""
    draw, loop = random.Random(SEED + number), asyncio.get_running_loop()
    client = tt.AsyncTwoTowerClient(address, timeout=120)
    while loop.time() < until:
        prompt, way = draw.choice(PROMPTS), draw.choice(("whole", "cancel", "leave", "late", "bad"))
        counts[way] = counts.get(way, 0) + 1
        stream = client.stream(
            prompt_ids=prompt,
            max_new_tokens=48 if way == "whole" else 2000,
            timeout=draw.uniform(0.05, 0.5) if way == "late" else None,
        )
        try:
            if way == "whole":
                assert (await stream.answer()).ids == expected[prompt]
            elif way == "bad":
                with pytest.raises(tt.RequestRefusedError):
                    await client.generate(prompt_ids=[draw.randrange(5000, 10**6)])
            elif way == "late":
                with pytest.raises(tt.DeadlineError):
                    await stream.answer()
            else:
                await asyncio.wait_for(anext(stream), 60)
                if way == "leave":  # as a process that was killed does
                    await client.close()
                    client = tt.AsyncTwoTowerClient(address, timeout=120)
                else:
                    await stream.cancel()
        except tt.ServerBusyError:
            counts["busy"] = counts.get("busy", 0) + 1
            await asyncio.sleep(0.2)
    await client.close()


def files_of(server) -> int:
    return sum(len(list(Path(f"/proc/{one}/fd").iterdir())) for one in processes(server))


def bytes_of(server) -> int:
    """Memory of the server and its models, resident, without what they share."""
    pages = 0
    for one in processes(server):
        _, resident, shared, *_ = Path(f"/proc/{one}/statm").read_text().split()
        pages += int(resident) - int(shared)
    return pages * os.sysconf("SC_PAGE_SIZE")


def processes(server) -> list[int]:
    return [server.pid, *server.model_processes.values()]


def soak(server, streams: int, seconds: float) -> tuple[dict[str, int], int, int]:
    """Load a server; return what was done, the bytes it grew in the second half, and the files."""

    async def load() -> tuple[dict[str, int], int, int]:
        counts: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        async with tt.AsyncTwoTowerClient(server.grpc_address, timeout=120) as client:
            expected = await references(client)
            files, until = files_of(server), loop.time() + seconds
            callers = [
                asyncio.create_task(one_caller(server.grpc_address, one, expected, until, counts))
                for one in range(streams)
            ]
            await asyncio.sleep(seconds / 2)
            half = bytes_of(server)
            await asyncio.gather(*callers)
            grown = bytes_of(server) - half
            assert await references(client) == expected
            for _ in range(600):
                if files_of(server) - files < MOST_FILES:
                    break
                await asyncio.sleep(0.1)
        return counts, grown, files_of(server) - files

    return asyncio.run(load())


def check_no_slot_is_left(client) -> None:
    for _ in range(400):
        state = client.probe()
        if not state["running"] + state["waiting"]:
            return
        time.sleep(0.05)
    raise AssertionError(state)


def test_a_short_soak(server, client) -> None:
    counts, _, files = soak(server, 12, 5.0)
    assert files < MOST_FILES, files
    assert {"whole", "cancel", "leave", "late", "bad"} <= set(counts)
    check_no_slot_is_left(client)


@pytest.mark.slow
def test_five_minutes_of_64_streams(server, client) -> None:
    counts, grown, files = soak(server, 64, 300.0)
    assert sum(counts.values()) > 1000
    assert grown < 32 * 2**20, grown
    assert files < MOST_FILES, files
    check_no_slot_is_left(client)
