"""Read responses of a server: blocks, and errors as exceptions."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

from twotower_client.connection import ACCESS_HEADER, proxy_of
from twotower_client.errors import (
    ClientError,
    DeadlineError,
    InactivityError,
    ModelNotReadyError,
    RequestCancelledError,
    RequestFailedError,
    RequestRefusedError,
    ServerBusyError,
    ServerUnavailableError,
)
from twotower_client.request import MODEL
from twotower_client.result import Block, Canvas, TokenDetail
from twotower_contract.options import FREE
from twotower_contract.statuses import STATUSES, Failure, retry_after

UNKNOWN_MODEL = "unknown model"  # also of a server that is shutting down
DEAD_PROCESS = "Stub process"  # "... is not healthy": a model's process died and stays dead

FAILURES: dict[Failure, type[ClientError]] = {
    "refused": RequestRefusedError,
    "late": DeadlineError,
    "failed": RequestFailedError,
}

# What HTTP statuses mean that a balancer or proxy gives a gRPC call: it answers without the server.
HTTP_STATUS = re.compile(r"status: (\d{3})")  # "Received http2 header with status: 502"
BALANCER: dict[str, tuple[type[ClientError], str]] = {
    "401": (
        RequestRefusedError,
        "asks for a key, and was given none or another; give it with metadata, or --metadata "
        "NAME=KEY on the command line",
    ),
    "413": (
        RequestRefusedError,
        "finds the request too large; shorten the prompt, or raise the balancer's limit (nginx: "
        "client_max_body_size)",
    ),
    "429": (ServerBusyError, "has too many requests already; try again later"),
    "502": (
        ServerUnavailableError,
        "reaches no server; try again, and look whether a Triton server runs behind it",
    ),
    "503": (ServerUnavailableError, "has no server to ask; try again later"),
    "504": (
        ServerUnavailableError,
        "has waited too long for the server; try again, or raise the balancer's timeout (nginx: "
        "grpc_read_timeout)",
    ),
}

FORMATS = {"INT32": "i", "FP32": "f"}  # of `struct`, by Triton's name


@dataclass(frozen=True, slots=True)
class Response:
    """One response of a stream, read.

    Attributes:
        block: The block in it.
        prompt_ids: The prompt as the server saw it; empty in all but the first block's response.
        queue_place: Place among the requests that wait for a slot, from 1; 0 where it has one.
        request_id: The server's name of the request; empty in all but the first response.
        reused_tokens: Tokens of the prompt that the server did not read again; 0 in all but the
            first block's response.
        canvas: The block as it is, where this response holds no finished one.
    """

    block: Block
    prompt_ids: tuple[int, ...]
    queue_place: int
    request_id: str
    reused_tokens: int
    canvas: Canvas | None = None


def read(response: Any, seconds: float) -> Response:
    """Read one response of a stream, which holds outputs and came so long after the request.

    Outputs that have nothing to say are left out of a response.
    """
    outputs = {
        output.name: _values(output.datatype, content)
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }

    def values(name: str) -> tuple[Any, ...]:
        return outputs.get(name, ())

    def number(name: str) -> int:
        return int(next(iter(values(name)), 0))

    def text(name: str) -> str:
        return str(next(iter(values(name)), ""))

    texts = values("token_texts")
    return Response(
        Block(
            text=text("text_output"),
            ids=values("output_ids"),
            masked_counts=values("masked_counts"),
            denoiser_calls=number("denoiser_calls"),
            context_calls=number("context_calls"),
            finish_reason=text("finish_reason") or None,
            seconds=seconds,
            details=_details(
                texts, values("logprobs"), values("commit_steps"), values("top_ids"),
                values("top_logprobs"),
            ),
        ),
        prompt_ids=values("prompt_ids"),
        queue_place=number("queue_place"),
        request_id=text("request_id"),
        reused_tokens=number("reused_tokens"),
        canvas=_canvas(values("canvas_ids"), texts, values("canvas_confidence")),
    )  # fmt: skip


def _values(datatype: str, content: bytes) -> tuple[Any, ...]:
    """Return what a tensor holds; texts come with their length before each, as 4 bytes."""
    if datatype in FORMATS:
        return struct.unpack(f"<{len(content) // 4}{FORMATS[datatype]}", content)
    texts, start = [], 0
    while start < len(content):
        (size,) = struct.unpack_from("<I", content, start)
        texts.append(content[start + 4 : start + 4 + size].decode())
        start += 4 + size
    return tuple(texts)


def _details(
    texts: tuple[str, ...],
    logprobs: tuple[float, ...],
    calls: tuple[int, ...],
    top_ids: tuple[int, ...],
    top_logprobs: tuple[float, ...],
) -> tuple[TokenDetail, ...]:
    """Put together what is told of each token."""
    count = len(logprobs)
    if not count:
        return ()
    each = len(top_ids) // count
    pairs = list(zip(top_ids, top_logprobs, strict=True))
    tops = [tuple(pairs[place * each : (place + 1) * each]) for place in range(count)]
    told = zip(texts or ("",) * count, logprobs, calls, tops, strict=True)
    return tuple(TokenDetail(*one) for one in told)


def _canvas(
    ids: tuple[int, ...], texts: tuple[str, ...], confidence: tuple[float, ...]
) -> Canvas | None:
    if not ids:
        return None
    texts = texts or tuple("" if token == FREE else f"{token} " for token in ids)
    return Canvas(ids, texts, confidence)


def error_of(message: str) -> ClientError | None:
    """Return the exception that a model's error message stands for; None for Triton's own."""
    for failure, status in STATUSES.items():
        if message.startswith(f"{status}: "):
            words = message.partition(": ")[2]
            if failure == "refused":
                return RequestRefusedError(words)
            words = f"the server says: {words}"
            if failure == "busy":
                return ServerBusyError(words, retry_after(words))
            return FAILURES[failure](words)
    if DEAD_PROCESS in message:
        return ServerUnavailableError(
            f"a model's process on the server has died ({message}); try again when the server has "
            "started it again"
        )
    return None


def error_of_rpc(problem: Any, url: str, started: bool) -> ClientError:
    """Return the exception that a failed call stands for.

    Args:
        started: Whether a part of the answer had arrived.
    """
    import grpc

    code, details = problem.code(), problem.details()
    if details and ACCESS_HEADER in details:
        return RequestRefusedError(
            f"the server at {url} asks for an access key, and was given none or another; give the "
            "right one with access_key, or --key-file on the command line"
        )
    status = HTTP_STATUS.search(details or "")
    if status is not None and status[1] in BALANCER:
        kind, words = BALANCER[status[1]]
        return kind(f"the balancer at {url} (HTTP status {status[1]}) {words}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError("the answer was not complete within the timeout; allow more time")
    if code is grpc.StatusCode.CANCELLED and not started:  # by nobody here: see `core`
        return ServerUnavailableError(
            f"the server at {url}, or a balancer before it, ended the call ({details}); try again"
        )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) and started:
        return RequestFailedError(
            f"the connection to {url} broke in the middle of the answer ({details}); "
            "the server may have ended; send the request again"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerUnavailableError(
            f"no Triton server answers at {url} ({details}){_by_proxy(url)}; start one with "
            "`twotower serve REPO`, or name its gRPC port (8001 by default, not the HTTP port) "
            "with --url HOST:PORT"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ServerUnavailableError(
            f"the program at {url} is no Triton server ({details}); name the gRPC port of a server"
        )
    return RequestFailedError(f"the server answered with {code.name}: {details}")


def error_of_readiness(problem: Any, url: str) -> ClientError:
    """Return the exception that a failed look at the readiness stands for."""
    import grpc

    if problem.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServerUnavailableError(
            f"{url} did not answer in time{_by_proxy(url)}; is the address right, and is a "
            "firewall in the way?"
        )
    if problem.code() is grpc.StatusCode.NOT_FOUND:
        return not_ready(url, f" ({problem.details()})")
    return error_of_rpc(problem, url, started=False)


def _by_proxy(url: str) -> str:
    """Return what to say of a proxy that stands between a client and its server."""
    proxy, host = proxy_of(url), url.rpartition(":")[0]
    if proxy is None:
        return ""
    return f"; it was asked through the proxy {proxy}: add {host} to no_proxy to ask it directly"


def too_late(
    timeout: float, left: float, inactivity_timeout: float, blocks: int, queue_place: int = 0
) -> ClientError:
    """Return the exception for a wait in which nothing came.

    Args:
        timeout: Seconds that the whole answer may take.
        left: Seconds that were left of them when the wait began.
        inactivity_timeout: Seconds that may pass without anything new.
        blocks: Number of blocks that had arrived.
        queue_place: Place in the queue that the server told last; 0 for none.
    """
    if left <= inactivity_timeout and queue_place:
        return DeadlineError(
            f"the answer had not begun after {timeout:g} s: the request still waited for a slot, "
            f"at place {queue_place}, when the server spoke last; allow more with timeout, or try "
            "again later"
        )
    arrived = "1 block had arrived" if blocks == 1 else f"{blocks} blocks had arrived"
    if left <= inactivity_timeout:
        return DeadlineError(
            f"the answer was not complete after {timeout:g} s ({arrived}); "
            "allow more with timeout, or ask for fewer tokens"
        )
    return InactivityError(
        f"nothing came from the server for {inactivity_timeout:g} s ({arrived}); "
        "it may be overloaded, or its model process may have died: look at its log"
    )


def cancelled() -> RequestCancelledError:
    """Return the exception for an answer that its caller stopped."""
    return RequestCancelledError("the request was cancelled before its answer was complete")


def unexplained(message: str, url: str) -> ClientError:
    """Return the exception for an error message of Triton's own."""
    if UNKNOWN_MODEL in message:
        return not_ready(url, f" ({message})")
    return RequestFailedError(f"the server answered with an error: {message}")


def not_ready(url: str, details: str) -> ModelNotReadyError:
    """Return the exception for a server that does not serve the model."""
    return ModelNotReadyError(
        f"the server at {url} runs, but its model `{MODEL}` is not ready{details}; try again "
        "when it is loaded or was restarted, or check that this server was given a repository of "
        "`twotower package`"
    )
