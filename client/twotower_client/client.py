"""The client: asks a served model for an answer, whole or block by block.

Speaks gRPC, through the messages that tritonclient carries. Any number of threads may use one
client at the same time.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from twotower_client.connection import (
    GRACE_SECONDS,
    LOOK_SECONDS,
    STOP_SECONDS,
    channel_options,
    check_address,
    check_seconds,
    closed,
)
from twotower_client.errors import (
    CancelledError,
    ClientError,
    DeadlineError,
    ModelNotReadyError,
    ServerUnavailableError,
)
from twotower_client.request import MODEL, Options, infer_request, stop_request
from twotower_client.response import (
    answer_of,
    block_of,
    cancelled,
    ended_early,
    error_of,
    error_of_readiness,
    error_of_rpc,
    not_ready,
    prompt_ids_of,
    too_late,
    unexplained,
)
from twotower_client.result import Answer, Block

__all__ = ["AnswerStream", "TwoTowerClient"]


class TwoTowerClient:
    """A connection to a Triton server that serves a TwoTower model.

    Args:
        url: `host:port` of the server's gRPC endpoint.
        timeout: Seconds that a whole answer may take, where a call does not say otherwise. The
            server is told, and gives the request up by itself after that.
        inactivity_timeout: Seconds that may pass without anything new. A server whose model process
            was killed sends neither data nor an error.
        credentials: For TLS, from `grpc.ssl_channel_credentials`; None for no encryption.

    Raises:
        RequestRefusedError: `url` is no `host:port`, or a timeout is not positive.
    """

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
            grpc.insecure_channel(url, options=channel_options(url))
            if credentials is None
            else grpc.secure_channel(url, credentials, options=channel_options(url))
        )
        self._is_closed = False
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Return a whole answer.

        Args:
            prompt: Text to continue; or
            prompt_ids: token ids to continue.
            timeout: Seconds for the whole answer; the client's, where not given.
            **options: How to generate; see `Options`.

        Raises:
            ClientError: One of its subclasses; each says what to do.
        """
        with self.stream(prompt, prompt_ids=prompt_ids, timeout=timeout, **options) as stream:
            return stream.answer()

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AnswerStream:
        """Return an iterator over the blocks of an answer, each as soon as it is committed.

        Use it in a `with` statement, or exhaust it: leaving early tells the server to stop.

        Args:
            prompt: As for `generate`, like all the rest.
            prompt_ids: Token ids.
            timeout: In seconds.
            **options: How to generate.

        Raises:
            RequestRefusedError: At once, where no server could do this. All other errors come from
                iterating.
        """
        limit = self.timeout if timeout is None else check_seconds("timeout", timeout)
        request_id = uuid.uuid4().hex
        request = infer_request(prompt, prompt_ids, options, request_id, limit)
        return AnswerStream(self, request, limit)

    def stop(self, request_id: str) -> bool:
        """Tell the server to stop a request.

        Cancelling the call is not enough: it does not reach the steps of an ensemble.

        Returns:
            Whether the server took note. One that did not gives the request up after its timeout.
        """
        try:
            for response in self._start(stop_request(request_id), STOP_SECONDS):
                if response.error_message:
                    return False
        except (grpc.RpcError, ClientError):  # the latter where this client was closed
            return False
        return True

    def check_ready(self) -> None:
        """Return if the model is ready.

        Raises:
            ServerUnavailableError: No server answers.
            ModelNotReadyError: The server does not serve the model.
            RequestRefusedError: This client was closed.
        """
        self._check_open()
        try:
            request = service_pb2.ModelReadyRequest(name=MODEL)
            ready = self._stub.ModelReady(request, timeout=LOOK_SECONDS).ready
        except grpc.RpcError as problem:
            raise error_of_readiness(problem, self.url) from None
        if not ready:
            raise not_ready(self.url, "")

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Wait until the model is ready.

        Raises:
            ServerUnavailableError: No server answered for that long.
            ModelNotReadyError: The server did not serve the model for that long.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                return self.check_ready()
            except (ServerUnavailableError, ModelNotReadyError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def close(self) -> None:
        """Close the connection. Open streams end with an error, as do later calls."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed()

    def _start(self, request: Any, timeout: float) -> Any:
        self._check_open()
        return self._stub.ModelStreamInfer(iter([request]), timeout=timeout)


class AnswerStream(Iterator[Block]):
    """The blocks of one answer as they arrive. Made by `TwoTowerClient.stream`.

    Attributes:
        request_id: Under which the server knows the request.
        prompt_ids: The prompt as the server saw it; empty before the first block.
        blocks: Those that have arrived.
    """

    def __init__(self, client: TwoTowerClient, request: Any, timeout: float) -> None:
        self.request_id: str = request.id
        self.prompt_ids: tuple[int, ...] = ()
        self.blocks: list[Block] = []
        self._client = client
        self._timeout = timeout
        self._start = time.monotonic()
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = client._start(request, timeout + GRACE_SECONDS)
        # A thread waits for the server, so that we can wait for the thread with a limit.
        self._reader = threading.Thread(target=_read, args=(self._call, self._arrived), daemon=True)
        self._reader.start()
        self._ended: ClientError | None = None  # last: __del__ stops what got this far

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete."""
        return bool(self.blocks) and self.blocks[-1].finish_reason is not None

    def __next__(self) -> Block:
        """Wait for the next block.

        Raises:
            ClientError: One of its subclasses. The stream has ended then.
        """
        if self._ended is not None:
            raise self._ended
        if self.is_done:
            raise StopIteration
        try:
            block = self._next()
        except ClientError as problem:
            self._end(problem)
            raise
        except BaseException:  # Ctrl-C, for one
            self.cancel()
            raise
        self.blocks.append(block)
        if self.is_done:
            self._reader.join(GRACE_SECONDS)  # see _end
        return block

    def answer(self) -> Answer:
        """Wait for the rest and return the whole answer.

        Raises:
            ClientError: One of its subclasses.
        """
        for _ in self:
            pass
        return answer_of(self.request_id, self.prompt_ids, self.blocks)

    def cancel(self) -> None:
        """Stop the request, on the server too. Iterating raises `CancelledError` from then on.

        May be called from another thread. Does nothing when the answer is complete.
        """
        if not self.is_done and self._ended is None:
            self._end(cancelled())
            self._arrived.put(None)  # wakes a thread that waits in __next__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # An iterator that was dropped half way; whoever drops it must not wait for the server.
        if getattr(self, "_ended", self) is None and not self.is_done:
            let_go = (self._client, self._call, self._reader, self.request_id)
            threading.Thread(target=_stop, args=let_go, daemon=True).start()

    def _next(self) -> Block:
        """Wait for one message and read it."""
        client, left = self._client, self._timeout - (time.monotonic() - self._start)
        try:
            item = self._arrived.get(timeout=max(0.0, min(left, client.inactivity_timeout)))
        except queue.Empty:
            waited = client.inactivity_timeout
            raise too_late(self._timeout, left, waited, len(self.blocks)) from None
        if self._ended is not None:  # cancelled while we waited
            raise self._ended
        if item is None:
            raise ended_early()
        if isinstance(item, grpc.RpcError):
            raise error_of_rpc(item, client.url, started=bool(self.blocks))
        if item.error_message:
            raise self._refusal(item.error_message)
        if not item.infer_response.outputs:
            return self._next()  # an empty final response of a newer server
        self.prompt_ids = self.prompt_ids or prompt_ids_of(item.infer_response)
        return block_of(item.infer_response, time.monotonic() - self._start)

    def _refusal(self, message: str) -> ClientError:
        """Return what an error message means; where Triton itself sent it, ask what is the case."""
        error = error_of(message)
        if error is not None:
            return error
        if not self.blocks:
            try:
                self._client.check_ready()
            except ClientError as reason:
                return reason
        return unexplained(message)

    def _end(self, problem: ClientError) -> None:
        """Remember how it ended; where the server may be at work still, tell it to stop.

        The call is left to end by itself: a server (2.51) whose ensemble's call is cancelled while
        it is ending counts the request as under way for ever, and then is slow to shut down.
        """
        self._ended = problem
        if isinstance(problem, CancelledError | DeadlineError):
            _stop(self._client, self._call, self._reader, self.request_id)
        else:
            self._reader.join(GRACE_SECONDS)


def _stop(client: TwoTowerClient, call: Any, reader: threading.Thread, request_id: str) -> None:
    """Stop a request and wait for its call to end; cancel the call where that fails."""
    if client.stop(request_id):
        reader.join(GRACE_SECONDS)
    if reader.is_alive():
        call.cancel()


def _read(call: Any, arrived: queue.SimpleQueue[Any]) -> None:
    """Pass on what arrives; None at the end."""
    try:
        for message in call:
            arrived.put(message)
    except grpc.RpcError as problem:
        arrived.put(problem)
    arrived.put(None)
