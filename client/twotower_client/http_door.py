r"""The model over HTTP: `generate` and `generate_stream` as Triton names them, and health.

    echo '{"host": "127.0.0.1", "port": 8000, "grpc": "127.0.0.1:8001"}' | \
        python -m twotower_client.http_door

`twotower serve --http-port` starts it beside the server. The first line of its standard input says
how; it ends with its standard input. It is a client like any other. Triton's own HTTP stays closed:
a body of 200,000 brackets ends that server (2.51), integers wrap there on their way from JSON, and
`generate` takes answers of one block alone.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import select
import socket
import ssl
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import grpc

from twotower_client.client import AnswerStream, TwoTowerClient
from twotower_client.errors import (
    ClientError,
    DeadlineError,
    ModelNotReadyError,
    RequestRefusedError,
    ServerBusyError,
    ServerUnavailableError,
)
from twotower_client.result import Block, Canvas, details_as_json
from twotower_contract.options import INPUTS, OPTIONS, Options, unknown_name
from twotower_contract.statuses import retry_header

MODELS = ("twotower", "ensemble")  # the same behind this door
MOST_BODY = 16 * 2**20  # bytes; a prompt of a million tokens fits
MOST_DIGITS = 20  # of a length; Python itself refuses thousands
MOST_REQUESTS = 512  # at once, a thread for each
READ_SECONDS = 30.0  # for a request to arrive
PATIENCE_SECONDS = 8.0  # for a slot; then a stream begins, and an error is no status any more
NOT_HERE = ("cancel_request_id", "probe", "queue_notice_seconds")
STATUSES: tuple[tuple[type[ClientError], int], ...] = (
    (RequestRefusedError, 400),
    (ServerBusyError, 503),
    (ServerUnavailableError, 503),
    (ModelNotReadyError, 503),
    (DeadlineError, 504),
)


class Door(ThreadingHTTPServer):
    """Listens for HTTP.

    Args:
        address: Host and port; port 0 takes a free one.
        client: Asks the model.
        key: Key that callers must send as `Authorization: Bearer KEY`; None for none.
        tls: Encryption; None for none.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        client: TwoTowerClient,
        key: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)
        self.client, self.key = client, key
        self.room = threading.BoundedSemaphore(MOST_REQUESTS)
        if tls is not None:
            # The handshake is the handler's: one that takes long holds up nobody else.
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of callers that leave; the rest is a bug."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = default_request_version = "HTTP/1.1"  # even a broken first line has a status
    timeout = READ_SECONDS

    @property
    def door(self) -> Door:
        return cast(Door, self.server)

    def log_message(self, format: str, *args: Any) -> None:
        """Leave the log to the model, which has a line for each request."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is not HTTP as all else is refused, and hear no more of it."""
        self.close_connection = True
        self._fail(code, message or HTTPStatus(code).phrase)

    def do_GET(self) -> None:
        """Tell whether the server lives and is ready."""
        if self.path not in ("/v2/health/live", "/v2/health/ready"):
            self._fail(404, f"there is nothing at {self.path}")
            return
        try:
            state = self.door.client.probe()
        except ClientError as problem:
            self._fail(503, str(problem))
            return
        if self.path.endswith("ready") and state["draining"]:
            self._fail(503, "the server is shutting down")
        else:
            self._send(200, state)

    def do_POST(self) -> None:
        """Answer a request."""
        if not self.door.room.acquire(blocking=False):
            self.close_connection = True  # the body was not read
            self._fail(503, f"{MOST_REQUESTS} requests are open already; try again later")
            return
        try:
            self._answer()
        except _RefusedError as refusal:
            self._fail(refusal.status, str(refusal))
        except ClientError as problem:
            self._fail(_status_of(problem), str(problem), problem.retry_after)
        finally:
            self.door.room.release()

    def _answer(self) -> None:
        content = self._content()
        kinds = [
            kind
            for model in MODELS
            for kind in ("generate", "generate_stream")
            if self.path == f"/v2/models/{model}/{kind}"
        ]
        if not kinds:
            raise _RefusedError(
                404, f"there is nothing at {self.path}; POST to /v2/models/twotower/generate"
            )
        is_whole = kinds == ["generate"]
        stream = self._stream(content, is_whole)
        try:
            if is_whole:
                self._send_whole(stream)
            else:
                self._send_blocks(stream)
        finally:
            stream.cancel()

    def _content(self) -> bytes:
        """Read the body, whatever becomes of it, and check the key."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise _RefusedError(411, "give the length of the body in Content-Length")
        if len(length) > MOST_DIGITS or int(length) > MOST_BODY:
            self.close_connection = True
            raise _RefusedError(
                413, f"the body is longer than the {MOST_BODY} bytes that are taken: shorten it"
            )
        content = self.rfile.read(int(length))
        key, sent = self.door.key, self.headers.get("Authorization", "")
        if key is not None and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            raise _RefusedError(401, "send the server's key as `Authorization: Bearer KEY`")
        return content

    def _stream(self, content: bytes, is_whole: bool) -> AnswerStream:
        """Send the request that a body holds, for a whole answer or for its blocks."""
        try:
            given = json.loads(content)
        except (ValueError, RecursionError) as problem:
            raise _RefusedError(400, f"the body is not valid JSON ({problem})") from None
        if not isinstance(given, dict):
            raise _RefusedError(400, 'the body should be a JSON object: {"text_input": "..."}')
        given.pop("id", None)  # which Triton's HTTP takes; the server has names of its own
        nested = given.pop("parameters", {})
        if not isinstance(nested, dict):
            raise _RefusedError(400, "parameters should be a JSON object of options")
        given = {**nested, **given}
        why = unknown_name(given, [name for name in INPUTS if name not in NOT_HERE])
        if why is not None:
            raise _RefusedError(400, why)
        if is_whole and given.get("stream_mode") == "denoise":
            raise _RefusedError(
                400,
                "stream_mode is denoise, but `generate` gives the whole answer alone; POST to "
                f"/v2/models/{MODELS[0]}/generate_stream",
            )
        timeout = given.pop("timeout_seconds", None)
        prompt, ids = given.pop("text_input", None), given.pop("input_ids", None)
        options = cast(Options, {name: given[name] for name in OPTIONS if name in given})
        return self.door.client.stream(prompt, prompt_ids=ids, timeout=timeout, **options)

    def _send_whole(self, stream: AnswerStream) -> None:
        stream.on_queue = lambda place: self._check_there()
        for _ in stream:
            self._check_there()
        answer = stream.answer()
        self._send(
            200,
            {
                "model_name": MODELS[0],
                "request_id": answer.request_id,
                "text_output": answer.text,
                "prompt_ids": answer.prompt_ids,
                "output_ids": answer.ids,
                "masked_counts": [block.masked_counts for block in answer.blocks],
                "denoiser_calls": answer.denoiser_calls,
                "context_calls": answer.context_calls,
                "reused_tokens": answer.reused_tokens,
                "finish_reason": answer.finish_reason,
                **details_as_json(answer.details),
            },
        )

    def _send_blocks(self, stream: AnswerStream) -> None:
        """Send an event per block; a failure after the response has begun is an event, too."""
        events = _Events(self, stream)
        stream.on_queue = events.wait
        stream.on_canvas = lambda canvas: events.send(_canvas_values(canvas))
        try:
            for block in stream:
                events.send(_values(block))
        except ClientError as problem:
            if not events.begun:
                raise
            events.send({"error": str(problem), "status": _status_of(problem)})

    def _send(self, status: int, values: dict[str, Any], retry_after: float | None = None) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 503:
            self.send_header("Retry-After", retry_header(retry_after))
        self.end_headers()
        self.wfile.write(content)

    def _fail(self, status: int, message: str, retry_after: float | None = None) -> None:
        self._send(status, {"error": message}, retry_after)

    def _check_there(self) -> None:
        """Raise an error where the caller has closed its end."""
        if isinstance(self.connection, ssl.SSLSocket):
            return  # cannot be looked at without reading; the next write tells
        if not select.select([self.connection], [], [], 0)[0]:
            return
        if not self.connection.recv(1, socket.MSG_PEEK):
            raise BrokenPipeError("the caller has left")


class _Events:
    """Server-sent events of one answer; the first line begins the response.

    Attributes:
        begun: Whether the response has begun.
    """

    def __init__(self, handler: _Handler, stream: AnswerStream) -> None:
        self._handler, self._stream = handler, stream
        self._opened = time.monotonic()
        self._has_told = self.begun = False

    def send(self, values: dict[str, Any]) -> None:
        """Send an event; the first one tells of the request, too."""
        if not self._has_told:
            self._has_told = True
            reused, name = self._stream.reused_tokens, self._stream.request_id
            values = {**values, "reused_tokens": reused, "request_id": name}
        self._write(b"data: " + json.dumps(values).encode())

    def wait(self, place: int) -> None:
        """Send a comment that the request waits; no proxy takes it for dead then."""
        if self.begun or time.monotonic() - self._opened > PATIENCE_SECONDS:
            self._write(b": queued %d" % place)

    def _write(self, line: bytes) -> None:
        handler = self._handler
        if not self.begun:
            self.begun = True
            handler.send_response(200)
            handler.send_header("Content-Type", "text/event-stream")
            handler.send_header("Cache-Control", "no-cache")
            handler.send_header("Connection", "close")
            handler.end_headers()
        handler.wfile.write(line + b"\n\n")


def _values(block: Block) -> dict[str, Any]:
    return {
        "text_output": block.text,
        "output_ids": block.ids,
        "masked_counts": block.masked_counts,
        "denoiser_calls": block.denoiser_calls,
        "context_calls": block.context_calls,
        "finish_reason": block.finish_reason or "",
        **details_as_json(block.details),
    }


def _canvas_values(canvas: Canvas) -> dict[str, Any]:
    return {
        "text_output": "",
        "canvas_ids": canvas.ids,
        "canvas_confidence": canvas.confidence,
        "token_texts": canvas.texts,
    }


def _status_of(problem: ClientError) -> int:
    return next((status for kind, status in STATUSES if isinstance(problem, kind)), 500)


def read_order() -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the line that says how to serve; return it, and how a client reaches the server."""
    given = json.loads(sys.stdin.buffer.readline())
    files, credentials = given.get("tls"), None
    if files is not None:
        chain, secret = (Path(files[name]).read_bytes() for name in ("certificate", "key"))
        own = (secret, chain) if files["clients"] else ()
        credentials = grpc.ssl_channel_credentials(chain, *own)
    access = {"server_name": given.get("name"), "access_key": given.get("key")}
    return given, {"credentials": credentials, **access}


def main() -> None:
    """Serve until standard input ends."""
    given, access = read_order()
    files, tls = given.get("tls"), None
    if files is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(files["certificate"], files["key"])
        if files["clients"]:
            tls.load_verify_locations(files["clients"])
            tls.verify_mode = ssl.CERT_REQUIRED
    with TwoTowerClient(given["grpc"], **access) as client:
        door = Door((given["host"], given["port"]), client, given.get("key"), tls)
        threading.Thread(target=door.serve_forever, daemon=True).start()
        print(door.server_address[1], flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
