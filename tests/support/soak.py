"""Load a server with everything that callers do, and measure what is left.

```sh
python -m tests.support.soak REPOSITORY STREAMS SECONDS    # on a server of its own
```
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

import twotower_client as tt
from tests.support.malformed import is_refused, malformed_message
from twotower_engines.serving.server import ServerOptions, TritonServer

Ids = tuple[int, ...]
PROMPTS: tuple[Ids, ...] = tuple(tuple(range(5, 5 + size)) for size in range(1, 9))
WAYS = ("whole", "cancel", "leave", "late", "bad", "malformed")
SEED = 11
PATIENCE = {"timeout": 600.0, "inactivity_timeout": 600.0}  # seconds; others may have the cores
MOST_FILES = 16  # more than before, when all callers have left


@dataclass(frozen=True, slots=True)
class Soaked:
    """The outcome of a soak.

    Attributes:
        counts: How often each way was taken.
        grown: Bytes by which the server grew in the second half.
        files: Descriptors that it has more than before, when all callers have left.
        left: Requests that it still has then.
    """

    counts: dict[str, int]
    grown: int
    files: int
    left: int


def soak(server: TritonServer, streams: int, seconds: float) -> Soaked:
    """Load a server; every answer that is whole must be the one that was given alone."""
    return asyncio.run(_soak(server, streams, seconds))


async def _soak(server: TritonServer, streams: int, seconds: float) -> Soaked:
    counts: dict[str, int] = {}
    loop, address = asyncio.get_running_loop(), server.grpc_address
    async with tt.AsyncTwoTowerClient(address, **PATIENCE) as client:
        expected = await _references(client)
        files, until = _files_of(server), loop.time() + seconds
        callers = [
            asyncio.create_task(_one_caller(address, number, expected, until, counts))
            for number in range(streams)
        ]
        await asyncio.sleep(seconds / 2)
        half = bytes_of(server)
        await asyncio.gather(*callers)
        grown = bytes_of(server) - half
        assert await _references(client) == expected
        left = await _until_free(server)
        for _ in range(600):
            if _files_of(server) - files < MOST_FILES:
                break
            await asyncio.sleep(0.1)
        return Soaked(counts, grown, _files_of(server) - files, left)


async def _references(client: tt.AsyncTwoTowerClient) -> dict[Ids, Ids]:
    """Return the answer to each prompt, asked alone."""
    return {
        prompt: (await client.generate(prompt_ids=prompt, max_new_tokens=48)).ids
        for prompt in PROMPTS
    }


async def _one_caller(
    address: str, number: int, expected: dict[Ids, Ids], until: float, counts: dict[str, int]
) -> None:
    """Ask again and again, as callers of every kind do."""
    draw, loop = random.Random(SEED + number), asyncio.get_running_loop()
    client = tt.AsyncTwoTowerClient(address, **PATIENCE)
    while loop.time() < until:
        prompt, way = draw.choice(PROMPTS), draw.choice(WAYS)
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
            elif way == "malformed":
                await _send_malformed(address, draw)
            elif way == "late":
                with pytest.raises(tt.DeadlineError):
                    await stream.answer()
            else:
                await anext(stream)
                if way == "leave":  # as a process that was killed does
                    await client.close()
                    client = tt.AsyncTwoTowerClient(address, **PATIENCE)
                else:
                    await stream.cancel()
        except tt.ServerBusyError:
            counts["busy"] = counts.get("busy", 0) + 1
            await asyncio.sleep(0.2)
    await client.close()


async def _send_malformed(address: str, draw: random.Random) -> None:
    """Send a message that none of our clients would; it must be refused."""
    request = malformed_message(draw)
    async with grpc.aio.insecure_channel(address) as channel:
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        try:
            refused = is_refused(request, [part async for part in ask([request], timeout=600)])
        except grpc.RpcError as problem:
            refused = problem.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        assert refused, request


async def _until_free(server: TritonServer) -> int:
    """Wait, not for ever, until the server has no request; return how many it has."""
    left = -1
    with server.asker() as asker:
        for _ in range(400):
            state = await asyncio.to_thread(asker.probe, "twotower", 60.0)
            left = state["running"] + state["waiting"]
            if not left:
                break
            await asyncio.sleep(0.05)
    return left


def _processes(server: TritonServer) -> list[int]:
    return [server.pid, *server.model_processes.values()]


def _files_of(server: TritonServer) -> int:
    return sum(len(list(Path(f"/proc/{one}/fd").iterdir())) for one in _processes(server))


def bytes_of(server: TritonServer) -> int:
    """Memory of the server and its models, resident, without what they share."""
    pages = 0
    for one in _processes(server):
        _, resident, shared, *_ = Path(f"/proc/{one}/statm").read_text().split()
        pages += int(resident) - int(shared)
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(repository: str, streams: str, seconds: str) -> None:
    """Start a server, soak it, and print the outcome as a JSON object."""
    with TritonServer(Path(repository), ServerOptions("127.0.0.1", 0, None)) as server:
        server.wait_until_ready(120)
        outcome: dict[str, Any] = asdict(soak(server, int(streams), float(seconds)))
        assert server.exit_code is None, server.log_tail(200)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
