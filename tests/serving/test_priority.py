"""The engine's thread goes before others where that is allowed and leaves them a core."""

from __future__ import annotations

import os
import queue
import threading

import pytest

from twotower_engines.serving import priority
from twotower_engines.serving.priority import take_priority


@pytest.fixture(autouse=True)
def no_others(monkeypatch) -> None:
    """Engines that run on this machine meanwhile have rights of another name."""
    monkeypatch.setattr(priority, "NAME", f"twotower-test-{os.getpid()}")


def in_a_thread() -> tuple[str, int, int]:
    """Take the priority in a thread; return what came of it, and policies of it and its child."""
    seen = []

    def child() -> None:
        seen.append(os.sched_getscheduler(0))

    def run() -> None:
        seen.append(take_priority())
        seen.append(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return seen[0], seen[1], seen[2]


def test_the_thread_goes_first_and_its_children_do_not(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    refusal, own, its_child = in_a_thread()
    if refusal:
        pytest.skip(f"this machine's rules: {refusal}")
    assert (own, its_child) == (os.SCHED_FIFO, os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_on_one_core_it_takes_its_turn(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert in_a_thread() == ("the machine has one core", os.SCHED_OTHER, os.SCHED_OTHER)


def test_a_system_that_refuses_is_quoted(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    refusal, own, _ = in_a_thread()
    assert refusal == "the system does not allow it (Operation not permitted)"
    assert own == os.SCHED_OTHER


def test_a_core_is_left_to_others_however_many_engines_there_are(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: None)
    end, refusals = threading.Event(), queue.SimpleQueue()

    def run() -> None:
        refusals.put(take_priority())
        end.wait()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    given = sorted(refusals.get() for _ in threads)
    end.set()
    for thread in threads:
        thread.join()
    assert given == ["", "", "other engines on this machine have all cores but one"]
    assert in_a_thread()[0] == "", "the others have ended"
