"""A call that the server ends is left to it: one that is cut then stays in Triton for ever."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import twotower_client as tt
from tests.support.fake_server import failure, fake_server, part
from twotower_engines.serving.asking import Asker

LINGER_SECONDS = 0.1  # between the last response and the end of the call


class Lingers:
    """An answer whose call ends a while after its last response; keeps whether it was cut."""

    def __init__(self, last: Callable[[], Any], wait: float = 0.0) -> None:
        self._last, self._wait = last, wait
        self.peaceful: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            time.sleep(self._wait)
            yield self._last()
            time.sleep(LINGER_SECONDS)
            self.peaceful.put(context.is_active())
        except GeneratorExit:
            self.peaceful.put(False)


def whole() -> Any:
    return part("length", "hello", (5, 6))


def ask(url: str) -> None:
    with tt.TwoTowerClient(url) as client:
        client.generate("a", timeout=0.25)


async def ask_async(url: str) -> None:
    async with tt.AsyncTwoTowerClient(url) as client:
        await client.generate("a", timeout=0.25)


@pytest.mark.parametrize("call", [ask, lambda url: asyncio.run(ask_async(url))])
@pytest.mark.parametrize(
    ("last", "wait", "error"),
    [
        (whole, 0.0, None),
        (lambda: failure("refused"), 0.0, tt.RequestRefusedError),
        (lambda: failure("late"), 0.3, tt.DeadlineError),
    ],
    ids=["whole", "refused", "late"],
)
def test_a_client_that_closes_waits_for_the_end_of_a_call(last, wait, error, call) -> None:
    answer = Lingers(last, wait)
    with fake_server(answer) as url:
        with contextlib.nullcontext() if error is None else pytest.raises(error):
            call(url)
        assert answer.peaceful.get(timeout=20)


SCRIPT = "import twotower_client as tt; print(tt.TwoTowerClient({url!r}).generate('a').text)"


def test_a_script_that_closes_nothing_waits_too() -> None:
    answer = Lingers(whole)
    with fake_server(answer) as url:
        command = [sys.executable, "-c", SCRIPT.format(url=url)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "hello\n", "")
        assert answer.peaceful.get(timeout=20)


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
