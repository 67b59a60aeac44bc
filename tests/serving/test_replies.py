"""What a reply sends of each part, to a direct caller and to the ensemble, without a server."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from twotower_engines.generation.request import BlockEvent
from twotower_engines.serving.loop import Part
from twotower_engines.serving.twotower import TritonReply
from twotower_engines.serving.workers import Worker

FINAL = 1


class TritonError:
    """Triton's; what is made of it is what it was given."""

    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = 1, 2, 3, 4

    def __new__(cls, *given):
        return given


TRITON = SimpleNamespace(
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    Tensor=lambda name, values: (name, values.tolist()),
    TritonError=TritonError,
    InferenceResponse=lambda tensors=(), error=None: error or dict(tensors),
)
BLOCK = Part(BlockEvent("key", (7, 8), (2, 1), 2, 1), previous_ids=(5,), prompt_ids=(3, 4))
LAST = Part(BlockEvent("key", (9,), (1,), 3, 2, "length"), previous_ids=(5, 7, 8))
WAITS = Part(BlockEvent("key", (), (), 0, 0), queue_place=2)


class Sender:
    """Triton's, which keeps what it is given; a broken one raises."""

    def __init__(self, is_broken: bool = False) -> None:
        self.sent, self.is_broken = [], is_broken

    def send(self, response, flags) -> None:
        if self.is_broken:
            raise RuntimeError("the pipe is broken")
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return False


@pytest.fixture
def sending():
    dead = threading.Event()
    worker = Worker("sending", dead.set)
    yield worker
    worker.close()
    assert not dead.is_set()


def test_a_direct_caller_gets_what_is_said_and_no_more(sending) -> None:
    sender = Sender()
    reply = TritonReply(TRITON, sender, sending, None)
    for part in (WAITS, BLOCK, LAST):
        reply.send(part)
    sending.close()
    calls = {"denoiser_calls": [0], "context_calls": [0]}
    assert sender.sent == [
        ({"text_output": [b""], "queue_place": [2], "request_id": [b"key"], **calls}, 0),
        (
            {
                "text_output": [b""],
                "output_ids": [7, 8],
                "prompt_ids": [3, 4],
                "masked_counts": [2, 1],
                "denoiser_calls": [2],
                "context_calls": [1],
                "request_id": [b"key"],
            },
            0,
        ),
        (
            {
                "text_output": [b""],
                "output_ids": [9],
                "masked_counts": [1],
                "denoiser_calls": [3],
                "context_calls": [2],
                "finish_reason": [b"length"],
            },
            FINAL,
        ),
    ]


def test_a_caller_gets_the_outputs_that_it_asks_for(sending) -> None:
    sender = Sender()
    reply = TritonReply(TRITON, sender, sending, None, frozenset({"output_ids", "finish_reason"}))
    reply.send(BLOCK)
    reply.send(LAST)
    sending.close()
    assert [response for response, _ in sender.sent] == [
        {"output_ids": [7, 8]},
        {"output_ids": [9], "finish_reason": [b"length"]},
    ]


def test_the_ensemble_gets_every_output_and_no_errors(sending) -> None:
    sender = Sender()
    reply = TritonReply(TRITON, sender, sending, None, in_ensemble=True)
    reply.send(BLOCK)
    reply.fail("come again", "busy")
    sending.close()
    (block, _), (failed, flags) = sender.sent
    assert block.keys() == failed.keys()
    assert (block["previous_ids"], block["finish_reason"], block["error"]) == ([5], [b""], [b""])
    assert (failed["finish_reason"], failed["error"], flags) == ([b"busy"], [b"come again"], FINAL)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        ("refused", "INVALID_ARGUMENT", "INVALID_ARG"),
        ("busy", "UNAVAILABLE", "UNAVAILABLE"),
        ("late", "DEADLINE_EXCEEDED", "CANCELLED"),
        ("failed", "INTERNAL", "INTERNAL"),
    ],
)
def test_a_direct_caller_gets_real_errors(sending, failure, status, code) -> None:
    sender = Sender()
    TritonReply(TRITON, sender, sending, None).fail("why", failure)
    sending.close()
    expected = (f"{status}: why", getattr(TritonError, code))
    assert sender.sent == [(expected, FINAL)]


def test_a_caller_who_cannot_be_reached_has_left(sending, capfd) -> None:
    broken, good = Sender(is_broken=True), Sender()
    replies = [TritonReply(TRITON, one, sending, None) for one in (broken, good)]
    for reply in replies:
        reply.send(BLOCK)
    sending.close()
    assert [reply.is_cancelled() for reply in replies] == [True, False]
    assert len(good.sent) == 1
    assert "the pipe is broken" in capfd.readouterr().err


def test_nothing_follows_the_end_and_the_sender_is_let_go(sending) -> None:
    sender = Sender()
    reply = TritonReply(TRITON, sender, sending, None)
    reply.send(LAST)
    reply.fail("too late", "failed")
    sending.close()
    assert len(sender.sent) == 1
    assert sender not in vars(reply).values()


def test_the_end_is_not_sent_while_somebody_asks(sending) -> None:
    """The server frees the request with its end."""

    class Asked(Sender):
        is_asked = ended_meanwhile = False

        def send(self, response, flags) -> None:
            self.ended_meanwhile = self.is_asked
            super().send(response, flags)

        def is_cancelled(self) -> bool:
            self.is_asked = True
            begun.set()
            threading.Event().wait(0.2)
            self.is_asked = False
            return False

    begun, sender = threading.Event(), Asked()
    reply = TritonReply(TRITON, sender, sending, None)
    caller = threading.Thread(target=reply.is_cancelled)
    caller.start()
    begun.wait()
    reply.send(LAST)
    caller.join()
    sending.close()
    assert len(sender.sent) == 1
    assert not sender.ended_meanwhile
