"""Kinds of failure and their names on the wire, as both ends of it use them."""

from __future__ import annotations

from typing import Final, Literal

Failure = Literal["refused", "busy", "late", "failed"]
"""Why there is no (more) answer: the request must change; the same may work later; the time that
was allowed is over; something broke."""

STATUSES: Final[dict[Failure, str]] = {
    "refused": "INVALID_ARGUMENT",
    "busy": "UNAVAILABLE",
    "late": "DEADLINE_EXCEEDED",
    "failed": "INTERNAL",
}
"""Names of gRPC's codes. A stream of Triton's carries the text of an error and not its code (with
the header `triton_grpc_error` it would, but server 2.51 ends with a segmentation fault when several
such streams fail at once). So the text begins with the name and a colon."""


def text_of(failure: Failure, message: str) -> str:
    """Return the text of an error."""
    return f"{STATUSES[failure]}: {message}"
