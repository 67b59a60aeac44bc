"""How a model tells a client that there will be no (more) answer.

Triton's error codes do not reach the client of a stream: it gets a message alone, with the name of
the ensemble in front. (With the header `triton_grpc_error` codes would come, but server 2.51 ends
with a segmentation fault when several such streams fail at once.) So each message begins with one
of a few fixed phrases, which a person can read and a client can tell apart.
"""

from __future__ import annotations

from typing import Any, Literal

__all__ = ["PHRASES", "Failure", "triton_error"]

Failure = Literal["refused", "busy", "late", "failed"]

PHRASES: dict[Failure, str] = {
    "refused": "request refused: ",  # the request must change
    "busy": "server busy: ",  # the same request may work later
    "late": "request timed out: ",  # the time that the client allowed is over
    "failed": "request failed: ",  # something broke
}

CODES: dict[Failure, str] = {
    "refused": "INVALID_ARG",
    "busy": "UNAVAILABLE",
    "late": "CANCELLED",
    "failed": "INTERNAL",
}


def triton_error(triton: Any, message: str, failure: Failure) -> Any:
    """Return a response that holds an error.

    Args:
        triton: The module `triton_python_backend_utils`.
        message: For a client to read.
        failure: What kind it is.
    """
    code = getattr(triton.TritonError, CODES[failure], triton.TritonError.INTERNAL)
    error = triton.TritonError(f"{PHRASES[failure]}{message}", code)
    return triton.InferenceResponse(error=error)
