"""Replies that keep what the engine's loop tells them, and jobs to tell it."""

from __future__ import annotations

import threading

from twotower_engines.generation.request import Request
from twotower_engines.serving.wire import Job

SECONDS = 60  # for what comes at once


class Answer:
    """A reply that keeps what it is told."""

    def __init__(self) -> None:
        self.parts, self.failures, self.cancelled = [], [], False
        self.ended, self.begun = threading.Event(), threading.Event()

    def send(self, part) -> None:
        assert not self.ended.is_set(), "nothing may follow the end"
        self.parts.append(part)
        self.begun.set()
        if part.event.is_last:
            self.ended.set()

    def fail(self, message, failure) -> None:
        assert not self.ended.is_set(), "nothing may follow the end"
        self.failures.append((failure, message))
        self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    @property
    def key(self) -> str:
        """The loop's name of the request, which has begun or waits with a notice."""
        assert self.begun.wait(SECONDS), "no part came"
        return self.parts[0].event.request_id

    def wait(self) -> Answer:
        assert self.ended.wait(SECONDS), "no end came"
        return self


def job(*prompt: int, name: str = "a", timeout: float = 0.0, **options) -> Job:
    options.setdefault("max_new_tokens", 4)
    return Job(Request(name, prompt or (5,), **options), timeout)
