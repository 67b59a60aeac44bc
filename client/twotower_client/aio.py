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
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Self, Unpack

from twotower_client.connection import (
    END_SECONDS,
    HURRIED_SECONDS,
    LOOK_SECONDS,
    RETRY_SECONDS,
    STOP_SECONDS,
)
from twotower_client.core import ClientCore, Connection, StreamCore
from twotower_client.errors import ClientError, ModelNotReadyError, ServerUnavailableError
from twotower_client.request import cancel_request, ready_request
from twotower_client.response import cancelled, error_of_readiness, not_ready
from twotower_client.result import Answer, Block
from twotower_client.retry import NO_RETRY, Retry, Servers
from twotower_contract.options import Options


class AsyncTwoTowerClient(ClientCore):
    """A connection to a Triton server that serves a TwoTower model, for asyncio.

    It may be made before there is an event loop, and used in several, one after the other.
    Arguments and errors are those of `TwoTowerClient`, here and of each method.
    """

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

        Use it in an `async with` statement, exhaust it, or close it: leaving early tells the server
        to stop. It is sent, and its time begins, when it is first waited for.
        """
        return AsyncAnswerStream(self, *self._request(prompt, prompt_ids, timeout, options))

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        concurrency: int = 16,
        timeout: float | None = None,
        retry: Retry | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> AsyncIterator[Answer | ClientError]:
        """Return an async iterator over the answers to many prompts, in their order."""
        from twotower_client.aio_many import generate_many  # imports this module

        limits = (concurrency, timeout, retry or NO_RETRY, progress)
        return generate_many(Servers([self]), prompts, *limits, options)

    async def stop(self, request_id: str) -> bool:
        """Tell the server to stop a request; return whether it took note."""
        import grpc

        connection = None
        try:
            connection = self._connect(asyncio.get_running_loop())
            call = connection.infer(
                cancel_request(request_id), timeout=STOP_SECONDS, metadata=self._metadata
            )
            async with _errors_of(call):
                responses = [response async for response in call]
        except (grpc.RpcError, ClientError):  # the latter where this client was closed
            self._give_up(connection)
            return False
        return not any(response.error_message for response in responses)

    async def check_ready(self) -> None:
        """Return if the model is ready."""
        import grpc

        connection = self._connect(asyncio.get_running_loop())
        call = connection.ready(ready_request(), timeout=LOOK_SECONDS, metadata=self._metadata)
        try:
            async with _errors_of(call):
                response = await call
        except grpc.RpcError as problem:
            self._give_up(connection)
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
        """Close the connection. Open streams end with an error, as do later calls.

        A call that the server is about to end is waited for, for seconds at most.
        """
        await close_clients([self])

    def _channels(self) -> Any:
        import grpc.aio

        return grpc.aio

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await close_clients([self], kind)


async def close_clients(
    clients: Sequence[AsyncTwoTowerClient], kind: type[BaseException] | None = None
) -> None:
    """Close clients at the same time.

    Args:
        kind: The exception that ended their `async with` block.
    """
    loop = asyncio.get_running_loop()
    for client in clients:
        client._is_closed = True
    opened = [connection for client in clients for connection in list(client._opened)]
    ours = [one for one in opened if one.loop is loop]  # those of other loops close by themselves
    is_hurried = kind in (KeyboardInterrupt, asyncio.CancelledError)
    seconds = HURRIED_SECONDS if is_hurried else END_SECONDS
    try:
        if ending := [task for connection in ours for task in connection.ending]:
            await asyncio.wait(ending, timeout=seconds)
    finally:
        for connection in ours:
            await connection.channel.close()
        for client in clients:
            client._connections.clear()


class AsyncAnswerStream(StreamCore[AsyncTwoTowerClient], AsyncIterator[Block]):
    """The blocks of one answer as they arrive, made by `AsyncTwoTowerClient.stream`.

    Attributes and errors are those of `AnswerStream`.
    """

    def __init__(self, client: AsyncTwoTowerClient, request: Any, timeout: float) -> None:
        super().__init__(client, request, timeout)
        self._request = request
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()

    async def __anext__(self) -> Block:
        """Wait for the next block."""
        if not self._goes_on():
            raise StopAsyncIteration
        block = None
        try:
            while block is None:  # a notice, or the empty response with which newer servers end
                block = self._take(await self._wait())
        except ClientError as problem:
            self._stop(problem)
            raise
        except BaseException:  # the task was cancelled, for one
            self._stop(cancelled())
            raise
        return block

    async def answer(self) -> Answer:
        """Wait for the rest and return the whole answer."""
        async for _ in self:
            pass
        return self._answer()

    async def cancel(self) -> None:
        """Stop the request, on the server too. Does nothing when the answer is complete."""
        if not self.is_done and self._ended is None:
            self._stop(cancelled())

    async def aclose(self) -> None:
        """Do what `cancel` does; for `contextlib.aclosing`."""
        await self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    def __del__(self) -> None:
        # An iterator that was dropped half way, in any thread: the loop that it ran in stops it.
        reader = getattr(self, "_reader", None)  # None where it never began
        if reader is None or self._ended is not None or self._is_ending:
            return
        with contextlib.suppress(RuntimeError):  # that loop is closed, and its calls have ended
            reader.get_loop().call_soon_threadsafe(self._call.cancel)

    async def _wait(self) -> Any:
        """Wait for the next item, but not too long."""
        if self._reader is None:  # here, as a stream may be made before there is a loop
            connection = self._begin(self._request, asyncio.get_running_loop())
            arguments = (connection, self._call, self._arrived)
            self._reader = asyncio.create_task(_read(*arguments))
        try:
            # not wait_for, which in Python 3.11 loses a cancellation that comes with the message
            async with asyncio.timeout(self._patience()):
                item = await self._arrived.get()
        except TimeoutError:
            if self._stood_still():
                return await self._wait()
            raise self._too_late() from None
        if self._is_unexplained(item):
            await self._client.check_ready()
        return item

    def _stop(self, problem: ClientError) -> None:
        super()._stop(problem)
        self._arrived.put_nowait(None)  # wakes a task that waits in __anext__


async def _read(connection: Connection, call: Any, arrived: asyncio.Queue[Any]) -> None:
    """Pass on what arrives; None at the end. The connection is held as long."""
    import grpc

    try:
        async with _errors_of(call):
            async for message in call:
                arrived.put_nowait(message)
    except grpc.RpcError as problem:
        # Its frames refer to the call, and so to the connection: a cycle that would keep a socket.
        problem.__context__ = None
        arrived.put_nowait(problem.with_traceback(None))
    finally:
        arrived.put_nowait(None)


@contextlib.asynccontextmanager
async def _errors_of(call: Any) -> AsyncIterator[None]:
    """Tell a call that ended with CANCELLED from a task that its caller cancelled.

    grpc.aio raises `asyncio.CancelledError` for both; a balancer or a server may end a call so.

    Raises:
        grpc.RpcError: The call ended with CANCELLED.
    """
    import grpc.aio

    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling() or not call.done():
            raise
        nothing = grpc.aio.Metadata()
        code, details = await call.code(), await call.details()
        raise grpc.aio.AioRpcError(code, nothing, nothing, details) from None
