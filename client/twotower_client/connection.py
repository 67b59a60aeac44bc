"""Constants and checks of a connection: addresses, durations, and the options of a channel."""

from __future__ import annotations

import ipaddress
import numbers
import os
import re
from collections.abc import Mapping

from twotower_client.errors import RequestRefusedError

# In gRPC's order. It knows none of the variables in capitals.
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
SPARING_VARIABLES = ("no_grpc_proxy", "no_proxy")
# A connection that was dropped without a word, as idle ones are by balancers, is noticed during a
# call: after 30 s of silence the server is asked whether it is there, and has 20 s to answer.
# (Newer gRPC goes by the last option, which is 60 s by default.)
KEEP_ALIVE = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
]
LOOK_SECONDS = 5.0  # for calls that only look
STOP_SECONDS = 2.0  # for telling a server to stop; it may be the one that hangs
# Where Triton looks for the key of the part of its protocol that `serve --key-file` restricts.
ACCESS_HEADER = "triton-grpc-protocol-twotower-access"
HEADER_NAME = re.compile(r"(?!grpc-)[0-9a-z_.-]+(?<!-bin)")  # with values of text
RETRY_SECONDS = 0.2  # between two looks at a server that is not ready
GRACE_SECONDS = 2.0  # for a call to end by itself
# The same, before a connection is closed: by then a server that hangs was started anew, which
# breaks the connection. Whoever was interrupted waits less.
END_SECONDS = 5.0
HURRIED_SECONDS = 0.5
MOST_SECONDS = 1e9  # 30 years; threads and gRPC can wait a little longer
MOST_PORT = 65535


def check_address(url: str) -> str:
    """Return `host:port` as it is.

    Raises:
        RequestRefusedError: The address is no `host:port`.
    """
    host, _, port = url.rpartition(":") if isinstance(url, str) else ("", "", "")
    is_port = port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= MOST_PORT
    if not host or "://" in host or not is_port:
        raise RequestRefusedError(
            f"url is {url!r}; give host:port of the gRPC endpoint, as localhost:8001 "
            f"(ports go from 1 to {MOST_PORT})"
        )
    return url


def channel_options(url: str) -> list[tuple[str, int]]:
    """Return the options of a channel: no limit on messages, and no proxy for this machine."""
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return [*unlimited, ("grpc.enable_http_proxy", int(not _is_loopback(url)))]


def proxy_of(url: str) -> str | None:
    """Return the variable and the address of the proxy that gRPC asks for a server, or None.

    A password in the address is left out.
    """
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    host = url.rpartition(":")[0]
    spared = next(filter(None, map(os.environ.get, SPARING_VARIABLES)), "")
    if _is_loopback(url) or proxy_bypass_environment(host, {"no": spared}):
        return None
    given = ((name, os.environ.get(name)) for name in PROXY_VARIABLES)
    found = next(((name, value) for name, value in given if value), None)
    return found and f"{found[0]}={re.sub(r'//[^/]*@', '//', found[1])}"


def _is_loopback(url: str) -> bool:
    """Whether `host:port` is this machine, whatever its name is looked up as."""
    host = url.rpartition(":")[0].strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_seconds(name: str, value: float) -> float:
    """Return a duration as it is.

    Raises:
        RequestRefusedError: The value is no number, not positive, or too long to wait for.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < MOST_SECONDS:
        raise RequestRefusedError(
            f"{name} is {value!r}; it must be a number of seconds, more than 0 and "
            f"below {MOST_SECONDS:.0e}"
        )
    return float(value)


def check_metadata(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return headers as gRPC takes them, with their names in lower case.

    Raises:
        RequestRefusedError: gRPC could not send one of them.
    """
    headers = [(name.lower(), value) for name, value in metadata.items()]
    for name, value in headers:
        if not HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()):
            raise RequestRefusedError(
                f"metadata {name!r} cannot be sent; names consist of letters, digits, '-', '_' and "
                "'.', and do not begin with grpc- or end with -bin; values are printable ASCII"
            )
    return headers


def closed() -> RequestRefusedError:
    """Return the exception for a call of a client that was closed."""
    return RequestRefusedError(
        "the client was closed; make a new one, and close it after this call"
    )
