"""A gRPC server that speaks Triton's protocol and does what a test tells it."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from twotower_contract.statuses import Failure, text_of

Answer = Callable[[Any, Any], Iterator[Any]]


def part(finish_reason: str = "", text: str = "", ids: tuple[int, ...] = (), place: int = 0) -> Any:
    """One response of the served model."""
    message = service_pb2.ModelStreamInferResponse()
    numbers = {
        "output_ids": ids,
        "prompt_ids": (5,),
        "masked_counts": (),
        "denoiser_calls": (0,),
        "context_calls": (0,),
        "queue_place": (place,),
    }
    texts = {"text_output": text, "finish_reason": finish_reason, "error": ""}
    for name, values in numbers.items():
        _add(message.infer_response, name, "INT32", len(values), np.array(values, "<i4").tobytes())
    for name, value in texts.items():
        content = value.encode()
        content = struct.pack("<I", len(content)) + content
        _add(message.infer_response, name, "BYTES", 1, content)
    return message


def failure(kind: Failure, message: str = "for a test") -> Any:
    """The response that ends an answer early."""
    return service_pb2.ModelStreamInferResponse(error_message=text_of(kind, message))


def _add(response: Any, name: str, kind: str, count: int, content: bytes) -> None:
    tensor = response.outputs.add()
    tensor.name, tensor.datatype = name, kind
    tensor.shape.append(count)
    response.raw_output_contents.append(content)


@contextmanager
def fake_server(answer: Answer, ready: Answer | None = None, port: int = 0) -> Iterator[str]:
    """Serve, and give `host:port`.

    Args:
        answer: The request and gRPC's context to the responses of a stream. A request that cancels
            another is answered without asking it.
        ready: The same for a look at the readiness; ready where it is None.
        port: Port; 0 takes a free one.
    """

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelReady(self, request, context):
            if ready is not None:
                list(ready(request, context))
            return service_pb2.ModelReadyResponse(ready=True)

        def ModelStreamInfer(self, requests, context):
            for request in requests:
                if request.inputs[0].name == "cancel_request_id":
                    yield part("cancelled")
                else:
                    yield from answer(request, context)

    server = grpc.server(ThreadPoolExecutor(16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@contextmanager
def balancer(status: int) -> Iterator[str]:
    """Give the address of something that answers each HTTP/2 call with a status of HTTP."""

    def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
        head = len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        return head + content

    def exactly(caller: socket.socket, count: int) -> bytes:
        content = b""
        while len(content) < count:
            more = caller.recv(count - len(content))
            if not more:
                raise ConnectionError
            content += more
        return content

    def answer(caller: socket.socket) -> None:
        headers, settings, end = 1, 4, 4 | 1
        try:
            exactly(caller, len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
            caller.sendall(frame(settings, 0, 0))
            while True:
                head = exactly(caller, 9)
                exactly(caller, int.from_bytes(head[:3], "big"))
                kind, stream = head[3], int.from_bytes(head[5:], "big")
                if kind == settings and not head[4] & 1:
                    caller.sendall(frame(settings, 1, 0))
                elif kind == headers:  # `:status` is name 8 of HPACK's table, with a literal value
                    caller.sendall(frame(headers, end, stream, b"\x08\x03" + b"%d" % status))
        except OSError:
            caller.close()

    def accept() -> None:
        try:
            while True:
                caller, _ = listener.accept()
                threading.Thread(target=answer, args=(caller,), daemon=True).start()
        except OSError:
            return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
