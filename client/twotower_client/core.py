"""The core of both clients, without input or output: settings, messages, deadlines, and refusals.

A client adds only how it calls and how it waits: `client.py` with threads, `aio.py` with asyncio.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from twotower_client.connection import channel_options, check_address, check_seconds, closed
from twotower_client.errors import (
    ClientError,
    DeadlineError,
    RequestCancelledError,
    RequestFailedError,
)
from twotower_client.request import MODEL, infer_request
from twotower_client.response import (
    block_of,
    error_of,
    error_of_rpc,
    prompt_ids_of,
    too_late,
)
from twotower_client.result import Answer, Block
from twotower_contract.options import Options

READY_REQUEST = service_pb2.ModelReadyRequest(name=MODEL)


class ClientCore:
    """Settings and channel of a client."""

    _channels: Any = grpc  # the module that opens channels

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        timeout: float = 300.0,
        inactivity_timeout: float = 60.0,
        credentials: Any | None = None,
    ) -> None:
        self.url = check_address(url)
        self.timeout = check_seconds("timeout", timeout)
        self.inactivity_timeout = check_seconds("inactivity_timeout", inactivity_timeout)
        self._channel = (
            self._channels.insecure_channel(url, options=channel_options(url))
            if credentials is None
            else self._channels.secure_channel(url, credentials, options=channel_options(url))
        )
        self._is_closed = False
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed()

    def _request(
        self,
        prompt: str | None,
        prompt_ids: Sequence[int] | None,
        timeout: float | None,
        options: Options,
    ) -> tuple[Any, float]:
        """Return the message of a request, checked, and its timeout in seconds."""
        limit = self.timeout if timeout is None else check_seconds("timeout", timeout)
        return infer_request(prompt, prompt_ids, options, uuid.uuid4().hex, limit), limit


class StreamCore:
    """One answer as far as it has arrived, and the reason why it ended."""

    def __init__(self, client: ClientCore, request: Any, timeout: float) -> None:
        self.request_id: str = request.id
        self.prompt_ids: tuple[int, ...] = ()
        self.blocks: list[Block] = []
        self._url = client.url
        self._inactivity_timeout = client.inactivity_timeout
        self._timeout = timeout
        self._left = timeout
        self._began = time.monotonic()
        self._ended: ClientError | None = None

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete."""
        return bool(self.blocks) and self.blocks[-1].finish_reason is not None

    def _goes_on(self) -> bool:
        """Return whether more is to come; raise the reason where the answer ended early."""
        if self._ended is not None:
            raise self._ended
        return not self.is_done

    def _patience(self) -> float:
        """Return how many seconds to wait for the next message."""
        self._left = self._timeout - (time.monotonic() - self._began)
        return max(0.0, min(self._left, self._inactivity_timeout))

    def _too_late(self) -> ClientError:
        """Return the exception for a wait in which nothing came."""
        return too_late(self._timeout, self._left, self._inactivity_timeout, len(self.blocks))

    def _is_unexplained(self, item: Any) -> bool:
        """Return whether Triton itself refused the request: the model may not be ready."""
        message = getattr(item, "error_message", "")
        is_first = not self.blocks and self._ended is None
        return is_first and bool(message) and error_of(message) is None

    def _take(self, item: Any) -> Block | None:
        """Keep the block that an item of the stream holds; None for an empty response.

        Args:
            item: A response, the `grpc.RpcError` that ended the call, or None for its plain end.

        Raises:
            ClientError: The answer ends here without being complete.
        """
        if self._ended is not None:  # cancelled while we waited
            raise self._ended
        if item is None:
            raise RequestFailedError(
                "the server ended the answer without saying why; its log may tell"
            )
        if isinstance(item, grpc.RpcError):
            raise error_of_rpc(item, self._url, started=bool(self.blocks))
        if item.error_message:
            raise error_of(item.error_message) or RequestFailedError(
                f"the server answered with an error: {item.error_message}"
            )
        if not item.infer_response.outputs:
            return None
        self.prompt_ids = self.prompt_ids or prompt_ids_of(item.infer_response)
        block = block_of(item.infer_response, time.monotonic() - self._began)
        self.blocks.append(block)
        return block

    def _answer(self) -> Answer:
        """Put the blocks together once the answer is complete."""
        last = self.blocks[-1]
        return Answer(
            text="".join(block.text for block in self.blocks),
            prompt_ids=self.prompt_ids,
            ids=tuple(token for block in self.blocks for token in block.ids),
            blocks=tuple(self.blocks),
            finish_reason=last.finish_reason or "",
            denoiser_calls=last.denoiser_calls,
            context_calls=last.context_calls,
            seconds=last.seconds,
            request_id=self.request_id,
        )


def needs_stop(problem: ClientError) -> bool:
    """Return whether the server may still work on a request that ended so."""
    return isinstance(problem, RequestCancelledError | DeadlineError)
