"""Requests that wait for a slot: they are told so, and are not given up as inactive."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

import twotower_client as tt
from tests.support.clock import Clock
from tests.support.served import LONG
from tests.support.waiting import wait_until
from twotower_client import core
from twotower_client.connection import KEEP_ALIVE
from twotower_client.request import Message
from twotower_client.response import read

pytestmark = pytest.mark.server


@pytest.fixture
def busy(client):
    """Both slots of the server are taken."""
    streams = [client.stream(prompt_ids=[number], block_size=4, **LONG) for number in (5, 6)]
    for stream in streams:
        next(stream)
    yield streams
    for stream in streams:
        stream.cancel()


def waiting(**inputs) -> object:
    message = Message()
    for one, value in {"input_ids": [7], "max_new_tokens": 4, **inputs}.items():
        message.add(one, value)
    return message.message


def test_a_request_that_waits_is_not_inactive(server, busy, monkeypatch) -> None:
    """The client's clock runs ahead: each wait is short, and all together are too long."""
    clock = Clock()
    monkeypatch.setattr(core, "time", clock)
    monkeypatch.setattr(core, "NOTICE_SECONDS", 0.5)
    with tt.TwoTowerClient(server.grpc_address, inactivity_timeout=30) as client:
        stream = client.stream(prompt_ids=[7], max_new_tokens=4, timeout=600)
        for _ in range(3):
            assert stream._take(stream._wait()) is None
            assert stream.queue_place == 1
            clock.forward(20)
        for other in busy:
            other.cancel()
        answer = stream.answer()
    assert (len(answer.ids), len(answer.blocks), answer.prompt_ids) == (4, 1, (7,))
    assert stream.queue_place == 0


def test_places_are_told_to_those_who_ask(server, client, busy) -> None:
    """A caller who does not ask gets blocks alone: `generate` over HTTP takes one response."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        silent = infer(iter([waiting()]), timeout=60)
        wait_until(lambda: client.probe()["waiting"])  # two calls may arrive in any order
        asks = infer(iter([waiting(queue_notice_seconds=0.5)]), timeout=60)
        places = [read(next(asks).infer_response, 0).queue_place for _ in range(3)]
        assert places == [2, 2, 2]
        for other in busy:
            other.cancel()
        assert [read(part.infer_response, 0).queue_place for part in silent] == [0]
        assert read(list(asks)[-1].infer_response, 0).queue_place == 0


def test_a_request_that_only_waited_is_told_so(server, busy) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        [part] = infer(iter([waiting(timeout_seconds=0.3)]), timeout=60)
    words = "DEADLINE_EXCEEDED: waited for a slot for all of timeout_seconds, 0.3"
    assert part.error_message.startswith(words)


def test_keep_alive_questions_come_no_more_often_than_the_server_allows(server) -> None:
    """Else it ends the connection of a client that it has told nothing for two minutes."""
    flag = "--grpc-http2-min-recv-ping-interval-without-data="
    words = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    [allowed] = [int(word.removeprefix(flag)) for word in words if word.startswith(flag)]
    assert allowed < dict(KEEP_ALIVE)["grpc.keepalive_time_ms"]
