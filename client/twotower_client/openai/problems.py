"""Errors in OpenAI's form, each with the HTTP status that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any

from twotower_client.errors import (
    ClientError,
    DeadlineError,
    ModelNotReadyError,
    RequestFailedError,
    RequestRefusedError,
    ServerBusyError,
    ServerUnavailableError,
)

BAD_REQUEST = "invalid_request_error"
STATUSES: dict[type[ClientError], tuple[int, str]] = {
    RequestRefusedError: (400, BAD_REQUEST),
    ServerBusyError: (429, "rate_limit_error"),
    ServerUnavailableError: (503, "server_error"),
    ModelNotReadyError: (503, "server_error"),
    DeadlineError: (504, "timeout_error"),
    RequestFailedError: (500, "server_error"),
}
"""Statuses from 500 on and 429 are those after which OpenAI's clients send again by themselves."""


class ApiError(Exception):
    """A request that ends with an error.

    Attributes:
        status: HTTP status.
        message: Text that says what to do.
        kind: OpenAI's type of the error.
        param: Field of the request that is wrong; None where it is no field.
        code: OpenAI's code, where there is one.
        retry_after: Seconds after which to try again, where the server says so.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        values = {"message": self.message, "type": self.kind}
        return {"error": {**values, "param": self.param, "code": self.code}}


def refused(param: str, why: str) -> ApiError:
    """Return the error for a field that is wrong."""
    return ApiError(400, f"{param} {why}", param=param)


def error_of(problem: ClientError) -> ApiError:
    """Return the error that an error of the client becomes."""
    for kind in type(problem).__mro__:
        if kind in STATUSES:
            status, name = STATUSES[kind]
            return ApiError(status, str(problem), name, retry_after=problem.retry_after)
    return ApiError(500, str(problem), "server_error")
