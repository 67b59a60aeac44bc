"""Kinds of failure and their names on the wire, as both ends of it use them."""

from __future__ import annotations

import math
import re
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


_AGAIN = re.compile(r"try again in (\d+\.\d) s")


def try_again(seconds: float) -> str:
    """Return the words with which an error says how long to wait; its text is all that travels."""
    return f"try again in {seconds:.1f} s"


def retry_after(message: str) -> float | None:
    """Return the seconds that `try_again` wrote into an error's text; None where it says none."""
    said = _AGAIN.search(message)
    return float(said[1]) if said else None


def retry_header(seconds: float | None) -> str:
    """Return the value of HTTP's `Retry-After`: whole seconds, and 1 where no time is known."""
    return str(max(1, math.ceil(seconds or 0)))


def text_of(failure: Failure, message: str) -> str:
    """Return the text of an error."""
    return f"{STATUSES[failure]}: {message}"
