"""The engine's thread goes before others where that is allowed and leaves them a core."""

from __future__ import annotations

import os
import threading

import pytest

from twotower_engines.serving.priority import take_priority


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
