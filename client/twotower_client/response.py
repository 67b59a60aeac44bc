"""Reads responses of a server: blocks, and errors as exceptions."""

from __future__ import annotations

from typing import Any, Literal

from twotower_client.connection import proxy_of
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
from twotower_client.result import Block

REFUSED = "request refused: "  # how our refusals begin; Triton puts the ensemble's name before
DEAD_PROCESS = "Stub process"  # "... is not healthy": a model's process died and stays dead

# Finish reasons of an answer that is not complete.
FAILURES: dict[str, type[ClientError]] = {
    "refused": RequestRefusedError,
    "busy": ServerBusyError,
    "late": DeadlineError,
    "failed": RequestFailedError,
}

Tensor = Literal["output_ids", "prompt_ids", "masked_counts", "denoiser_calls", "context_calls"]


def block_of(response: Any, seconds: float) -> Block:
    """Read one response of a stream, which holds outputs and came so long after the request.

    Raises:
        ClientError: The server says that the answer ends here without being complete.
    """
    from tritonclient.grpc import InferResult

    result = InferResult(response)
    reason = _text(result, "finish_reason")
    if reason in FAILURES:
        raise FAILURES[reason](f"the server says: {_text(result, 'error')}")
    return Block(
        text=_text(result, "text_output"),
        ids=_integers(result, "output_ids"),
        masked_counts=_integers(result, "masked_counts"),
        denoiser_calls=_integers(result, "denoiser_calls")[0],
        context_calls=_integers(result, "context_calls")[0],
        finish_reason=reason or None,
        seconds=seconds,
    )


def prompt_ids_of(response: Any) -> tuple[int, ...]:
    """Return the prompt as the server saw it; empty in all but the first response."""
    from tritonclient.grpc import InferResult

    return _integers(InferResult(response), "prompt_ids")


def error_of(message: str) -> ClientError | None:
    """Return the exception that a model's error message stands for; None for Triton's own."""
    text = message.removeprefix(f"in ensemble '{MODEL}', ")
    if text.startswith(REFUSED):
        return RequestRefusedError(text.removeprefix(REFUSED))
    if DEAD_PROCESS in text:
        return RequestFailedError(
            f"a model's process on the server has died and does not come back ({text}); "
            "restart the server"
        )
    return None


def error_of_rpc(problem: Any, url: str, started: bool) -> ClientError:
    """Return the exception that a failed call stands for.

    Args:
        started: Whether a part of the answer had arrived.
    """
    import grpc

    code, details = problem.code(), problem.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError("the answer was not complete within the timeout; allow more time")
    if code is grpc.StatusCode.CANCELLED:
        return cancelled()
    if code is grpc.StatusCode.UNAVAILABLE and started:
        return RequestFailedError(
            f"the connection to {url} broke in the middle of the answer ({details}); "
            "the server may have ended"
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


def too_late(timeout: float, left: float, inactivity_timeout: float, blocks: int) -> ClientError:
    """Return the exception for a wait in which nothing came.

    Args:
        timeout: Seconds that the whole answer may take.
        left: Seconds that were left of them when the wait began.
        inactivity_timeout: Seconds that may pass without anything new.
        blocks: Number of blocks that had arrived.
    """
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


def not_ready(url: str, details: str) -> ModelNotReadyError:
    """Return the exception for a server that does not serve the model."""
    return ModelNotReadyError(
        f"the server at {url} runs, but its model `{MODEL}` is not ready{details}; wait until it "
        "is loaded, or check that this server was given a repository of `twotower package`"
    )


def _integers(result: Any, name: Tensor) -> tuple[int, ...]:
    return tuple(result.as_numpy(name).tolist())


def _text(result: Any, name: Literal["finish_reason", "error", "text_output"]) -> str:
    content: bytes = result.as_numpy(name)[0]
    return content.decode()
