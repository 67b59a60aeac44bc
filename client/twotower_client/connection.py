"""What both clients agree on: addresses, durations, and the options of a channel."""

from __future__ import annotations

import threading

from .errors import RequestRefusedError

__all__ = [
    "CHANNEL_OPTIONS",
    "GRACE_SECONDS",
    "LOOK_SECONDS",
    "STOP_SECONDS",
    "check_address",
    "check_seconds",
]

CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
LOOK_SECONDS = 5.0  # for calls that only look
STOP_SECONDS = 2.0  # for telling a server to stop; it may be the one that hangs
GRACE_SECONDS = 2.0  # for a call to end by itself


def check_address(url: str) -> str:
    """Return `host:port` as it is.

    Raises:
        RequestRefusedError: It is something else.
    """
    if "://" in url or not url.rpartition(":")[2].isdigit():
        raise RequestRefusedError(
            f"url is {url!r}; give host:port of the gRPC endpoint, as localhost:8001"
        )
    return url


def check_seconds(name: str, value: float) -> float:
    """Return a duration as it is.

    Raises:
        RequestRefusedError: It is not positive, or too long to wait for.
    """
    if not 0 < value < threading.TIMEOUT_MAX:
        raise RequestRefusedError(f"{name} is {value}; it must be a positive number of seconds")
    return float(value)
