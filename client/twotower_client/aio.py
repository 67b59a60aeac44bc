"""The client for asyncio: the same calls, awaited.

```python
async with AsyncTwoTowerClient("localhost:8001") as client:
    async with client.stream("Mia the fox lived by the river.") as stream:
        async for block in stream:
            print(block.text, end="", flush=True)
```
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio
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
from twotower_client.errors import CancelledError, ClientError, DeadlineError
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

__all__ = ["AsyncAnswerStream", "AsyncTwoTowerClient"]


class AsyncTwoTowerClient:
    """A connection to a Triton server that serves a TwoTower model, for asyncio.

    Args:
        url: `host:port` of the server's gRPC endpoint.
        timeout: Seconds that a whole answer may take, where a call does not say otherwise.
        inactivity_timeout: Seconds that may pass without anything new.
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
            grpc.aio.insecure_channel(url, options=channel_options(url))
            if credentials is None
            else grpc.aio.secure_channel(url, credentials, options=channel_options(url))
        )
        self._is_closed = False
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Return a whole answer. Cancelling the task stops the request on the server.

        Args:
            prompt: Text to continue; or
            prompt_ids: token ids to continue.
            timeout: Seconds for the whole answer; the client's, where not given.
            **options: How to generate; see `Options`.

        Raises:
            ClientError: One of its subclasses; each says what to do.
        """
        async with self.stream(prompt, prompt_ids=prompt_ids, timeout=timeout, **options) as stream:
            return await stream.answer()

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncAnswerStream:
        """Return an async iterator over the blocks of an answer, each as soon as it is committed.

        Use it in an `async with` statement, or exhaust it.

        Args:
            prompt: As for `generate`, like all the rest.
            prompt_ids: Token ids.
            timeout: In seconds.
            **options: How to generate.

        Raises:
            RequestRefusedError: At once, where no server could do this.
        """
        limit = self.timeout if timeout is None else check_seconds("timeout", timeout)
        request = infer_request(prompt, prompt_ids, options, uuid.uuid4().hex, limit)
        return AsyncAnswerStream(self, request, limit)

    async def stop(self, request_id: str) -> bool:
        """Tell the server to stop a request; return whether it took note."""
        try:
            async for response in self._start(stop_request(request_id), STOP_SECONDS):
                if response.error_message:
                    return False
        except (grpc.RpcError, ClientError):  # the latter where this client was closed
            return False
        return True

    async def check_ready(self) -> None:
        """Return if the model is ready.

        Raises:
            ServerUnavailableError: No server answers.
            ModelNotReadyError: The server does not serve the model.
            RequestRefusedError: This client was closed.
        """
        self._check_open()
        try:
            request = service_pb2.ModelReadyRequest(name=MODEL)
            response = await self._stub.ModelReady(request, timeout=LOOK_SECONDS)
        except grpc.RpcError as problem:
            raise error_of_readiness(problem, self.url) from None
        if not response.ready:
            raise not_ready(self.url, "")

    async def close(self) -> None:
        """Close the connection. Open streams end with an error, as do later calls."""
        self._is_closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed()

    def _start(self, request: Any, timeout: float) -> Any:
        self._check_open()

        async def requests() -> AsyncIterator[Any]:
            yield request

        return self._stub.ModelStreamInfer(requests(), timeout=timeout)


class AsyncAnswerStream(AsyncIterator[Block]):
    """The blocks of one answer as they arrive. Made by `AsyncTwoTowerClient.stream`.

    Attributes:
        request_id: Under which the server knows the request.
        prompt_ids: The prompt as the server saw it; empty before the first block.
        blocks: Those that have arrived.
    """

    def __init__(self, client: AsyncTwoTowerClient, request: Any, timeout: float) -> None:
        self.request_id: str = request.id
        self.prompt_ids: tuple[int, ...] = ()
        self.blocks: list[Block] = []
        self._client = client
        self._request = request
        self._timeout = timeout
        self._start = time.monotonic()
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._ended: ClientError | None = None

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete."""
        return bool(self.blocks) and self.blocks[-1].finish_reason is not None

    async def __anext__(self) -> Block:
        """Wait for the next block.

        Raises:
            ClientError: One of its subclasses. The stream has ended then.
        """
        if self._ended is not None:
            raise self._ended
        if self.is_done:
            raise StopAsyncIteration
        try:
            block = await self._next()
        except ClientError as problem:
            await self._end(problem)
            raise
        except BaseException:  # the task was cancelled, for one
            await asyncio.shield(self.cancel())
            raise
        self.blocks.append(block)
        if self.is_done:
            await self._drain()
        return block

    async def answer(self) -> Answer:
        """Wait for the rest and return the whole answer.

        Raises:
            ClientError: One of its subclasses.
        """
        async for _ in self:
            pass
        return answer_of(self.request_id, self.prompt_ids, self.blocks)

    async def cancel(self) -> None:
        """Stop the request, on the server too. Does nothing when the answer is complete."""
        if not self.is_done and self._ended is None:
            await self._end(cancelled())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.cancel()

    async def _next(self) -> Block:
        """Wait for one message and read it."""
        client = self._client
        if self._reader is None:  # here, as a stream may be made before there is a loop
            self._call = client._start(self._request, self._timeout + GRACE_SECONDS)
            self._reader = asyncio.create_task(_read(self._call, self._arrived))
        left = self._timeout - (time.monotonic() - self._start)
        limit = max(0.0, min(left, client.inactivity_timeout))
        try:
            # not wait_for, which in Python 3.11 loses a cancellation that comes with the message
            async with asyncio.timeout(limit):
                message = await self._arrived.get()
        except TimeoutError:
            waited = client.inactivity_timeout
            raise too_late(self._timeout, left, waited, len(self.blocks)) from None
        if self._ended is not None:  # cancelled while we waited
            raise self._ended
        if message is None:
            raise ended_early()
        if isinstance(message, grpc.RpcError):
            raise error_of_rpc(message, client.url, started=bool(self.blocks))
        if message.error_message:
            raise await self._refusal(message.error_message)
        if not message.infer_response.outputs:
            return await self._next()  # an empty final response of a newer server
        self.prompt_ids = self.prompt_ids or prompt_ids_of(message.infer_response)
        return block_of(message.infer_response, time.monotonic() - self._start)

    async def _refusal(self, message: str) -> ClientError:
        """Return what an error message means; where Triton itself sent it, ask what is the case."""
        error = error_of(message)
        if error is not None:
            return error
        if not self.blocks:
            try:
                await self._client.check_ready()
            except ClientError as reason:
                return reason
        return unexplained(message)

    async def _end(self, problem: ClientError) -> None:
        """Remember how it ended; where the server may be at work still, tell it to stop."""
        self._ended = problem
        self._arrived.put_nowait(None)  # wakes a task that waits in __anext__
        if self._reader is None:
            return
        told = True
        if isinstance(problem, CancelledError | DeadlineError):
            told = await self._client.stop(self.request_id)
        await self._drain(GRACE_SECONDS if told else 0.0)

    async def _drain(self, seconds: float = GRACE_SECONDS) -> None:
        """Let the call end by itself (`client.AnswerStream._end` says why), or else cancel it."""
        assert self._reader is not None, "there is a reader when something has arrived"
        done, _ = await asyncio.wait([self._reader], timeout=seconds)
        if not done:
            self._call.cancel()


async def _read(call: Any, arrived: asyncio.Queue[Any]) -> None:
    """Pass on what arrives; None at the end."""
    try:
        async for message in call:
            arrived.put_nowait(message)
    except (grpc.RpcError, asyncio.CancelledError) as problem:
        if isinstance(problem, grpc.RpcError):
            arrived.put_nowait(problem)
    arrived.put_nowait(None)
