"""The front end as a server of HTTP: uvicorn, with a line when it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from twotower_client.errors import ClientError
from twotower_contract.processes import told_to_end

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

GRACE_SECONDS = 30  # for answers under way when the front end is told to end


class PortTakenError(ClientError):
    """The front end cannot listen at its address."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"{host}:{port}")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the server; a second one ends its answers, too."""
        with told_to_end(self._stop):
            yield

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def run(app: Any, host: str, port: int, ready: Callable[[str], None], **tls: Any) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        app: The application.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        ready: Is told `host:port` once callers are answered.
        **tls: Files of certificates, as uvicorn names them.

    Raises:
        PortTakenError: The address is in use, or not this machine's.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        h11_max_incomplete_event_size=1 << 16,
        **tls,
    )
    server = _Server(config, ready)
    try:
        asyncio.run(server.serve())
    except SystemExit:  # uvicorn has said why
        raise PortTakenError(f"{host}:{port} cannot be listened on; name another --port") from None
