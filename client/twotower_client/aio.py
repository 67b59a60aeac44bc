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
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from twotower_client.connection import GRACE_SECONDS, LOOK_SECONDS, RETRY_SECONDS, STOP_SECONDS
from twotower_client.core import READY_REQUEST, ClientCore, StreamCore, needs_stop
from twotower_client.errors import ClientError, ModelNotReadyError, ServerUnavailableError
from twotower_client.request import stop_request
from twotower_client.response import cancelled, error_of_readiness, not_ready
from twotower_client.result import Answer, Block
from twotower_contract.options import Options


class AsyncTwoTowerClient(ClientCore):
    """A connection to a Triton server that serves a TwoTower model, for asyncio.

    Arguments and errors are those of `TwoTowerClient`, here and of each method.
    """

    _channels = grpc.aio

    async def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Return a whole answer. Cancelling the task stops the request on the server."""
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
        """
        return AsyncAnswerStream(self, *self._request(prompt, prompt_ids, timeout, options))

    async def stop(self, request_id: str) -> bool:
        """Tell the server to stop a request; return whether it took note."""
        try:
            async for response in self._open_call(stop_request(request_id), STOP_SECONDS):
                if response.error_message:
                    return False
        except (grpc.RpcError, ClientError):  # the latter where this client was closed
            return False
        return True

    async def check_ready(self) -> None:
        """Return if the model is ready."""
        self._check_open()
        try:
            response = await self._stub.ModelReady(READY_REQUEST, timeout=LOOK_SECONDS)
        except grpc.RpcError as problem:
            raise error_of_readiness(problem, self.url) from None
        if not response.ready:
            raise not_ready(self.url, "")

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Wait until the model is ready, for `timeout` seconds at most."""
        end = time.monotonic() + timeout
        while True:
            try:
                return await self.check_ready()
            except (ServerUnavailableError, ModelNotReadyError):
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    async def close(self) -> None:
        """Close the connection. Open streams end with an error, as do later calls."""
        self._is_closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _open_call(self, request: Any, timeout: float) -> Any:
        self._check_open()

        async def requests() -> AsyncIterator[Any]:
            yield request

        return self._stub.ModelStreamInfer(requests(), timeout=timeout)


class AsyncAnswerStream(StreamCore, AsyncIterator[Block]):
    """The blocks of one answer as they arrive, made by `AsyncTwoTowerClient.stream`.

    Attributes and errors are those of `AnswerStream`.
    """

    def __init__(self, client: AsyncTwoTowerClient, request: Any, timeout: float) -> None:
        super().__init__(client, request, timeout)
        self._client = client
        self._request = request
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()

    async def __anext__(self) -> Block:
        """Wait for the next block."""
        if not self._goes_on():
            raise StopAsyncIteration
        block = None
        try:
            while block is None:  # newer servers end with an empty response
                block = self._take(await self._wait())
        except ClientError as problem:
            await self._end(problem)
            raise
        except BaseException:  # the task was cancelled, for one
            await asyncio.shield(self.cancel())
            raise
        if self.is_done:
            await self._drain()
        return block

    async def answer(self) -> Answer:
        """Wait for the rest and return the whole answer."""
        async for _ in self:
            pass
        return self._answer()

    async def cancel(self) -> None:
        """Stop the request, on the server too. Does nothing when the answer is complete."""
        if not self.is_done and self._ended is None:
            await self._end(cancelled())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    async def _wait(self) -> Any:
        """Wait for the next item, but not too long."""
        if self._reader is None:  # here, as a stream may be made before there is a loop
            self._call = self._client._open_call(self._request, self._timeout + GRACE_SECONDS)
            self._reader = asyncio.create_task(_read(self._call, self._arrived))
        try:
            # not wait_for, which in Python 3.11 loses a cancellation that comes with the message
            async with asyncio.timeout(self._patience()):
                item = await self._arrived.get()
        except TimeoutError:
            raise self._too_late() from None
        if self._is_unexplained(item):
            await self._client.check_ready()
        return item

    async def _end(self, problem: ClientError) -> None:
        """Remember how it ended; where the server may be at work still, tell it to stop."""
        self._ended = problem
        self._arrived.put_nowait(None)  # wakes a task that waits in __anext__
        if self._reader is None:
            return
        told = not needs_stop(problem) or await self._client.stop(self.request_id)
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
