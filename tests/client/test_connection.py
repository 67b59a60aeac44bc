"""Connections that break, go silent, or belong to another event loop; no Triton is needed."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import queue
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

import twotower_client as tt
from tests.support.clock import Clock
from tests.support.command import twotower
from tests.support.fake_server import balancer, fake_server, part
from tests.support.silent_proxy import SilentProxy
from tests.support.waiting import wait_until
from twotower_client import client as client_module
from twotower_client import core
from twotower_contract.processes import next_of

SECONDS = 20


def short(request, context):
    yield part("length", "hello", (5, 6))


class Endless:
    """An answer that never ends; what it was told is kept."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def __call__(self, request, context):
        context.add_callback(self.gone.set)
        yield part(text="a", ids=(5,))
        while context.is_active():
            time.sleep(0.02)


def ask(url: str, asynchronous: bool, **options):
    """Return a function that asks with one client, in an event loop of its own each time."""
    if not asynchronous:
        return tt.TwoTowerClient(url, **options).generate
    client = tt.AsyncTwoTowerClient(url, **options)
    return lambda *given: asyncio.run(client.generate(*given))


BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["threads", "asyncio"])


def test_an_async_client_is_made_before_the_loop_and_outlives_it() -> None:
    with fake_server(short) as url:
        client = tt.AsyncTwoTowerClient(url)
        for _ in range(3):
            assert asyncio.run(client.generate("a")).text == "hello"
        assert len(client._connections) == 1, "those of closed loops are let go"

        async def last() -> None:
            async with client:
                await client.check_ready()

        asyncio.run(last())


def test_one_async_client_serves_loops_of_several_threads() -> None:
    with fake_server(short) as url:
        client, texts = tt.AsyncTwoTowerClient(url), []
        threads = [
            threading.Thread(target=lambda: texts.append(asyncio.run(client.generate("a")).text))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert texts == ["hello"] * 4


@BOTH
def test_a_connection_that_goes_silent_is_replaced(asynchronous) -> None:
    with fake_server(short) as url, SilentProxy(url) as proxy:
        client = tt.AsyncTwoTowerClient if asynchronous else tt.TwoTowerClient
        client = client(proxy.url)

        async def three() -> None:
            for number in range(3):
                if number == 1:
                    proxy.drop()
                    client.inactivity_timeout = 0.5
                    with pytest.raises(tt.InactivityError):
                        await given(client.generate, "a")
                else:
                    client.inactivity_timeout = SECONDS
                    assert (await given(client.generate, "a")).text == "hello"

        async def given(call, *arguments):
            return await call(*arguments) if asynchronous else call(*arguments)

        asyncio.run(three())
        assert proxy.accepted == 2


@BOTH
def test_keep_alive_ends_a_call_on_a_dropped_connection(asynchronous, monkeypatch) -> None:
    limits = dict(core.KEEP_ALIVE)
    seconds = (limits["grpc.keepalive_time_ms"] + limits["grpc.http2.ping_timeout_ms"]) / 1000
    assert seconds < tt.TwoTowerClient().inactivity_timeout
    quick = [(name, milliseconds // 50) for name, milliseconds in core.KEEP_ALIVE]
    monkeypatch.setattr(core, "KEEP_ALIVE", quick)
    with fake_server(Endless()) as url, SilentProxy(url) as proxy:
        if asynchronous:

            async def whole() -> None:
                async with tt.AsyncTwoTowerClient(proxy.url) as client:
                    stream = client.stream("a")
                    await anext(stream)
                    proxy.drop()
                    with pytest.raises(tt.RequestFailedError, match="broke in the middle"):
                        await anext(stream)

            asyncio.run(whole())
        else:
            with tt.TwoTowerClient(proxy.url) as client:
                stream = client.stream("a")
                next(stream)
                proxy.drop()
                with pytest.raises(tt.RequestFailedError, match="broke in the middle"):
                    next(stream)


def test_a_failure_leaves_other_streams_their_connection() -> None:
    with fake_server(Endless()) as url, tt.TwoTowerClient(url) as client:
        stream = client.stream("a")
        next(stream)
        client._give_up(stream._connection)
        gc.collect()
        with client.stream("a") as other:
            next(other)
            assert other._connection is not stream._connection
        client.inactivity_timeout = 0.5
        with pytest.raises(tt.InactivityError):  # and not a connection that was closed
            next(stream)


def test_connections_that_were_given_up_are_closed() -> None:
    with fake_server(short) as url, tt.TwoTowerClient(url) as client:
        for _ in range(3):
            client.generate("a")
            client._give_up(client._connect())

        def is_closed() -> bool:
            gc.collect()
            return not len(client._opened)

        wait_until(is_closed)  # when the threads that read have ended


HALF_READ = """
import twotower_client as tt
client = tt.TwoTowerClient({url!r})
stream = client.stream("a")
next(stream)
print("read", flush=True)
"""


def test_a_script_that_half_reads_a_stream_exits() -> None:
    """`__del__` would start a thread while Python shuts down, which hangs or fails."""
    endless = Endless()
    with fake_server(endless) as url:
        ran = subprocess.run(
            [sys.executable, "-c", HALF_READ.format(url=url)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "read\n", "")
        assert endless.gone.wait(SECONDS)


def test_streams_close_as_contextlib_wants_it() -> None:
    async def asynchronously(url: str) -> None:
        async with tt.AsyncTwoTowerClient(url) as client:
            async with contextlib.aclosing(client.stream("a")) as stream:
                await anext(stream)
            with pytest.raises(tt.RequestCancelledError):
                await anext(stream)

    for number in range(2):
        endless = Endless()
        with fake_server(endless) as url:
            if number:
                asyncio.run(asynchronously(url))
            else:
                with tt.TwoTowerClient(url) as client:
                    with contextlib.closing(client.stream("a")) as stream:
                        next(stream)
                    with pytest.raises(tt.RequestCancelledError):
                        next(stream)
            assert endless.gone.wait(SECONDS)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_dropped_async_stream_is_cancelled() -> None:
    endless = Endless()

    async def whole(url: str) -> None:
        client = tt.AsyncTwoTowerClient(url)
        async for _ in client.stream("a"):
            break
        assert await asyncio.to_thread(endless.gone.wait, SECONDS)
        never_begun = client.stream("a")
        del never_begun
        half_read = client.stream("a")
        await anext(half_read)
        endless.gone.clear()
        del half_read
        await asyncio.sleep(0)
        await client.close()  # waits for what it has begun to stop
        assert await asyncio.to_thread(endless.gone.wait, SECONDS)

    with fake_server(endless) as url:
        asyncio.run(whole(url))


@BOTH
def test_a_call_that_nobody_here_cancelled(asynchronous) -> None:
    """A server or a balancer ends it with CANCELLED; grpc.aio makes a CancelledError of it."""

    def cancels(request, context):
        context.abort(grpc.StatusCode.CANCELLED, "going away")
        yield part()

    def begins_and_cancels(request, context):
        yield part(text="a", ids=(5,))
        context.abort(grpc.StatusCode.CANCELLED, "going away")

    with fake_server(cancels, ready=cancels) as url:
        with pytest.raises(tt.ServerUnavailableError, match="going away"):
            ask(url, asynchronous)("a")
        look = tt.TwoTowerClient(url).check_ready
        if asynchronous:
            look = lambda: asyncio.run(tt.AsyncTwoTowerClient(url).check_ready())  # noqa: E731
        with pytest.raises(tt.ServerUnavailableError, match="going away"):
            look()
    with (
        fake_server(begins_and_cancels) as url,
        pytest.raises(tt.RequestFailedError, match="broke in the middle of the answer"),
    ):
        ask(url, asynchronous)("a")


def test_a_task_that_its_caller_cancels_is_cancelled() -> None:
    asked = threading.Event()

    def slow(request, context):
        asked.set()
        while context.is_active():
            time.sleep(0.02)
        yield part()

    async def whole(url: str) -> None:
        async with tt.AsyncTwoTowerClient(url) as client:
            for call in (client.check_ready, lambda: client.generate("a")):
                asked.clear()
                task = asyncio.create_task(call())
                assert await asyncio.to_thread(asked.wait, SECONDS)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    with fake_server(slow, ready=slow) as url:
        asyncio.run(whole(url))


@pytest.fixture
def clock(monkeypatch):
    """The clock of both clients, which a test moves."""
    made = Clock()
    monkeypatch.setattr(core, "time", made)
    return made


def test_the_time_of_an_async_answer_begins_when_it_is_sent(clock) -> None:
    async def whole(url: str) -> None:
        async with tt.AsyncTwoTowerClient(url) as client:
            stream = client.stream("a", timeout=SECONDS)
            clock.forward(2 * SECONDS)
            assert (await stream.answer()).text == "hello"

    with fake_server(short) as url:
        asyncio.run(whole(url))


@BOTH
@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, tt.RequestRefusedError, "asks for a key, and was given none or another; give it"),
        (413, tt.RequestRefusedError, "finds the request too large; shorten the prompt"),
        (429, tt.ServerBusyError, "has too many requests"),
        (502, tt.ServerUnavailableError, "reaches no server"),
        (503, tt.ServerUnavailableError, "has no server to ask"),
        (504, tt.ServerUnavailableError, "grpc_read_timeout"),
    ],
)
def test_a_balancer_that_answers_by_itself(asynchronous, status, kind, said) -> None:
    with balancer(status) as url, pytest.raises(kind, match=rf"HTTP status {status}\).*{said}"):
        ask(url, asynchronous)("a")


def test_a_model_that_is_unknown_during_a_shutdown_is_worth_another_try() -> None:
    """The server is still ready when it is asked; then it was only a moment."""

    def unknown(request, context):
        message = part()
        message.Clear()
        message.error_message = "Request for unknown model: 'twotower' is not found"
        yield message

    with fake_server(unknown) as url, pytest.raises(tt.ModelNotReadyError) as raised:
        tt.TwoTowerClient(url).generate("a")
    assert raised.value.exit_code == 1
    assert "try again" in str(raised.value)


@BOTH
def test_a_server_that_is_only_being_started_is_waited_for(asynchronous) -> None:
    looks = []

    def starting(request, context):
        looks.append(request)
        if len(looks) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        yield part()

    async def asynchronously(url: str, started: threading.Event) -> None:
        async with tt.AsyncTwoTowerClient(url) as client:
            with pytest.raises(tt.ServerUnavailableError):
                await client.check_ready()
            started.set()
            await client.wait_until_ready(SECONDS)

    def serve(port: int) -> None:
        assert refused.wait(SECONDS)
        with fake_server(short, ready=starting, port=port):
            assert done.wait(SECONDS)

    refused, done = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = threading.Thread(target=serve, args=(port,))
    server.start()
    url = f"127.0.0.1:{port}"
    if asynchronous:
        asyncio.run(asynchronously(url, refused))
    else:
        with tt.TwoTowerClient(url) as client:
            with pytest.raises(tt.ServerUnavailableError):
                client.check_ready()
            refused.set()
            client.wait_until_ready(SECONDS)
    done.set()
    server.join(SECONDS)
    assert len(looks) == 3


def test_waiting_in_the_queue_is_not_inactivity() -> None:
    """Both clients at a time, as it takes a while: each wait is short, and all are too long."""

    def waits(request, context):
        for place in (2, *[1] * 8):
            yield part(place=place)
            time.sleep(0.3)
        yield part("length", "hello", (5, 6))

    with fake_server(waits) as url, ThreadPoolExecutor() as pool:
        calls = [ask(url, asynchronous, inactivity_timeout=2.5) for asynchronous in (False, True)]
        for answer in pool.map(lambda call: call("a"), calls):
            found = answer.text, len(answer.blocks), answer.prompt_ids
            assert found == ("hello", 1, (5,))
            assert answer.seconds > 2.5


class TwoBlocks:
    """An answer whose second block comes when the caller stands still."""

    def __init__(self) -> None:
        self.stands = threading.Event()

    def __call__(self, request, context):
        yield part(text="a", ids=(5,))
        assert self.stands.wait(SECONDS)
        yield part("length", "b", (6,))


def test_a_process_that_stood_still_reads_what_came_meanwhile(clock, monkeypatch) -> None:
    def stands_still_once(items, timeout):
        if not answer.stands.is_set():
            answer.stands.set()
            clock.forward(timeout + 2)
            raise queue.Empty
        return next_of(items, timeout)

    answer = TwoBlocks()
    with fake_server(answer) as url, tt.TwoTowerClient(url) as client:
        stream = client.stream("a")
        next(stream)
        monkeypatch.setattr(client_module, "next_of", stands_still_once)
        assert next(stream).text == "b"


def test_an_event_loop_that_stood_still_reads_what_came_meanwhile() -> None:
    async def whole(url: str) -> None:
        async with tt.AsyncTwoTowerClient(url) as client, client.stream("a") as stream:
            await anext(stream)
            client.inactivity_timeout = 0.2
            second = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)  # it waits
            answer.stands.set()
            time.sleep(1.5)  # as code of a caller that holds the loop
            assert (await second).text == "b"

    answer = TwoBlocks()
    with fake_server(answer) as url:
        asyncio.run(whole(url))


def test_an_answer_that_only_waited_is_not_told_to_be_shorter(clock) -> None:
    def waits(request, context):
        while context.is_active():
            yield part(place=2)
            time.sleep(0.1)

    with fake_server(waits) as url, tt.TwoTowerClient(url) as client:
        stream = client.stream("a")
        stream.on_queue = lambda place: clock.forward(client.timeout)
        with pytest.raises(tt.DeadlineError, match=r"waited for a slot, at place 2, when"):
            stream.answer()
        assert stream.queue_place


def test_clients_and_streams_say_that_they_cannot_be_pickled() -> None:
    with (
        fake_server(Endless()) as url,
        tt.TwoTowerClient(url) as client,
        client.stream("a") as stream,
    ):
        for one in (client, stream, tt.AsyncTwoTowerClient(url)):
            for work in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="cannot be pickled or copied"):
                    work(one)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_metadata_goes_with_every_call(asynchronous) -> None:
    sent = []

    def answer(request, context):
        sent.append(dict(context.invocation_metadata()))
        yield part("length", "hello", (5, 6))

    with fake_server(answer, ready=answer) as url:
        access = {"metadata": {"X-Api-Key": "a b"}, "access_key": "k"}
        if asynchronous:
            asyncio.run(tt.AsyncTwoTowerClient(url, **access).check_ready())
        else:
            tt.TwoTowerClient(url, **access).check_ready()
        ask(url, asynchronous, **access)("hi")
        ran = twotower("generate", "hi", "--url", url, "--metadata", "x-api-key=a b")
        assert ran.returncode == 0, ran.stderr
    assert [one["x-api-key"] for one in sent] == ["a b"] * 3
    assert sent[1]["triton-grpc-protocol-twotower-access"] == "k"


@pytest.mark.parametrize(
    ("name", "value"), [("", "a"), ("x y", "a"), ("grpc-x", "a"), ("x-bin", "a"), ("x", "é\n")]
)
def test_metadata_that_grpc_cannot_send_is_refused_and_its_value_not_shown(name, value) -> None:
    with pytest.raises(tt.RequestRefusedError, match="cannot be sent") as refusal:
        tt.TwoTowerClient(metadata={name: value})
    assert "é" not in str(refusal.value)


def sockets_to(url: str) -> int:
    """How many sockets are connected to the port of an address and belong to a process."""
    port = f":{int(url.rpartition(':')[2]):04X}"
    tables = [Path("/proc/self/net") / name for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return sum(row[2].endswith(port) and row[9] != "0" for row in rows)


@pytest.mark.parametrize("way", ["leave", "cancel", "late"])
def test_an_async_client_leaves_no_socket_behind_without_the_garbage_collector(way, clock) -> None:
    async def call(url: str) -> None:
        client = tt.AsyncTwoTowerClient(url)
        stream = client.stream("a")
        await anext(stream)
        assert sockets_to(url)
        if way == "cancel":
            await stream.cancel()
        elif way == "late":
            clock.forward(client.timeout)
            with pytest.raises(tt.DeadlineError):
                await stream.answer()
        await client.close()

    async def calls(url: str) -> None:
        for _ in range(3):
            await call(url)
        await asyncio.to_thread(wait_until, lambda: not sockets_to(url))

    with fake_server(Endless()) as url:
        gc.collect()
        gc.disable()
        try:
            asyncio.run(calls(url))
        finally:
            gc.enable()
