"""Retries and several servers: when to send again, how long to wait before, and to whom.

Sending a request again is always safe: an answer changes nothing on a server, and the same seed
gives the same answer.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from twotower_client.core import ClientCore
from twotower_client.errors import (
    ClientError,
    InactivityError,
    ModelNotReadyError,
    RequestFailedError,
    RequestRefusedError,
    ServerBusyError,
    ServerUnavailableError,
)

TRANSIENT = (
    ServerUnavailableError,
    ModelNotReadyError,
    ServerBusyError,
    RequestFailedError,
    InactivityError,
)
"""Errors after which the same request may succeed, here or on another server."""
REST_SECONDS = 5.0  # without requests for a server that failed, while another is there


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a request is sent again after an error that may pass, and how long to wait.

    Waits grow twofold and are drawn at random from half to all of that, so that callers who failed
    together do not come back together.

    Attributes:
        attempts: Most times that a request is sent.
        first_seconds: Longest wait before the second time.
        most_seconds: Longest wait before any, unless a busy server asks for a longer one.

    Raises:
        RequestRefusedError: A value is no count or no duration.
    """

    attempts: int = 5
    first_seconds: float = 0.25
    most_seconds: float = 8.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.first_seconds <= self.most_seconds:
            raise RequestRefusedError(
                f"{self}: attempts must be at least 1, and 0 <= first_seconds <= most_seconds"
            )

    def waits(self) -> Iterator[float]:
        """Yield the seconds to wait after each attempt that may be followed by another."""
        wait = self.first_seconds
        for _ in range(self.attempts - 1):
            yield wait * random.uniform(0.5, 1.0)
            wait = min(2 * wait, self.most_seconds)


NO_RETRY = Retry(attempts=1)


def may_pass(problem: ClientError) -> bool:
    """Return whether the same request may succeed at another time or on another server."""
    return isinstance(problem, TRANSIENT)


Client = TypeVar("Client", bound=ClientCore)


class Servers(Generic[Client]):
    """Clients of several servers of the same model; any number of threads may choose among them.

    Args:
        clients: A client for each server, the preferred ones first.
    """

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = tuple(clients)
        if not self.clients:
            raise RequestRefusedError("there is no server; give at least one host:port")
        self._open = dict.fromkeys(range(len(self.clients)), 0)
        self._rests_until = dict.fromkeys(range(len(self.clients)), 0.0)
        self._lock = threading.Lock()

    def take(self) -> tuple[int, Client]:
        """Return the number and the client of the server to ask next, and count the request.

        It is the one with the fewest requests of ours, among those that have not failed just now;
        where all have, the one whose rest ends first.
        """
        with self._lock:
            now = time.monotonic()
            ready = [n for n, until in self._rests_until.items() if until <= now]
            if ready:
                number = min(ready, key=self._open.__getitem__)
            else:
                number = min(self._rests_until, key=self._rests_until.__getitem__)
            self._open[number] += 1
            return number, self.clients[number]

    def give_back(self, number: int, problem: ClientError | None) -> None:
        """Say how a request ended: with an error, or without."""
        with self._lock:
            self._open[number] -= 1
            if problem is None:
                self._rests_until[number] = 0.0
            elif may_pass(problem):
                rest = max(REST_SECONDS, problem.retry_after or 0.0)
                self._rests_until[number] = time.monotonic() + rest

    def wait(
        self, problem: ClientError, waits: Iterator[float], client: Client, timeout: float | None
    ) -> float | None:
        """Return the seconds to wait before a request is sent again; None where it is not.

        They are as many as a busy server asks for, where no other can be asked meanwhile, but no
        more than the request's timeout.

        Args:
            problem: The error that the request ended with.
            waits: Of `Retry.waits`.
            client: Client that sent it.
            timeout: The request's timeout; the client's where None.
        """
        wait = next(waits, None) if may_pass(problem) else None
        if wait is None or problem.retry_after is None:
            return wait
        with self._lock:
            now = time.monotonic()
            if any(until <= now for until in self._rests_until.values()):
                return wait
        return max(wait, min(problem.retry_after, client.timeout if timeout is None else timeout))
