"""Requests that are wrong at every level, over gRPC and HTTP: refused, beside right ones."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
from collections.abc import Iterator

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from tests.support.malformed import is_refused, malformed_message
from tests.support.soak import bytes_of
from tests.support.waiting import wait_until
from twotower_client.http_door import MOST_BODY
from twotower_client.request import Message
from twotower_contract.options import INPUTS

pytestmark = pytest.mark.server
SEED = 11
SIZE = 100_000_000  # bytes
counts = pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "many"]
)


@contextlib.contextmanager
def others_are_answered(client) -> Iterator[None]:
    """Ask for the same answer again and again meanwhile; each must be the first one."""
    expected = client.generate(prompt_ids=[5], max_new_tokens=200).ids
    answers, end = [], threading.Event()

    def ask() -> None:
        while not end.is_set():
            answers.append(client.generate(prompt_ids=[5], max_new_tokens=200).ids)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(60)
    assert answers
    assert set(answers) == {expected}


@counts
def test_malformed_messages_are_refused_and_change_no_answer(server, client, count) -> None:
    draw = random.Random(SEED)
    with others_are_answered(client), grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for number in range(count):
            request = malformed_message(draw)
            try:
                parts = list(stub.ModelStreamInfer(iter([request]), timeout=20))
                refused = is_refused(request, parts)
            except grpc.RpcError as problem:
                refused = problem.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
            assert refused, (number, request)


def malformed_http(draw: random.Random) -> bytes:
    """Bytes that are no right request to generate: as HTTP, as JSON, or as a request."""
    path = draw.choice(["/v2/models/twotower/generate", "/v2/models/ensemble/generate_stream"])
    good = {"input_ids": [5], "max_new_tokens": 4}
    body = json.dumps(good).encode()
    length = str(len(body))
    line, headers = f"POST {path} HTTP/1.1", {}
    change = draw.randrange(7)
    if change == 0:
        return draw.randbytes(draw.randrange(1, 400)).replace(b"\n", b"") + b"\r\n\r\n"
    if change == 1:
        line = draw.choice([f"POST {path} HTTP/9.9", f"POST {path} {path} HTTP/1.1", "POST x y",
                            f"PUT {path} HTTP/1.1", f"POST {path}x HTTP/1.1",
                            f"POST /{'x' * draw.choice([10, 70_000])} HTTP/1.1"])  # fmt: skip
    elif change == 2:
        length = draw.choice(["", "-1", "x", "4.5", "1e9", "0", str(MOST_BODY + 1), "9" * 5000])
    elif change == 3:
        headers = draw.choice([{"Transfer-Encoding": "chunked"}, {"x" * 70_000: "y"},
                               {f"x{number}": "y" for number in range(200)}])  # fmt: skip
    elif change == 4:
        body = body[: draw.randrange(len(body))] + draw.choice([b"", b"\xff", b"{", b"[" * 99_999])
    elif change == 5:
        name = draw.choice([*INPUTS, "colour"])
        wrong = [{}, {"a": []}, [[]], [{}], float("nan"), -(2**63), 10**60, "\ud800"]
        body = json.dumps({"input_ids": [5], name: draw.choice(wrong)}).encode()
    else:
        body = json.dumps(draw.choice([[], 5, "a", None, [good], {"": 1}, {}])).encode()
    if change > 3:
        length = str(len(body))
    lines = [line, f"Content-Length: {length}", *(f"{a}: {b}" for a, b in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer_to(address: tuple[str, int], content: bytes) -> bytes:
    """Send bytes, and return all that comes back."""
    parts = []
    with socket.create_connection(address, timeout=30) as caller:
        with contextlib.suppress(OSError):  # it was refused before all was sent
            caller.sendall(content)
            caller.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):  # or before all was read
            while part := caller.recv(65536):
                parts.append(part)
    return b"".join(parts)


@counts
def test_malformed_http_is_refused_and_changes_no_answer(http, client, count) -> None:
    host, port = http.removeprefix("http://").split(":")
    draw, silent = random.Random(SEED), 0
    with others_are_answered(client):
        for number in range(count):
            content = malformed_http(draw)
            answer = answer_to((host, int(port)), content)
            silent += not answer
            status = answer.split(b" ", 2)[1:2]
            assert not answer or status[0][:1] == b"4" or status[0] in (b"501", b"505"), (
                number, content[:300], answer[:300]
            )  # fmt: skip
    assert silent < count / 20  # of those whose connection was reset before they read


@pytest.mark.slow  # 1.2 GB of prompts
def test_prompts_of_100_mb_are_refused_and_leave_nothing(server) -> None:
    """What a refused message took is free again, where its caller hears the refusal out.

    One who breaks off at that moment leaves the message in the server (2.51) now and then.
    """
    message, sizes = Message(), []
    message.add("text_input", b"x" * SIZE)
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc_address, options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(12):
            [part] = stub.ModelStreamInfer(iter([message.message]), timeout=60)
            assert "the prompt has 100000000 bytes" in part.error_message
            sizes.append(bytes_of(server))
    # on a busy machine the last are freed a moment later
    wait_until(lambda: bytes_of(server) < min(sizes[:4]) + 2 * SIZE)
