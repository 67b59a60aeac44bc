"""Threads that read requests: beside the engine's, which so never waits for a tokenizer.

A long text takes many times as long as a short one, so long ones have a thread of their own. What
is too large for the engines is refused before it is queued, and what waits is bounded by number and
by bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from twotower_contract.errors import TwoTowerError
from twotower_contract.statuses import Failure, try_again
from twotower_engines.serving.journal import Ended, Journal
from twotower_engines.serving.loop import EngineLoop, Reply
from twotower_engines.serving.preprocessing import Preprocessor, Tensors, bytes_of
from twotower_engines.serving.wire import Probe, decode, encode
from twotower_engines.serving.workers import Worker

LONG_TEXT = 8192  # bytes: some milliseconds
MOST_BYTES = 1 << 27  # of requests that wait for one of the threads


class Reader:
    """Reads requests and hands them to the engine's thread.

    Args:
        preprocessor: Checks and translates them.
        loop: Takes what was read.
        most_unread: Requests that may wait for each of the two threads.
        journal: Takes notes of those that are turned away; None for nobody.
        on_death: Called where a thread dies.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        loop: EngineLoop,
        most_unread: int,
        journal: Journal | None,
        on_death: Callable[[], None],
    ) -> None:
        self._preprocessor, self._loop, self._journal = preprocessor, loop, journal
        self._most_unread = most_unread
        self._workers = {is_long: Worker("reading", on_death) for is_long in (False, True)}
        self._bytes = dict.fromkeys(self._workers, 0)  # unread, under `_guard`
        self._guard = threading.Lock()

    def put(self, tensors: Tensors, name: str, parameters: Collection[str], reply: Reply) -> None:
        """Take a request, and return at once; the reply hears.

        Args:
            tensors: Its inputs: the step `preprocessing` has read those of `request`.
            name: The caller's name of it, for the log.
            parameters: Names that came beside the inputs.
            reply: Receives the answer.
        """
        try:
            self._preprocessor.check_sizes(tensors)
        except TwoTowerError as problem:
            self._turn_away(name, reply, str(problem), "refused")
            return
        if _is_probe(tensors) and not parameters:
            self._loop.put(Probe(), reply)  # it asks for the engine's thread, and not for these
            return
        is_long = bytes_of(tensors, "text_input") > LONG_TEXT
        worker, size = self._workers[is_long], sum(bytes_of(tensors, one) for one in tensors)
        count, unread = worker.waiting, self._bytes[is_long]
        if count < self._most_unread and unread + size <= max(MOST_BYTES, size):
            self._count(is_long, size)
            worker.put(partial(self._take, is_long, size, tensors, name, parameters, reply))
        else:
            after = try_again(self._loop.retry_after(count))
            message = f"{count} requests of {unread} bytes wait to be read; {after}"
            self._turn_away(name, reply, message, "busy")

    def close(self) -> None:
        """Read what is queued, and end the threads."""
        for worker in self._workers.values():
            worker.close()

    def _count(self, is_long: bool, size: int) -> None:
        with self._guard:
            self._bytes[is_long] += size

    def _take(self, is_long: bool, size: int, *request: Any) -> None:
        """Read a request, after which it is unread no more."""
        self._read(*request)
        self._count(is_long, -size)

    def _read(self, tensors: Tensors, name: str, parameters: Collection[str], reply: Reply) -> None:
        try:
            message = (
                decode(bytes(tensors["request"][0]))
                if "request" in tensors
                else self._preprocessor.message(tensors, name, parameters)
            )
        except TwoTowerError as problem:
            self._turn_away(name, reply, str(problem), "refused")
        else:
            self._loop.put(message, reply)

    def _turn_away(self, name: str, reply: Reply, message: str, failure: Failure) -> None:
        reply.fail(message, failure)
        if self._journal is not None:
            self._journal.ended(Ended("", name, failure, message))


def _is_probe(tensors: Tensors) -> bool:
    """Whether a request asks for the engine's state, directly or through the ensemble."""
    if tensors.keys() == {"request"}:
        return bool(tensors["request"].tolist() == [encode(Probe())])
    return tensors.keys() == {"probe"}
