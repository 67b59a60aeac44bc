"""A caller with hundreds of requests at once does not starve one with a single one."""

from __future__ import annotations

import threading

import pytest

from tests.support.replies import SECONDS, Answer, job
from twotower_contract.engine_set import open_engine_set
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.serving.loop import EngineLoop

SLOTS, MOST_WAITING = 2, 256


@pytest.mark.parametrize("count", [200, pytest.param(400, marks=pytest.mark.slow)])
def test_hundreds_of_one_caller_and_one_of_another(packaged, count) -> None:
    """All have come before the second turn; the single one comes last, and is answered soon."""
    all_came, ends = threading.Event(), []

    class Held(Scheduler):
        def turn(self):
            assert all_came.wait(SECONDS)
            return super().turn()

    class Ordered(Answer):
        def send(self, part) -> None:
            super().send(part)
            if part.event.is_last:
                ends.append(self)

    runtime = open_runtime(open_engine_set(packaged.engines), threads=1)
    loop = EngineLoop(Held(runtime, SLOTS, most_waiting=MOST_WAITING), lambda: None)
    many, single = [Ordered() for _ in range(count)], Ordered()
    for one in many:
        loop.put(job(tenant="a", max_new_tokens=1), one)
    loop.put(job(tenant="b", max_new_tokens=1), single)
    all_came.set()
    single.wait()
    for one in many:
        one.wait()
    loop.close()
    assert ends.index(single) <= 2 * SLOTS
    assert not single.failures
    refused = [one for one in many if one.failures]
    # the first one alone may have had a slot before the others came
    assert max(0, count - MOST_WAITING - SLOTS) <= len(refused) <= max(0, count - MOST_WAITING)
    assert {failure for one in refused for failure, _ in one.failures} <= {"busy"}
