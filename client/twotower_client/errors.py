"""Errors of the client, each with a sentence that says what to do.

All derive from `ClientError`. The command line prints the message without a traceback and exits
with `exit_code`: 2 where the request or the address must change, 1 where the same call may work
later.
"""

from __future__ import annotations

from twotower_contract.errors import TwoTowerError


class ClientError(TwoTowerError):
    """Base of everything that a client raises on purpose.

    Attributes:
        retry_after: Seconds after which to try again, where a busy server says so; else None.
    """

    retry_after: float | None = None


class ServerUnavailableError(ClientError):
    """No server answers at the address, or the connection broke before an answer began."""

    exit_code = 1


class ModelNotReadyError(ClientError):
    """The server answers, but does not serve the model (yet, or under this name)."""

    exit_code = 1


class RequestRefusedError(ClientError):
    """The request is wrong, as the client or the server found; nothing was generated."""


class ServerBusyError(ClientError):
    """Too many requests wait already. The same one may work after `retry_after` seconds.

    Args:
        message: What the server says.
        retry_after: Seconds, or None where it names no time.
    """

    exit_code = 1

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailedError(ClientError):
    """The server gave up in the middle of an answer. No more of it will come."""

    exit_code = 1


class DeadlineError(ClientError):
    """The answer was not complete in the time that the caller allowed."""

    exit_code = 1


class InactivityError(DeadlineError):
    """Nothing came for too long between two parts of an answer.

    A model process that was killed gives neither data nor an error, and its server still reports
    it as ready; waiting is the only way to notice.
    """


class RequestCancelledError(ClientError):
    """The request was stopped by its caller before the answer was complete."""

    exit_code = 1
