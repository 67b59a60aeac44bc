"""The core of both clients, without input or output: settings, messages, deadlines, and refusals.

A client adds only how it calls and how it waits: `client.py` with threads, `aio.py` with asyncio.
grpc and tritonclient take longer to load than all else together; they are loaded with the first
client.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Generic, NoReturn, TypeVar

from twotower_client.connection import (
    ACCESS_HEADER,
    GRACE_SECONDS,
    KEEP_ALIVE,
    channel_options,
    check_address,
    check_metadata,
    check_seconds,
    closed,
)
from twotower_client.errors import (
    ClientError,
    InactivityError,
    RequestFailedError,
    ServerUnavailableError,
)
from twotower_client.request import infer_request
from twotower_client.response import error_of, error_of_rpc, read, too_late, unexplained
from twotower_client.result import Answer, Block, Canvas
from twotower_contract.options import Options

NOTICE_SECONDS = 5.0  # between two notices of the server that a request still waits
STOOD_SECONDS = 1.0  # by which a wait was too long: we stood still, and the server may have spoken
# Otherwise a new channel would get the connection of the one that was given up.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


class Connection:
    """A channel and its calls. It closes when neither the client nor a call refers to it.

    Args:
        channel: A channel of `grpc` or `grpc.aio`.
        loop: The event loop that it belongs to, if any.

    Attributes:
        ending: Threads or tasks that read what is left of calls that the server ends. A call that
            is cancelled between its last response and its end stays in the server for ever, with
            its connection (server 2.51), so it is waited for before the connection closes.
    """

    def __init__(self, channel: Any, loop: Any) -> None:
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self.channel = channel
        self.loop = loop
        self.ending: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ready = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelReady
        # Triton's call takes many requests, for which gRPC would start a thread; we send one.
        self.infer = channel.unary_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )


class ClientCore:
    """Settings and connections of a client."""

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        timeout: float = 300.0,
        inactivity_timeout: float = 60.0,
        credentials: Any | None = None,
        server_name: str | None = None,
        access_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        import tritonclient.grpc  # noqa: F401  # now, so that no request waits for it

        self.url = check_address(url)
        self.timeout = check_seconds("timeout", timeout)
        self.inactivity_timeout = check_seconds("inactivity_timeout", inactivity_timeout)
        self._credentials = credentials
        self._server_name = server_name
        self._metadata = check_metadata(metadata or {})
        if access_key is not None:
            self._metadata.append((ACCESS_HEADER, access_key))
        self._connections: dict[Any, Connection] = {}  # by event loop; None with threads
        self._opened: weakref.WeakSet[Connection] = weakref.WeakSet()  # those given up, too
        self._is_closed = False

    def _connect(self, loop: Any = None) -> Connection:
        """Return the connection of a call that begins now.

        It is made here and not with the client: one of asyncio belongs to the loop that runs, and
        one that was given up is replaced.

        Args:
            loop: The event loop that runs, if any.
        """
        if self._is_closed:
            raise closed()
        connection = self._connections.get(loop)
        if connection is None:
            for other in list(self._connections):
                if other is not None and other.is_closed():
                    del self._connections[other]
            connection = self._connections.setdefault(loop, Connection(self._open_channel(), loop))
            self._opened.add(connection)
        return connection

    def _open_channel(self) -> Any:
        options: list[tuple[str, Any]] = [*channel_options(self.url), *KEEP_ALIVE, *OWN_CONNECTION]
        if self._server_name is not None:
            options.append(("grpc.ssl_target_name_override", self._server_name))
        if self._credentials is None:
            return self._channels().insecure_channel(self.url, options=options)
        return self._channels().secure_channel(self.url, self._credentials, options=options)

    def _channels(self) -> Any:
        """Return the module that opens channels."""
        import grpc

        return grpc

    def _give_up(self, connection: Connection | None) -> None:
        """Let later calls have a new connection. Calls under way keep theirs."""
        if connection is not None and self._connections.get(connection.loop) is connection:
            self._connections.pop(connection.loop, None)

    def _request(
        self,
        prompt: str | None,
        prompt_ids: Sequence[int] | None,
        timeout: float | None,
        options: Options,
    ) -> tuple[Any, float]:
        """Return the message of a request, checked, and its timeout in seconds."""
        limit = self.timeout if timeout is None else check_seconds("timeout", timeout)
        notice = min(NOTICE_SECONDS, self.inactivity_timeout / 3)
        return infer_request(prompt, prompt_ids, options, limit, notice), limit

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds a connection and cannot be pickled or copied; make one "
            "in each process, from its url"
        )


Client = TypeVar("Client", bound=ClientCore)


class StreamCore(Generic[Client]):
    """One answer as far as it has arrived, and the reason why it ended."""

    def __init__(self, client: Client, request: Any, timeout: float) -> None:
        self.request_id = ""
        self.prompt_ids: tuple[int, ...] = ()
        self.reused_tokens = 0
        self.blocks: list[Block] = []
        self.queue_place = 0
        self.on_queue: Callable[[int], None] | None = None
        self.on_canvas: Callable[[Canvas], None] | None = None
        self._client = client
        self._connection: Connection | None = None
        self._call: Any = None
        self._reader: Any = None
        self._timeout = timeout
        self._left = timeout
        self._began = self._waits_until = 0.0
        self._ended: ClientError | None = None
        self._is_ending = False  # by the server: what is left of the call is its end

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete."""
        return bool(self.blocks) and self.blocks[-1].finish_reason is not None

    def _begin(self, request: Any, loop: Any = None) -> Connection:
        """Start the clock, and send the request; return the connection that it went on."""
        self._began = time.monotonic()
        connection = self._connection = self._client._connect(loop)
        self._call = connection.infer(
            request, timeout=self._timeout + GRACE_SECONDS, metadata=self._client._metadata
        )
        return connection

    def _let_end(self) -> None:
        """Leave the rest of the call to the server, whoever lets go of this stream."""
        self._is_ending = True
        if self._connection is not None:
            self._connection.ending.add(self._reader)

    def _stop(self, problem: ClientError) -> None:
        """Remember how it ended, and tell the server that nobody listens any more."""
        self._ended = copy(problem)  # the frames of the one that is raised refer to this stream
        if is_unreachable(problem):
            self._client._give_up(self._connection)
        if self._call is not None and not self._is_ending:
            self._call.cancel()

    def _goes_on(self) -> bool:
        """Return whether more is to come; raise the reason where the answer ended early."""
        if self._ended is not None:
            raise copy(self._ended)
        return not self.is_done

    def _patience(self) -> float:
        """Return how many seconds to wait for the next message."""
        now = time.monotonic()
        self._left = self._timeout - (now - self._began)
        patience = max(0.0, min(self._left, self._client.inactivity_timeout))
        self._waits_until = now + patience
        return patience

    def _stood_still(self) -> bool:
        """Return whether this process stood still in a wait in which nothing came.

        It may have been stopped, as with Ctrl-Z, or other code held the event loop. What the server
        said meanwhile is still to be read.
        """
        return time.monotonic() - self._waits_until > STOOD_SECONDS

    def _too_late(self) -> ClientError:
        """Return the exception for a wait in which nothing came."""
        limit = self._client.inactivity_timeout
        if self._left <= limit:  # the server gives the request up at the same time
            self._let_end()
        return too_late(self._timeout, self._left, limit, len(self.blocks), self.queue_place)

    def _is_unexplained(self, item: Any) -> bool:
        """Return whether Triton itself refused the request: the model may not be ready."""
        message = getattr(item, "error_message", "")
        is_first = not self.blocks and self._ended is None
        return is_first and bool(message) and error_of(message) is None

    def _take(self, item: Any) -> Block | None:
        """Keep the block that an item of the stream holds; None for a response without a block.

        Args:
            item: A response, the `grpc.RpcError` that ended the call, or None for its plain end.

        Raises:
            ClientError: The answer ends here without being complete.
        """
        import grpc

        if self._ended is not None:  # cancelled while we waited
            raise copy(self._ended)
        if item is None:
            raise RequestFailedError(
                "the server ended the answer without saying why; its log may tell"
            )
        if isinstance(item, grpc.RpcError) and self._client._is_closed:
            raise closed()
        if isinstance(item, grpc.RpcError):
            raise error_of_rpc(item, self._client.url, started=bool(self.blocks))
        if item.error_message:
            self._let_end()
            message = item.error_message
            raise error_of(message) or unexplained(message, self._client.url)
        if not item.infer_response.outputs:
            return None
        response = read(item.infer_response, time.monotonic() - self._began)
        self.request_id = self.request_id or response.request_id
        self.queue_place = response.queue_place
        if self.queue_place:
            if self.on_queue is not None:
                self.on_queue(self.queue_place)
            return None
        self.prompt_ids = self.prompt_ids or response.prompt_ids
        self.reused_tokens = self.reused_tokens or response.reused_tokens
        if response.canvas is not None:
            if self.on_canvas is not None:
                self.on_canvas(response.canvas)
            return None
        self.blocks.append(response.block)
        if self.is_done:
            self._let_end()
        return response.block

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
            reused_tokens=self.reused_tokens,
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is under way and cannot be pickled or copied")


def state_of(parts: Sequence[Any], url: str) -> dict[str, Any]:
    """Return the state of the engine that the answer to a probe tells.

    Raises:
        ClientError: The answer is an error, or there is none.
    """
    part = parts[0] if parts else None
    if part is None or part.error_message:
        message = part.error_message if part else "no answer"
        raise error_of(message) or unexplained(message, url)
    return dict(json.loads(read(part.infer_response, 0.0).block.text))


def is_unreachable(problem: ClientError) -> bool:
    """Return whether the connection may be the reason, so that later calls need a new one."""
    return isinstance(problem, ServerUnavailableError | InactivityError)
