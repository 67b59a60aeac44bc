"""A call that the server ends is left to it: one that is cut then stays in Triton for ever."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import twotower_client as tt
from tests.support.fake_server import failure, fake_server, part
from twotower_client import aio, core
from twotower_client import client as client_module
from twotower_engines.serving.asking import Asker

LINGER_SECONDS = 0.1  # between the last response and the end of the call
STALL_SECONDS = 1.0  # the same, of a server that stands still for a moment
MINUTE = 60.0


@pytest.fixture(autouse=True)
def patience(monkeypatch) -> None:
    """A busy machine takes longer than `LINGER_SECONDS` for it."""
    monkeypatch.setattr(core, "GRACE_SECONDS", 20.0)


class Lingers:
    """An answer whose call ends a while after its last response; keeps whether it was cut.

    The last response is held back until it `may_come`.
    """

    def __init__(self, last: Callable[[], Any], seconds: float = LINGER_SECONDS) -> None:
        self._last, self._seconds = last, seconds
        self.may_come = threading.Event()
        self.may_come.set()
        self.peaceful: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            assert self.may_come.wait(20)
            yield self._last()
            time.sleep(self._seconds)
            self.peaceful.put(context.is_active())
        except GeneratorExit:
            self.peaceful.put(False)


def whole() -> Any:
    return part("length", "hello", (5, 6))


def ask(url: str, error: Any, then: Callable[[], None], **options: Any) -> None:
    with tt.TwoTowerClient(url) as client:
        with error:
            client.generate("a", **options)
        then()


async def ask_async(url: str, error: Any, then: Callable[[], None], **options: Any) -> None:
    async with tt.AsyncTwoTowerClient(url) as client:
        with error:
            await client.generate("a", **options)
        then()


def asynchronously(*arguments: Any, **options: Any) -> None:
    asyncio.run(ask_async(*arguments, **options))


BOTH = pytest.mark.parametrize("call", [ask, asynchronously])


@BOTH
@pytest.mark.parametrize(
    ("last", "error"),
    [
        (whole, contextlib.nullcontext()),
        (lambda: failure("refused"), pytest.raises(tt.RequestRefusedError)),
    ],
    ids=["whole", "refused"],
)
def test_a_client_that_closes_waits_for_the_end_of_a_call(last, error, call) -> None:
    answer = Lingers(last, STALL_SECONDS)
    with fake_server(answer) as url:
        call(url, error, lambda: None)
        assert answer.peaceful.get(timeout=20)


@BOTH
def test_a_client_that_gave_up_in_time_waits_for_the_server_to_do_so(call) -> None:
    answer = Lingers(lambda: failure("late"))
    answer.may_come.clear()
    with fake_server(answer) as url:
        call(url, pytest.raises(tt.DeadlineError), answer.may_come.set, timeout=0.25)
        assert answer.peaceful.get(timeout=20)


SCRIPT = "import twotower_client as tt; print(tt.TwoTowerClient({url!r}).generate('a').text)"


def test_a_script_that_closes_nothing_waits_too() -> None:
    answer = Lingers(whole)
    with fake_server(answer) as url:
        command = [sys.executable, "-c", SCRIPT.format(url=url)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "hello\n", "")
        assert answer.peaceful.get(timeout=20)


@pytest.fixture
def endless(monkeypatch) -> Iterator[Callable[..., Iterator[Any]]]:
    """An answer whose call never ends, and which is waited for a minute."""
    over = threading.Event()
    for module in (client_module, aio):
        monkeypatch.setattr(module, "END_SECONDS", MINUTE)

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield whole()
        over.wait(2 * MINUTE)

    yield answer
    over.set()


@BOTH
def test_a_connection_that_breaks_ends_the_wait(endless, call) -> None:
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(fake_server(endless))
        call(url, contextlib.nullcontext(), stack.close)
    assert time.monotonic() - began < MINUTE / 2


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (ask, KeyboardInterrupt),
        (asynchronously, KeyboardInterrupt),
        (asynchronously, asyncio.CancelledError),
    ],
)
def test_who_is_interrupted_waits_less(endless, call, kind) -> None:
    def interrupt() -> None:
        raise kind

    began = time.monotonic()
    with fake_server(endless) as url, pytest.raises(kind):
        call(url, contextlib.nullcontext(), interrupt)
    assert time.monotonic() - began < MINUTE / 2


CLOSING = """
import signal, threading, time
import twotower_client as tt, twotower_client.client as module

def late():
    time.sleep(0.5)  # the main thread waits by now, and the kernel does not wake it for this
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

module.END_SECONDS = 600.0
client = tt.TwoTowerClient({url!r})
client.generate("a")
try:
    threading.Thread(target=late).start()
    client.close()
except KeyboardInterrupt:
    print("heard")
module.END_SECONDS = 0.0  # a signal that came before the wait leaves one for the exit
"""


def test_the_wait_hears_ctrl_c(endless) -> None:
    with fake_server(endless) as url:
        command = [sys.executable, "-c", CLOSING.format(url=url)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "heard\n", ran.stderr


def test_questions_are_read_to_their_end() -> None:
    state = '{"running": 0, "waiting": 0, "turns": 1, "draining": false}'
    answer = Lingers(lambda: part("length", state))
    with fake_server(answer) as url:
        client, asker = tt.TwoTowerClient(url), Asker(url)
        assert client.probe()["turns"] == 1
        assert asker.probe("twotower", 20.0)["turns"] == 1
        asker.close()
        client.close()
        assert [answer.peaceful.get(timeout=20) for _ in range(2)] == [True, True]
