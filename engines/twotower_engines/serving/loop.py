"""One thread that turns the scheduler for every request of a server.

Callers put messages into its inbox from any thread; each comes with a `Reply`, through which its
parts go out as they are made. Knows nothing about Triton.

The thread does nothing that can wait: a reply only queues what it is given, and a second thread
asks now and then who has left. If the engine's thread dies, no request is left without an answer:
every open one is failed, later ones are refused, and `on_death` is called, which in a server ends
the process.
"""

from __future__ import annotations

import itertools
import queue
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from twotower_contract.errors import TwoTowerError
from twotower_contract.statuses import Failure
from twotower_engines.artifacts.tokenizer import PREVIOUS_IDS
from twotower_engines.generation.request import BlockEvent
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.serving.journal import Ended, Journal
from twotower_engines.serving.priority import take_priority
from twotower_engines.serving.wire import Cancel, Job, Probe

LEAST_NOTICE_SECONDS = 0.5  # a notice takes as much of the server as a block
LIMIT_SECONDS = 0.01  # between two looks at what took too long
ORDER_SECONDS = 0.1  # between two looks at the order of those who wait, which takes time
# To ask whether a caller has left is a round trip between processes: 0.1 ms of both.
WATCH_SECONDS = 0.1
WATCHED_AT_ONCE = 16

DRAINING = "the server is shutting down; send the request again later, or to another server"


@dataclass(frozen=True, slots=True)
class Part:
    """One response to a request.

    Attributes:
        event: The block; its `request_id` is the name that the loop gave to the request.
        previous_ids: The end of the answer before it, at most `PREVIOUS_IDS` tokens.
        prompt_ids: The prompt, in the first part with tokens; else empty.
        queue_place: Place among the requests that wait for a slot, from 1; 0 once it has one.
        state: In the answer to a probe, the state of the loop.
    """

    event: BlockEvent
    previous_ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    queue_place: int = 0
    state: State | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The loop between two turns.

    Attributes:
        running: Requests that have a slot.
        waiting: Requests that wait for one.
        turns: Turns since the start.
        draining: Whether new requests are refused.
    """

    running: int
    waiting: int
    turns: int
    draining: bool


class Reply(Protocol):
    """The receiver of one answer's parts. `send` and `fail` queue them, and never raise."""

    def send(self, part: Part) -> None:
        """Send a part; the last one where its event says so."""

    def fail(self, message: str, failure: Failure) -> None:
        """Send an error, after which nothing comes."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more. May take a while."""


@dataclass(slots=True)
class _Open:
    """A request under way."""

    key: str
    job: Job
    reply: Reply
    began: float
    give_up_at: float | None
    notice_at: float | None
    admitted: float | None = None
    first_block: float | None = None
    last_block: float = 0.0
    tokens: int = 0
    sent: list[int] = field(default_factory=list)
    started: bool = False
    given_up: str | None = None


class EngineLoop:
    """Turns a scheduler in a thread of its own.

    Args:
        scheduler: Used by the thread alone from now on.
        on_death: Called by the dying thread after every open request was answered.
        journal: Takes notes of what happens; None for nobody.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        on_death: Callable[[], None],
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal
        self._scheduler = scheduler
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[tuple[Job | Cancel | Probe, Reply | None] | None] = (
            queue.SimpleQueue()
        )
        self._open: dict[str, _Open] = {}
        self._running: tuple[_Open, ...] = ()  # for the watching thread; replaced, not changed
        self._waiting: tuple[_Open, ...] = ()
        self._turns = 0
        self._state = State(0, 0, 0, False)
        self._look_at = self._order_at = 0.0
        self._closing = False
        self._draining = False
        self._ended: tuple[str, Failure] | None = None  # what requests are told from then on
        self._lock = threading.Lock()  # guards `_ended`: nothing enters a drained inbox
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name="engine", daemon=True),
            threading.Thread(target=self._watch, name="watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def put(self, message: Job | Cancel | Probe, reply: Reply) -> None:
        """Take a job, a wish to cancel one, or a question. Returns at once; the reply hears."""
        with self._lock:
            if self._ended is None:
                self._inbox.put((message, reply))
                return
        reply.fail(*self._ended)

    @property
    def state(self) -> State:
        """The state as it was seen last; for any thread."""
        return self._state

    def retry_after(self, unread: int) -> float:
        """Return the seconds after which there may be room; for any thread.

        Args:
            unread: Requests that come after those that wait for a slot.
        """
        return self._scheduler.retry_after(self._state.waiting + unread)

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    def drain(self) -> None:
        """Refuse requests that come from now on; those that are open go on."""
        self._draining = True

    def close(self) -> None:
        """Fail what is open and end the threads; a second time does nothing."""
        self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            refusal = take_priority()
            order = f"takes its turn with others: {refusal}" if refusal else "goes before others"
            print(f"twotower: the engine's thread {order}", file=sys.stderr)
            while not self._closing:
                self._take_in()
                # first those who may ask for more at once, while rows are free
                for event in sorted(self._scheduler.turn(), key=lambda one: not one.is_last):
                    self._deliver(event)
                self._turns += 1
                if self._scheduler.idle:
                    self._see()
                self._look()
            self._end(DRAINING, DRAINING, "busy")
        except BaseException as problem:
            traceback.print_exc(file=sys.stderr)
            self._end(
                f"the engine failed: {type(problem).__name__}: {problem}",
                "the engine has stopped; send the request again when the server was restarted",
                "failed",
            )
            self._on_death()
        finally:
            self._stopped.set()

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
                self._scheduler.cancel(message.request_id)
                if reply is not None:
                    reply.send(Part(BlockEvent(message.request_id, (), (), 0, 0, "cancelled")))
            elif reply is not None:
                self._submit(message, reply) if isinstance(message, Job) else self._tell(reply)

    def _submit(self, job: Job, reply: Reply) -> None:
        if self._draining:
            self._turn_away(job, reply, DRAINING, "busy")
            return
        # Whoever knows the name may cancel the request, so nobody can guess it.
        key = secrets.token_hex(16)
        try:
            job.check_durations()
            self._scheduler.submit(replace(job.request, request_id=key))
        except TwoTowerError as problem:
            self._turn_away(job, reply, str(problem), "refused")
            return
        limit, now = job.timeout_seconds, time.monotonic()
        self._open[key] = _Open(
            key,
            job,
            reply,
            began=now,
            give_up_at=now + limit if limit > 0 else None,
            notice_at=now if job.queue_notice_seconds > 0 else None,
        )
        self._look_at = self._order_at = 0.0

    def _turn_away(self, job: Job, reply: Reply, message: str, failure: Failure) -> None:
        """Refuse a request that has not begun."""
        reply.fail(message, failure)
        if self._journal is not None:
            prompt = len(job.request.prompt_ids)
            self._journal.ended(
                Ended("", job.request.request_id, failure, message, prompt_tokens=prompt)
            )

    def _tell(self, reply: Reply) -> None:
        """Answer a probe, which proves that this thread turns."""
        self._see()
        reply.send(Part(BlockEvent("", (), (), 0, 0, "length"), state=self._state))

    def _see(self) -> None:
        scheduler = self._scheduler
        self._state = State(scheduler.active, scheduler.waiting, self._turns, self._draining)

    def _look(self) -> None:
        """Cancel what took too long, and see who waits."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LIMIT_SECONDS
        self._see()
        if now >= self._order_at or not self._scheduler.waiting:
            self._order_at = now + ORDER_SECONDS
            self._look_at_those_who_wait(now)
        for one in self._open.values():
            if one.give_up_at is not None and now > one.give_up_at:
                limit = f"timeout_seconds, {one.job.timeout_seconds:g}"
                one.given_up = (
                    f"waited for a slot for all of {limit}; allow more, or try again later"
                    if one.admitted is None
                    else f"not finished within {limit}; allow more, or ask for fewer tokens"
                )
                self._scheduler.cancel(one.key)

    def _look_at_those_who_wait(self, now: float) -> None:
        """Tell those who asked to be told their place; note who has a slot."""
        names = self._scheduler.waiting_ids
        self._waiting = tuple(self._open[key] for key in names if key in self._open)
        keys = set(names)
        self._running = tuple(one for key, one in self._open.items() if key not in keys)
        for one in self._running:
            if one.admitted is None:
                one.admitted = now
        for place, one in enumerate(self._waiting, 1):
            if one.notice_at is not None and now >= one.notice_at:
                one.notice_at = now + max(one.job.queue_notice_seconds, LEAST_NOTICE_SECONDS)
                one.reply.send(Part(BlockEvent(one.key, (), (), 0, 0), queue_place=place))

    def _watch(self) -> None:
        """Cancel requests whose callers have left, asking a few of them at a time."""
        turn = itertools.count()
        while not self._stopped.wait(WATCH_SECONDS):
            number = next(turn)
            for ones in (self._running, self._waiting):
                count = min(len(ones), WATCHED_AT_ONCE)
                for place in range(number * count, (number + 1) * count):
                    one = ones[place % len(ones)]
                    if one.reply.is_cancelled():
                        self._inbox.put((Cancel(one.key), None))

    def _deliver(self, event: BlockEvent) -> None:
        """Send what a turn made of one request."""
        one = self._open[event.request_id]
        now = time.monotonic()
        if event.ids:
            if one.first_block is None:
                one.first_block = now
            elif self._journal is not None:
                self._journal.note("time_per_block_seconds", now - one.last_block)
            one.last_block = now
            one.tokens += len(event.ids)
        if event.is_last:
            del self._open[event.request_id]
        outcome, reason = str(event.finish_reason), ""
        if event.error is not None:
            failure: Failure = "failed" if event.retry_after is None else "busy"
            outcome, reason = failure, event.error
            one.reply.fail(reason, failure)
        elif event.finish_reason == "cancelled" and one.given_up is not None:
            outcome, reason = "late", one.given_up
            one.reply.fail(reason, "late")
        else:
            prompt = () if one.started else one.job.request.prompt_ids
            one.started = True
            one.reply.send(Part(event, tuple(one.sent), prompt))
            one.sent = [*one.sent, *event.ids][-PREVIOUS_IDS:]
        if event.is_last:
            self._note(one, outcome, reason, (event.denoiser_calls, event.context_calls))

    def _note(self, one: _Open, outcome: str, reason: str, calls: tuple[int, int] = (0, 0)) -> None:
        """Note the end of a request."""
        if self._journal is None:
            return

        def after(moment: float | None) -> float | None:
            return None if moment is None else moment - one.began

        prompt = len(one.job.request.prompt_ids)
        self._journal.ended(
            Ended(
                one.key,
                one.job.request.request_id,
                outcome,
                reason,
                prompt,
                one.tokens,
                *calls,
                queue_seconds=after(one.admitted or one.first_block),
                first_block_seconds=after(one.first_block),
                seconds=time.monotonic() - one.began,
            )
        )
        self._journal.note("prompt_tokens_total", prompt)
        self._journal.note("generation_tokens_total", one.tokens)

    def _end(self, message: str, later: str, failure: Failure) -> None:
        """Fail every request that is open or still in the inbox, and those that come later."""
        with self._lock:
            self._ended = later, failure
        replies: list[Reply | None] = [one.reply for one in self._open.values()]
        for one in self._open.values():
            self._note(one, failure, message)
        self._open.clear()
        while not self._inbox.empty():
            item = self._inbox.get()
            replies += [item[1]] if item is not None else []
        for reply in replies:
            if reply is not None:
                reply.fail(message, failure)
