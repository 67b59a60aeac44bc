"""The drain of a server: open answers have all of the grace, whoever stands still meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.clock import Clock
from tests.support.waiting import wait_until
from twotower_engines.serving import supervisor as supervisor_module
from twotower_engines.serving.asking import NoAnswerError
from twotower_engines.serving.server import ServerOptions
from twotower_engines.serving.supervisor import Policy, Supervisor

STALL, GRACE = 3.0, 8.0
OPEN = {"draining": True, "running": 1, "waiting": 0}
DONE = {**OPEN, "running": 0}


class SleptClock(Clock):
    """A clock that stands still but for what is slept, and for what a test says."""

    def __init__(self) -> None:
        super().__init__(is_held=True)

    def sleep(self, seconds: float) -> None:
        self.forward(seconds)


class Server:
    """A server whose engine answers a probe as it is told.

    Args:
        answer: Gives the state, or None for silence.
        engine: Process id of the engine.
    """

    exit_code = None

    def __init__(self, answer: Callable[[], dict[str, Any] | None], engine: int) -> None:
        self._answer = answer
        self.model_processes = {"twotower": engine}
        self.told: list[str] = []
        self.patience: list[float] = []
        self.counts = {"preprocessing": 7, "postprocessing": 5}
        self.looks = 0

    def drain(self) -> None:
        self.told.append("drain")

    def kill(self) -> None:
        self.told.append("kill")

    @contextmanager
    def asker(self) -> Iterator[Server]:
        yield self

    def answered(self, model: str) -> int:
        self.looks += 1
        return self.counts[model]

    def probe(self, model: str, timeout: float) -> dict[str, Any]:
        self.patience.append(timeout)
        state = self._answer()
        if state is None:
            supervisor_module.time.forward(timeout)
            raise NoAnswerError(f"{model} is silent")
        return state


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> None:
    monkeypatch.setattr(supervisor_module, "time", SleptClock())


def drain(answer: Callable[[], dict[str, Any] | None], engine: int) -> Server:
    server = Server(answer, engine)
    policy = Policy(stall_seconds=STALL, grace_seconds=GRACE)
    draining = Supervisor(Path("repository"), ServerOptions(), policy, print)
    draining.end(signal.SIGTERM)
    draining._drain(server)
    return server


def test_an_engine_that_is_silent_for_a_while_is_asked_again() -> None:
    states = iter([OPEN, None, OPEN, None, DONE])
    server = drain(lambda: next(states), os.getpid())
    assert server.told == ["drain", "kill"]
    assert next(states, "all asked") == "all asked"


def test_the_drain_of_a_silent_engine_ends_with_the_grace() -> None:
    server = drain(lambda: None, os.getpid())
    assert server.told == ["drain"]
    assert server.patience[:2] == [STALL, STALL]
    assert sum(server.patience) == pytest.approx(GRACE - 2 * supervisor_module.STEP_SECONDS)


def test_the_drain_ends_at_once_where_the_engine_has_ended() -> None:
    engine = subprocess.Popen(["sleep", "600"])

    def die() -> None:
        engine.kill()
        os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOWAIT)  # and stay a zombie

    try:
        server = drain(die, engine.pid)
    finally:
        engine.wait()
    assert server.told == ["drain"]
    assert server.patience == [STALL]


def test_steps_of_the_ensemble_that_answer_others_do_not_hang(monkeypatch) -> None:
    """A probe waits behind other requests; the first step alone is believed for a while."""
    monkeypatch.setattr(supervisor_module, "ASK_SECONDS", 0.001)
    monkeypatch.setattr(supervisor_module, "BUSY_LOOKS", 2)
    server, steps = Server(lambda: None, os.getpid()), {"ensemble": 1}

    def looks(count: int = 10) -> None:
        asked = server.looks
        wait_until(lambda: server.looks > asked + count)

    def answer(*models: str) -> None:
        looks()
        steps["ensemble"] = 1
        for model in models:
            server.counts[model] += 1
        looks()

    with supervisor_module._Asking(server, steps, STALL):
        answer()
        assert steps == {"ensemble": 1}, "nothing was answered"
        for expected in (0, 0, 1):
            answer("preprocessing")
            assert steps == {"ensemble": expected}
        answer("postprocessing")
        assert steps == {"ensemble": 0}
