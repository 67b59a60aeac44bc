"""One thread that turns the scheduler for every request of a server.

Callers put jobs into its inbox from any thread; each job comes with a `Reply`, through which its
parts go out as they are made. Knows nothing about Triton.

If the thread dies, no request is left without an answer: every open one is failed, later ones are
refused, and `on_death` is called, which in a server ends the process.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

from twotower_contract.errors import TwoTowerError
from twotower_engines.artifacts.tokenizer import PREVIOUS_IDS
from twotower_engines.generation.request import BlockEvent, Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.serving.wire import Cancel, Job

LEAST_NOTICE_SECONDS = 0.5  # each notice takes the engine's thread half a millisecond

Failure = Literal["refused", "busy", "late", "failed"]
"""Why there is no (more) answer: the request must change; the same may work later; the time that
was allowed is over; something broke."""


@dataclass(frozen=True, slots=True)
class Part:
    """One response to a request.

    Attributes:
        event: The block.
        previous_ids: The end of the answer before it, at most `PREVIOUS_IDS` tokens.
        prompt_ids: The prompt, in the first part with tokens; else empty.
        queue_place: Place among the requests that wait for a slot, from 1; 0 once it has one.
    """

    event: BlockEvent
    previous_ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    queue_place: int = 0


class Reply(Protocol):
    """The receiver of one answer's parts; the loop's thread calls it."""

    def send(self, part: Part) -> None:
        """Send a part; the last one where its event says so."""

    def fail(self, message: str, failure: Failure) -> None:
        """Send an error, after which nothing comes."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


@dataclass(slots=True)
class _Open:
    """A request under way."""

    job: Job
    reply: Reply
    give_up_at: float | None
    notice_at: float | None
    sent: list[int] = field(default_factory=list)
    started: bool = False
    given_up: str | None = None


class EngineLoop:
    """Turns a scheduler in a thread of its own.

    Args:
        scheduler: Used by the thread alone from now on.
        max_open: Requests that may be under way or waiting before others are refused.
        on_death: Called by the dying thread after every open request was answered.
    """

    def __init__(self, scheduler: Scheduler, max_open: int, on_death: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._max_open = max_open
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[tuple[Job | Cancel, Reply] | None] = queue.SimpleQueue()
        self._open: dict[str, _Open] = {}
        self._count = 0
        self._closing = False
        self._ended: tuple[str, Failure] | None = None  # what requests are told from then on
        self._lock = threading.Lock()  # guards `_ended`: nothing enters a drained inbox
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def put(self, message: Job | Cancel, reply: Reply) -> None:
        """Take a job, or a wish to cancel one. Returns at once; the reply hears the rest."""
        with self._lock:
            if self._ended is None:
                self._inbox.put((message, reply))
                return
        reply.fail(*self._ended)

    def close(self) -> None:
        """Fail what is open and end the thread; a second time does nothing."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_in()
                self._give_up()
                for event in self._scheduler.turn():
                    self._deliver(event)
                self._tell_places()
            message = "the server is shutting down; send the request again later"
            self._end(message, message, "busy")
        except BaseException as problem:
            traceback.print_exc(file=sys.stderr)
            self._end(
                f"the engine failed: {type(problem).__name__}: {problem}",
                "the engine has stopped; restart the server",
                "failed",
            )
            self._on_death()

    def _take_in(self) -> None:
        """Handle what the inbox holds; wait for something where there is nothing else to do."""
        wait = self._scheduler.idle
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if item is None:
                self._closing = True
                return
            message, reply = item
            if isinstance(message, Cancel):
                self._cancel(message, reply)
            else:
                self._submit(message, reply)

    def _submit(self, job: Job, reply: Reply) -> None:
        if len(self._open) >= self._max_open:
            message = f"{len(self._open)} requests are open already; try again later"
            self._safely(lambda: reply.fail(message, "busy"))
            return
        # Two clients may choose the same id; the scheduler's must be unique.
        self._count += 1
        key = f"{self._count}:{job.request.request_id}"
        try:
            job.check_durations()
            self._scheduler.submit(_with_id(job, key))
        except TwoTowerError as problem:
            message = str(problem)
            self._safely(lambda: reply.fail(message, "refused"))
            return
        limit, now = job.timeout_seconds, time.monotonic()
        self._open[key] = _Open(
            job,
            reply,
            give_up_at=now + limit if limit > 0 else None,
            notice_at=now if job.queue_notice_seconds > 0 else None,
        )

    def _cancel(self, message: Cancel, reply: Reply) -> None:
        """Cancel every open request of that id, and say that this was done."""
        for key, one in self._open.items():
            if one.job.request.request_id == message.request_id:
                self._scheduler.cancel(key)
        done = BlockEvent(message.request_id, (), (), 0, 0, "cancelled")
        self._safely(lambda: reply.send(Part(done)))

    def _give_up(self) -> None:
        """Cancel what nobody waits for any more, and what took too long."""
        now = time.monotonic()
        for key, one in self._open.items():
            if one.give_up_at is not None and now > one.give_up_at:
                limit = f"timeout_seconds, {one.job.timeout_seconds:g}"
                one.given_up = (
                    f"waited for a slot for all of {limit}; allow more, or try again later"
                    if key in self._scheduler.waiting_ids
                    else f"not finished within {limit}; allow more, or ask for fewer tokens"
                )
                self._scheduler.cancel(key)
            elif one.reply.is_cancelled():
                self._scheduler.cancel(key)

    def _tell_places(self) -> None:
        """Tell those who wait for a slot, and asked to be told, that they still do."""
        now = time.monotonic()
        for place, key in enumerate(self._scheduler.waiting_ids, 1):
            one = self._open.get(key)
            if one is not None and one.notice_at is not None and now >= one.notice_at:
                one.notice_at = now + max(one.job.queue_notice_seconds, LEAST_NOTICE_SECONDS)
                notice = Part(BlockEvent(key, (), (), 0, 0), queue_place=place)
                if not self._safely(partial(one.reply.send, notice)):
                    self._drop(key)

    def _deliver(self, event: BlockEvent) -> None:
        """Send what a turn made of one request."""
        one = self._open.get(event.request_id)
        if one is None:  # dropped below; this is its last event, `cancelled`
            return
        if event.is_last:
            del self._open[event.request_id]
        if not self._safely(lambda: self._reply(one, event)):
            self._drop(event.request_id)

    def _drop(self, key: str) -> None:
        """Forget a request whose caller cannot be reached."""
        self._open.pop(key, None)
        self._scheduler.cancel(key)

    def _reply(self, one: _Open, event: BlockEvent) -> None:
        if event.error is not None:
            one.reply.fail(event.error, "failed")
        elif event.finish_reason == "cancelled" and one.given_up is not None:
            one.reply.fail(one.given_up, "late")
        else:
            prompt = () if one.started else one.job.request.prompt_ids
            one.started = True
            one.reply.send(Part(event, tuple(one.sent), prompt))
            one.sent = [*one.sent, *event.ids][-PREVIOUS_IDS:]

    def _end(self, message: str, later: str, failure: Failure) -> None:
        """Fail every request that is open or still in the inbox, and those that come later."""
        with self._lock:
            self._ended = later, failure
        replies = [one.reply for one in self._open.values()]
        self._open.clear()
        while not self._inbox.empty():
            item = self._inbox.get()
            replies += [item[1]] if item is not None else []
        for reply in replies:
            self._safely(partial(reply.fail, message, failure))

    def _safely(self, send: Callable[[], None]) -> bool:
        """Send something. One caller that cannot be reached must not stop the others."""
        try:
            send()
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return False
        return True


def _with_id(job: Job, key: str) -> Request:
    return replace(job.request, request_id=key)
