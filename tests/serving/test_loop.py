"""The engine's thread: every request gets an end, whatever happens to it or to the thread."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import ClassVar

import pytest

from tests.support.clock import Clock
from tests.support.replies import SECONDS, Answer, job
from tests.support.served import LONG
from tests.support.waiting import wait_until
from twotower_contract.engine_set import open_engine_set
from twotower_engines.artifacts.tokenizer import PREVIOUS_IDS
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.serving import loop as loop_module
from twotower_engines.serving.loop import WATCH_SECONDS, EngineLoop
from twotower_engines.serving.twotower import TritonPythonModel
from twotower_engines.serving.wire import Cancel, Job, Probe


@pytest.fixture(scope="module")
def runtime(packaged):
    return open_runtime(open_engine_set(packaged.engines), threads=1)


@pytest.fixture
def death() -> threading.Event:
    return threading.Event()


@pytest.fixture
def loop(runtime, death):
    made = EngineLoop(Scheduler(runtime, slots=2, most_waiting=1), death.set)
    yield made
    made.close()


def test_parts_carry_the_prompt_once_and_the_ids_before(loop) -> None:
    answer = Answer()
    loop.put(job(5, 6, max_new_tokens=80, block_size=16), answer)
    answer.wait()
    assert [part.prompt_ids for part in answer.parts] == [(5, 6), (), (), (), ()]
    ids = [token for part in answer.parts for token in part.event.ids]
    assert len(ids) == 80
    before = 0
    for part in answer.parts:
        assert part.previous_ids == tuple(ids[:before][-PREVIOUS_IDS:])
        before += len(part.event.ids)
    assert answer.parts[-1].event.finish_reason == "length"


def test_a_bad_request_is_refused_and_hurts_nobody(loop) -> None:
    good, bad = Answer(), Answer()
    loop.put(job(max_new_tokens=64), good)
    loop.put(job(99999), bad)
    assert bad.wait().failures[0][0] == "refused"
    assert "99999" in bad.failures[0][1]
    assert good.wait().parts[-1].event.finish_reason == "length"


def test_too_many_at_once_are_told_to_come_again(loop) -> None:
    open_ones = [Answer() for _ in range(3)]
    for one in open_ones:
        loop.put(job(**LONG), one)
    late = Answer()
    loop.put(job(), late)
    assert late.wait().failures[0][0] == "busy"
    for one in open_ones:
        one.cancelled = True
    for one in open_ones:
        one.wait()
    again = Answer()
    loop.put(job(), again)
    assert again.wait().parts


def test_a_cancel_ends_the_request_of_that_id_and_no_other(loop) -> None:
    """Its callers chose one name for all; the loop's own are different, and nobody can guess."""
    mine, other, waiting = Answer(), Answer(), Answer()
    loop.put(job(name="1", **LONG), mine)
    loop.put(job(name="1", max_new_tokens=200), other)
    loop.put(Job(job(name="1", **LONG).request, queue_notice_seconds=0.1), waiting)
    assert len({mine.key, other.key, waiting.key}) == 3
    assert len(mine.key) == 32
    for name in ("1", mine.key, waiting.key):
        told = Answer()
        loop.put(Cancel(name), told)
        assert told.wait().parts[-1].event.finish_reason == "cancelled"
    assert mine.wait().parts[-1].event.finish_reason == "cancelled"
    assert waiting.wait().parts[-1].event.finish_reason == "cancelled"
    assert other.wait().parts[-1].event.finish_reason == "length"


def test_a_probe_is_answered_before_all_who_wait(loop) -> None:
    answers = [Answer() for _ in range(3)]
    for one in answers:
        loop.put(job(**LONG), one)
    refused, probe = Answer(), Answer()
    loop.put(job(), refused)
    loop.put(Probe(), probe)
    assert refused.wait().failures[0][0] == "busy"
    state = probe.wait().parts[-1].state
    assert (state.running + state.waiting, state.draining) == (3, False)
    later = Answer()
    loop.put(Probe(), later)
    assert later.wait().parts[-1].state.turns > state.turns
    for one in answers:
        one.cancelled = True


def test_draining_finishes_what_is_open_and_takes_nothing_new(loop) -> None:
    running, new, probe = Answer(), Answer(), Answer()
    loop.put(job(max_new_tokens=200), running)
    assert running.begun.wait(SECONDS)
    model = TritonPythonModel()
    model._loop = loop
    assert model.is_ready()
    loop.drain()
    assert not model.is_ready()
    loop.put(job(), new)
    loop.put(Probe(), probe)
    [(failure, message)] = new.wait().failures
    assert failure == "busy"
    assert "send the request again" in message
    assert probe.wait().parts[-1].state.draining
    assert running.wait().parts[-1].event.finish_reason == "length"


def test_a_caller_who_left_frees_the_slot_or_the_place(loop) -> None:
    gone = [Answer() for _ in range(3)]
    for one in gone:
        loop.put(job(**LONG), one)
    assert gone[0].begun.wait(SECONDS)
    gone[2].cancelled = True  # it waits
    gone[2].wait()
    gone[0].cancelled = gone[1].cancelled = True
    for one in gone:
        assert one.wait().parts[-1].event.finish_reason == "cancelled"


def test_callers_are_asked_seldom_and_never_by_the_engines_thread(loop) -> None:
    class Asked(Answer):
        threads: ClassVar[list[str]] = []

        def is_cancelled(self) -> bool:
            self.threads.append(threading.current_thread().name)
            return False

    answer, start = Asked(), time.monotonic()
    loop.put(job(max_new_tokens=1000, threshold=1.0, block_size=1), answer)
    answer.wait()
    assert set(answer.threads) <= {"watch"}
    assert len(answer.threads) <= (time.monotonic() - start) / WATCH_SECONDS + 1


def test_a_request_is_given_up_after_its_timeout(loop, monkeypatch) -> None:
    clock, late, other = Clock(is_held=True), Answer(), Answer()
    monkeypatch.setattr(loop_module, "time", clock)
    loop.put(job(timeout=30.5, block_size=1, **LONG), late)
    loop.put(job(timeout=31.5, block_size=1, **LONG), other)
    for seconds in (30.25, 0.5):
        sent = len(late.parts)
        wait_until(lambda sent=sent: len(late.parts) > sent + 20 and other.parts)
        assert not late.failures
        clock.forward(seconds)
    [(failure, message)] = late.wait().failures
    assert failure == "late"
    assert "30.5" in message
    assert late.parts, "what was made before is not taken back"
    assert not other.failures
    other.cancelled = True
    other.wait()


def test_a_request_that_fails_on_the_way_says_why(packaged, runtime, loop) -> None:
    class Poisoned:
        """The runtime, whose logits are NaN: the checkpoint's own weights give none."""

        def __getattr__(self, name):
            return getattr(runtime, name)

        def denoise(self, rows):
            return [replace(one, still_masked=-1) for one in runtime.denoise(rows)]

    poisoned = EngineLoop(Scheduler(Poisoned(), slots=2), lambda: None)
    answer = Answer()
    poisoned.put(job(), answer)
    [(failure, message)] = answer.wait().failures
    assert failure == "failed"
    assert "NaN" in message
    poisoned.close()


def test_when_the_thread_dies_every_request_is_told(runtime, death, capfd) -> None:
    class Dying(Scheduler):
        turns = 0

        def turn(self):
            self.turns += 1
            if self.turns == 30:
                raise MemoryError("out of slots")
            return super().turn()

    loop = EngineLoop(Dying(runtime, slots=2), death.set)
    answers = [Answer() for _ in range(3)]
    for one in answers:
        loop.put(job(**LONG), one)
    for one in answers:
        [(failure, message)] = one.wait().failures
        assert failure == "failed"
        assert "MemoryError: out of slots" in message
    assert death.wait(SECONDS)
    after = Answer()
    loop.put(job(), after)
    assert after.wait().failures[0][1].startswith("the engine has stopped")
    assert "MemoryError" in capfd.readouterr().err
    for slot in range(2):  # the runtime is shared with the other tests
        runtime.reset(slot)


def test_closing_answers_what_is_open(runtime, death) -> None:
    loop = EngineLoop(Scheduler(runtime, slots=2), death.set)
    running = Answer()
    loop.put(job(**LONG), running)
    assert running.begun.wait(SECONDS)
    loop.close()
    assert running.wait().failures[0][0] == "busy"
    after = Answer()
    loop.put(job(), after)
    [(failure, message)] = after.wait().failures
    assert failure == "busy"
    assert "shutting down" in message
    loop.close()  # the lifeline and Triton both ask for it
    assert not death.is_set()


def test_those_who_wait_and_ask_are_told_their_places(loop) -> None:
    running = [Answer() for _ in range(2)]
    for one in running:
        loop.put(job(name="running", **LONG), one)
        assert one.begun.wait(SECONDS)
    asks = Answer()
    waiting = job(name="waiting")
    loop.put(Job(waiting.request, queue_notice_seconds=0.1), asks)
    assert asks.begun.wait(SECONDS)
    for one in running:
        one.cancelled = True
    asks.wait()
    *notices, block = asks.parts
    assert notices
    assert {(one.queue_place, one.prompt_ids, one.event.ids) for one in notices} == {(1, (), ())}
    assert (block.queue_place, block.prompt_ids, len(block.event.ids)) == (0, (5,), 4)


def test_a_request_that_only_waited_is_not_told_to_be_shorter(loop) -> None:
    running, late = [Answer() for _ in range(2)], Answer()
    for one in running:
        loop.put(job(name="running", **LONG), one)
    loop.put(job(timeout=0.2), late)
    [(failure, message)] = late.wait().failures
    assert failure == "late"
    assert message == (
        "waited for a slot for all of timeout_seconds, 0.2; allow more, or try again later"
    )
    for one in running:
        one.cancelled = True
