"""The client: asks a served model for an answer, whole or block by block.

Speaks gRPC, through the messages that tritonclient carries. Any number of threads may use one
client at the same time.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, Unpack

from twotower_client.connection import (
    END_SECONDS,
    HURRIED_SECONDS,
    LOOK_SECONDS,
    RETRY_SECONDS,
    STOP_SECONDS,
)
from twotower_client.core import ClientCore, Connection, StreamCore, state_of
from twotower_client.errors import ClientError, ModelNotReadyError, ServerUnavailableError
from twotower_client.request import cancel_request, probe_request, ready_request
from twotower_client.response import cancelled, error_of_readiness, not_ready
from twotower_client.result import Answer, Block
from twotower_client.retry import NO_RETRY, Retry, Servers
from twotower_contract.options import Options
from twotower_contract.processes import HEARD_SECONDS, next_of


class TwoTowerClient(ClientCore):
    """A connection to a Triton server that serves a TwoTower model.

    Args:
        url: `host:port` of the server's gRPC endpoint.
        timeout: Seconds that a whole answer may take, where a call does not say otherwise. The
            server is told, and gives the request up by itself after that.
        inactivity_timeout: Seconds that may pass without anything new. A server whose model process
            was killed sends neither data nor an error.
        credentials: Credentials for TLS, from `grpc.ssl_channel_credentials`; None for no
            encryption.
        server_name: The name in the server's certificate, where it is not that of the address.
        access_key: Key that the server asks for, if it does (`serve --key-file`).
        metadata: Headers of every call, as a balancer before the server may ask for:
            `{"x-api-key": "..."}`.

    Raises:
        RequestRefusedError: `url` is no `host:port`, a timeout is not positive, or gRPC cannot send
            the metadata.
    """

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
            prompt: Text to continue.
            prompt_ids: Token ids to continue, instead of text.
            timeout: Seconds for the whole answer; the client's, where not given.
            **options: Options of the request; see `Options`.

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

        Use it in a `with` statement, exhaust it, or close it: leaving early tells the server to
        stop.

        Args:
            prompt: Text to continue.
            prompt_ids: Token ids to continue, instead of text.
            timeout: Seconds for the whole answer; the client's, where not given.
            **options: Options of the request; see `Options`.

        Raises:
            RequestRefusedError: At once, where no server could do this. All other errors come from
                iterating.
        """
        return AnswerStream(self, *self._request(prompt, prompt_ids, timeout, options))

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        concurrency: int = 16,
        timeout: float | None = None,
        retry: Retry | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Answer | ClientError]:
        """Return an iterator over the answers to many prompts, in their order.

        An error takes the place of its answer, and the others go on. Prompts are read as requests
        become free to be sent. Closing the iterator stops what is under way.

        Args:
            prompts: Texts or lists of token ids.
            concurrency: Requests under way at a time.
            timeout: Seconds for one attempt at one answer; the client's, where not given.
            retry: When a request is sent again; never, where not given.
            progress: Called with the number of answers, and of failed ones among them.
            **options: Options of every request; see `Options`.
        """
        from twotower_client.many import generate_many  # imports this module

        limits = (concurrency, timeout, retry or NO_RETRY, progress)
        return generate_many(Servers([self]), prompts, *limits, options)

    def stop(self, request_id: str) -> bool:
        """Tell the server to stop a request of whatever client, by the server's name of it.

        Returns:
            Whether the server took note. One that did not gives the request up after its timeout.
        """
        import grpc

        connection = None
        try:
            connection = self._connect()
            call = connection.infer(
                cancel_request(request_id), timeout=STOP_SECONDS, metadata=self._metadata
            )
            responses = list(call)  # to its end
        except (grpc.RpcError, ClientError):  # the latter where this client was closed
            self._give_up(connection)
            return False
        return not any(response.error_message for response in responses)

    def check_ready(self) -> None:
        """Return if the model is ready.

        Raises:
            ServerUnavailableError: No server answers.
            ModelNotReadyError: The server does not serve the model.
            RequestRefusedError: This client was closed.
        """
        import grpc

        connection = self._connect()
        try:
            response = connection.ready(
                ready_request(), timeout=LOOK_SECONDS, metadata=self._metadata
            )
        except grpc.RpcError as problem:
            self._give_up(connection)
            raise error_of_readiness(problem, self.url) from None
        if not response.ready:
            raise not_ready(self.url, "")

    def probe(self, timeout: float = LOOK_SECONDS) -> dict[str, Any]:
        """Ask the engine's thread itself for its state, before all requests that wait.

        Args:
            timeout: Seconds that the answer may take.

        Returns:
            How many requests run and wait (`running`, `waiting`), the count of `turns`, and whether
            new requests are refused (`draining`).

        Raises:
            ClientError: There was no answer.
        """
        import grpc

        connection = self._connect()
        try:
            call = connection.infer(probe_request(), timeout=timeout, metadata=self._metadata)
            return state_of(list(call), self.url)
        except grpc.RpcError as problem:
            self._give_up(connection)
            raise error_of_readiness(problem, self.url) from None

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Wait until the model is ready.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            ServerUnavailableError: No server answered for that long.
            ModelNotReadyError: The server did not serve the model for that long.
            RequestRefusedError: This client was closed.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                return self.check_ready()
            except (ServerUnavailableError, ModelNotReadyError):
                if time.monotonic() > end:
                    raise
            time.sleep(RETRY_SECONDS)

    def close(self) -> None:
        """Close the connection. Open streams end with an error, as do later calls.

        A call that the server is about to end is waited for, for seconds at most.
        """
        close_clients([self])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        close_clients([self], kind)


def close_clients(
    clients: Sequence[TwoTowerClient], kind: type[BaseException] | None = None
) -> None:
    """Close clients at the same time.

    Args:
        kind: The exception that ended their `with` block.
    """
    for client in clients:
        client._is_closed = True
    opened = [connection for client in clients for connection in list(client._opened)]
    try:
        _wait_for_ends(opened, HURRIED_SECONDS if kind is KeyboardInterrupt else END_SECONDS)
    finally:
        for connection in opened:
            connection.channel.close()


class AnswerStream(StreamCore[TwoTowerClient], Iterator[Block]):
    """The blocks of one answer as they arrive, made by `TwoTowerClient.stream`.

    Attributes:
        request_id: The server's name of the request; empty before its first response.
        prompt_ids: Token ids of the prompt as the server saw it; empty before the first block.
        reused_tokens: Tokens of the prompt whose states the server kept from an earlier one; 0
            before the first block.
        blocks: Blocks that have arrived.
        queue_place: Place among the requests that wait for a slot, from 1, as the server told it
            last; 0 otherwise.
        on_queue: Is called with `queue_place` each time that the server tells it, every few
            seconds. Set it before the first block is waited for.
        on_canvas: Is called with the block after each denoiser call, where the request has
            `stream_mode="denoise"`. Set it before the first block, too.
    """

    def __init__(self, client: TwoTowerClient, request: Any, timeout: float) -> None:
        super().__init__(client, request, timeout)
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        connection = self._begin(request)
        # A thread waits for the server, so that we can wait for the thread with a limit.
        arguments = (connection, self._call, self._arrived)
        self._reader = threading.Thread(target=_read, args=arguments, daemon=True)
        self._reader.start()
        _UNDER_WAY.add(self)
        _CONNECTIONS.add(connection)

    def __next__(self) -> Block:
        """Wait for the next block.

        Raises:
            ClientError: One of its subclasses. The stream has ended then.
        """
        if not self._goes_on():
            raise StopIteration
        block = None
        try:
            while block is None:  # a notice, or the empty response with which newer servers end
                block = self._take(self._wait())
        except ClientError as problem:
            self._stop(problem)
            raise
        except BaseException:  # Ctrl-C, for one
            self.cancel()
            raise
        return block

    def answer(self) -> Answer:
        """Wait for the rest and return the whole answer.

        Raises:
            ClientError: One of its subclasses.
        """
        for _ in self:
            pass
        return self._answer()

    def cancel(self) -> None:
        """Stop the request, on the server too; iterating raises `RequestCancelledError` afterwards.

        May be called from another thread. Does nothing when the answer is complete.
        """
        if not self.is_done and self._ended is None:
            self._stop(cancelled())
            self._arrived.put(None)  # wakes a thread that waits in __next__

    def close(self) -> None:
        """Do what `cancel` does; for `contextlib.closing`."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # It may never have begun.
        if getattr(self, "_call", None) is not None and not self._is_ending:
            self._call.cancel()  # does nothing where it has ended

    def _wait(self) -> Any:
        """Wait for the next item, but not too long."""
        try:
            item = next_of(self._arrived, self._patience())
        except queue.Empty:
            if self._stood_still():
                return self._wait()
            raise self._too_late() from None
        if self._is_unexplained(item):
            self._client.check_ready()
        return item


def _read(connection: Connection, call: Any, arrived: queue.SimpleQueue[Any]) -> None:
    """Pass on what arrives; None at the end. The connection is held as long."""
    import grpc

    try:
        for message in call:
            arrived.put(message)
    except grpc.RpcError as problem:
        arrived.put(problem)
    arrived.put(None)


def _wait_for_ends(connections: Iterable[Connection], seconds: float) -> None:
    """Wait for calls that the server ends, but not long; Ctrl-C ends the wait."""
    end = time.monotonic() + seconds
    for reader in [reader for connection in connections for reader in list(connection.ending)]:
        while reader.is_alive() and (left := end - time.monotonic()) > 0:
            reader.join(min(left, HEARD_SECONDS))


_UNDER_WAY: weakref.WeakSet[AnswerStream] = weakref.WeakSet()
_CONNECTIONS: weakref.WeakSet[Connection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop what a script leaves half read, while threads still run."""
    for stream in list(_UNDER_WAY):
        stream.cancel()
    _wait_for_ends(list(_CONNECTIONS), END_SECONDS)
