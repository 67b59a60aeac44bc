"""Threads that read requests: a short one waits for no long one, and what is too large for none."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.support.replies import SECONDS, Answer
from tests.support.waiting import wait_until
from twotower_contract.engine_set import open_engine_set
from twotower_contract.statuses import retry_after
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.serving import reading
from twotower_engines.serving.loop import EngineLoop
from twotower_engines.serving.preprocessing import BYTES_PER_TOKEN, Preprocessor
from twotower_engines.serving.reading import LONG_TEXT, Reader
from twotower_engines.serving.wire import Probe, encode


class Held(Preprocessor):
    """Reads as ever, but a text that is long or `held` only when it may; notes who reads."""

    def __init__(self, engines) -> None:
        super().__init__(engines)
        self.may_go_on, self.threads = threading.Event(), set()

    def message(self, tensors, request_id, parameters=()):
        self.threads.add(threading.current_thread().name)
        if len(tensors["text_input"][0]) > LONG_TEXT or tensors["text_input"][0] == b"held":
            assert self.may_go_on.wait(SECONDS)
        return super().message(tensors, request_id, parameters)


@pytest.fixture
def engines(packaged):
    return open_engine_set(packaged.engines)


@pytest.fixture
def held(engines) -> Held:
    return Held(engines)


@pytest.fixture
def reader(engines, held):
    death = threading.Event()
    loop = EngineLoop(Scheduler(open_runtime(engines, threads=1), slots=2), death.set)
    reader = Reader(held, loop, 4, None, death.set)
    yield reader
    held.may_go_on.set()
    reader.close()
    loop.close()
    assert not death.is_set()


def put(reader: Reader, **tensors) -> Answer:
    answer, given = Answer(), {"max_new_tokens": np.array([4], np.int32), **tensors}
    reader.put(given, "a", (), answer)
    return answer


def text(content: bytes):
    return np.array([content], object)


def test_a_short_text_does_not_wait_for_long_ones(reader, held) -> None:
    long_ones = [put(reader, text_input=text(b"a " * LONG_TEXT)) for _ in range(3)]
    short = put(reader, text_input=text(b"Mia"))
    assert short.wait().parts[-1].event.finish_reason == "length"
    assert not any(one.ended.is_set() for one in long_ones)
    held.may_go_on.set()
    for one in long_ones:
        [(failure, message)] = one.wait().failures
        assert failure == "refused"
        assert "these engines hold 4096" in message
    assert held.threads == {"reading"}


@pytest.mark.parametrize("name", ["probe", "request"])
def test_a_probe_waits_for_no_text(reader, held, name) -> None:
    """Else hundreds of callers with long texts would make a server look as if it hung."""
    waiting = [put(reader, text_input=text(b"held")) for _ in range(3)]
    wait_until(lambda: held.threads)
    answer, asked = Answer(), {"probe": np.array([1], np.int32), "request": text(encode(Probe()))}
    reader.put({name: asked[name]}, "", (), answer)
    assert answer.wait().parts[0].state is not None
    assert not any(one.ended.is_set() for one in waiting)


def test_what_is_too_large_is_refused_before_it_is_queued(engines, reader, held) -> None:
    """Also where the queue is full."""
    context = engines.build.limits.context
    waiting = [put(reader, text_input=text(b"a " * LONG_TEXT))]
    wait_until(lambda: held.threads)
    waiting += [put(reader, text_input=text(b"a " * LONG_TEXT)) for _ in range(4)]
    too_many = context * BYTES_PER_TOKEN + 1
    for tensors, said in (
        ({"text_input": text(b"x" * too_many)}, f"the prompt has {too_many} bytes"),
        ({"input_ids": np.zeros(context + 1, np.int32)}, f"the prompt has {context + 1} tokens"),
        ({"stop": np.array([b"x" * too_many, b""], object)}, f"stop has {too_many} bytes"),
        ({"canvas": np.zeros(context + 1, np.int32)}, f"canvas has {context + 1} tokens"),
        ({"eos_ids": np.zeros(context + 1, np.int32)}, f"eos_ids has {context + 1} tokens"),
        ({"request": text(b"[" * too_many)}, f"request has {too_many} bytes"),
    ):
        refused = put(reader, **tensors)
        [(failure, message)] = refused.failures
        assert failure == "refused"
        assert message.startswith(said)
    busy = put(reader, text_input=text(b"a " * LONG_TEXT))
    [(failure, message)] = busy.failures
    assert failure == "busy"
    assert message.startswith("4 requests of ")
    assert retry_after(message) == 0.5, "the least: nothing has ended yet"
    assert not any(one.ended.is_set() for one in waiting)


def test_what_waits_is_bounded_by_bytes(reader, held, monkeypatch) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 3 * LONG_TEXT)
    long_ones = [put(reader, text_input=text(b"ab" * LONG_TEXT)) for _ in range(2)]
    assert [failure for failure, _ in long_ones[1].failures] == ["busy"]
    assert put(reader, text_input=text(b"Mia")).wait().parts, "that bound is another"
    held.may_go_on.set()
    long_ones[0].wait()
    wait_until(lambda: not reader._bytes[True])
    assert put(reader, text_input=text(b"ab" * LONG_TEXT)).wait().failures[0][0] == "refused"
