"""The model over HTTP: whole answers, streams, and everything that a caller can do wrong."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from unittest import mock

import pytest

from tests.support.fake_server import failure, fake_server, part
from tests.support.served import LONG, freed_early
from tests.support.waiting import wait_until
from twotower_client import TwoTowerClient, core, http_door
from twotower_client.http_door import MOST_BODY, Door
from twotower_contract.statuses import try_again

pytestmark = pytest.mark.server


def post(url: str, body: object, path: str = "generate", model: str = "twotower", **headers: str):
    """Send a body; return the status and the body of the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v2/models/{model}/{path}", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


@pytest.mark.parametrize("model", ["twotower", "ensemble"])
def test_generate_gives_the_whole_answer(http, client, model) -> None:
    options = {"max_new_tokens": 40, "mode": "ar", "seed": 2**64 - 1, "temperature": 0.5}
    status, body = post(http, {"id": "a", "text_input": "Once upon", **options}, model=model)
    values, answer = json.loads(body), client.generate("Once upon", **options)
    assert status == 200
    assert values["text_output"] == answer.text
    assert tuple(values["output_ids"]) == answer.ids
    assert tuple(values["prompt_ids"]) == answer.prompt_ids
    assert (values["finish_reason"], values["context_calls"]) == ("length", answer.context_calls)


def events_of(body: str) -> list[dict]:
    """The events of a stream; comments are none."""
    lines = [line for line in body.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_what_is_told_of_tokens_has_the_names_of_the_models_outputs(http, client) -> None:
    options = {"max_new_tokens": 20, "mode": "ar", "logprobs": True, "top_logprobs": 2}
    answer = client.generate("Once upon", **options)
    whole = json.loads(post(http, {"text_input": "Once upon", **options})[1])
    blocks = events_of(post(http, {"text_input": "Once upon", **options}, "generate_stream")[1])
    expected = {
        "logprobs": [one.logprob for one in answer.details],
        "commit_steps": [one.call for one in answer.details],
        "token_texts": [one.text for one in answer.details],
        "top_ids": [token for one in answer.details for token, _ in one.top],
        "top_logprobs": [value for one in answer.details for _, value in one.top],
    }
    assert len(expected["top_ids"]) == 2 * len(expected["logprobs"]) == 40
    for name, values in expected.items():
        assert whole[name] == values
        assert [value for block in blocks for value in block[name]] == values


def test_a_stream_shows_the_block_after_each_step(http, client) -> None:
    options = {"max_new_tokens": 20, "stream_mode": "denoise"}
    canvases = []
    with client.stream("Once upon", **options) as stream:
        stream.on_canvas = canvases.append
        answer = stream.answer()
    status, body = post(http, {"text_input": "Once upon", **options}, "generate_stream")
    events = events_of(body)
    assert status == 200
    assert [one["request_id"] != "" for one in events if "request_id" in one] == [True]
    assert "".join(one["text_output"] for one in events) == answer.text
    shown = [one for one in events if "canvas_ids" in one]
    assert len(shown) == len(canvases) > 2
    assert any(-1 in one["canvas_ids"] for one in shown)
    for one, canvas in zip(shown, canvases, strict=True):
        told = (one["canvas_ids"], one["canvas_confidence"], one["token_texts"])
        assert tuple(map(tuple, told)) == (canvas.ids, canvas.confidence, canvas.texts)
    status, body = post(http, {"text_input": "Once upon", **options})
    assert status == 400
    assert "POST to /v2/models/twotower/generate_stream" in json.loads(body)["error"]


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": 5}, "it must be text"),
        ({"input_ids": "567"}, "prompt_ids"),
        ({"input_ids": [99999]}, "outside the vocabulary"),
        ({}, "there is no prompt"),
        ({"text_input": "hi", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"text_input": "hi", "max_new_tokens": 4294967300}, "max_new_tokens is 4294967300"),
        ({"text_input": "hi", "max_new_tokens": "4"}, "it must be a whole number"),
        ({"text_input": "hi", "max_new_tokens": True}, "it must be a whole number"),
        ({"text_input": "hi", "max_new_tokens": 4.5}, "it must be a whole number"),
        ({"text_input": "hi", "threshold": "x"}, "it must be a number"),
        ({"text_input": "hi", "colour": "."}, "there is no option 'colour'"),
        ({"text_input": "hi", "max_tokens": 5}, "(the nearest is max_new_tokens)"),
        ({"text_input": "hi", "parameters": {"treshold": 1}}, "(the nearest is threshold)"),
        ({"text_input": "hi", "parameters": 5}, "parameters should be a JSON object"),
        ({"text_input": "hi", "timeout_seconds": -1}, "timeout is -1"),
        ({"text_input": "hi", "cancel_request_id": "x"}, "no option 'cancel_request_id'"),
        ({"probe": 1}, "there is no option 'probe'"),
        ([], "should be a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"", "not valid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_is_a_bad_request(http, path, body, said) -> None:
    status, answer = post(http, body, path)
    assert status == 400
    assert said in json.loads(answer)["error"]


def test_a_time_that_is_over_and_paths_that_are_not_there(http) -> None:
    status, answer = post(http, {"input_ids": [5], "timeout_seconds": 0.3, **LONG})
    assert status == 504
    assert "0.3" in json.loads(answer)["error"]
    for model in ("preprocessing", "other"):
        assert post(http, {"text_input": "hi"}, model=model)[0] == 404
    for path in ("/v2/logging", "/v2/systemsharedmemory/region/x/register", "/"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(http + path, b"{}", timeout=30)
        assert refusal.value.code == 404


def test_a_time_that_is_over_after_a_block_is_an_event() -> None:
    late = fake_server(lambda request, context: iter([part(text="a", ids=(5,)), failure("late")]))
    with late as url, door_before(url) as port:
        status, body = post(f"http://127.0.0.1:{port}", {"input_ids": [5]}, "generate_stream")
    block, last = events_of(body)
    assert (status, block["output_ids"], last["status"]) == (200, [5], 504)


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("said", "header"), [(try_again(2.5), "3"), (try_again(0.5), "1"), ("shutting down", "1")]
)
def test_a_busy_server_says_when_to_come_again(path, said, header) -> None:
    busy = fake_server(lambda request, context: iter([failure("busy", said)]))
    with busy as url, door_before(url) as port:
        address = f"http://127.0.0.1:{port}/v2/models/twotower/{path}"
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(address, b'{"text_input": "hi"}', timeout=30)
        assert (refusal.value.code, refusal.value.headers["Retry-After"]) == (503, header)


def test_bodies_are_bounded(http) -> None:
    """Neither is read: the connection ends instead."""
    host = http.removeprefix("http://")
    for header, value, status in (
        ("Content-Length", str(MOST_BODY + 1), 413),
        ("Content-Length", "-5", 411),
        ("Transfer-Encoding", "chunked", 411),
    ):
        connection = http_client(host)
        connection.putrequest("POST", "/v2/models/twotower/generate")
        connection.putheader(header, value)
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == status
        assert json.load(response)["error"]
        connection.close()


def http_client(host: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(host, timeout=30)


def test_a_caller_who_leaves_frees_the_slot(http, client) -> None:
    host, port = http.removeprefix("http://").split(":")
    for path in ("generate", "generate_stream"):
        body = json.dumps({"input_ids": [5], "block_size": 1, **LONG}).encode()
        head = f"POST /v2/models/twotower/{path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        with freed_early(client), socket.create_connection((host, int(port))) as caller:
            caller.sendall(head.encode() + body)
            wait_until(lambda: client.probe()["running"])


@pytest.fixture
def busy(client):
    """Both slots of the server are taken; gives the function that frees them."""
    streams = [client.stream(prompt_ids=[number], **LONG) for number in (5, 6)]
    for stream in streams:
        next(stream)
    yield lambda: [stream.cancel() for stream in streams]
    for stream in streams:
        stream.cancel()


@contextmanager
def door_before(url: str):
    """The port of HTTP before a server, where a notice comes each 0.5 s."""
    with (
        mock.patch.object(core, "NOTICE_SECONDS", 0.5),
        TwoTowerClient(url) as asking,
        Door(("127.0.0.1", 0), asking) as door,
    ):
        threading.Thread(target=door.serve_forever, args=(0.02,), daemon=True).start()
        yield door.server_address[1]
        door.shutdown()


@pytest.fixture
def impatient(monkeypatch):
    """Streams over HTTP begin at once."""
    monkeypatch.setattr(http_door, "PATIENCE_SECONDS", 0.0)


def test_a_stream_that_waits_says_so(server, impatient, busy) -> None:
    with door_before(server.grpc_address) as port:
        connection = http_client(f"127.0.0.1:{port}")
        body = json.dumps({"input_ids": [7], "max_new_tokens": 4})
        connection.request("POST", "/v2/models/twotower/generate_stream", body)
        response = connection.getresponse()
        assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream")
        assert [response.readline() for _ in range(4)] == [b": queued 1\n", b"\n"] * 2
        busy()
        [block] = events_of(response.read().decode())
        assert len(block["output_ids"]) == 4
        assert block["request_id"]
        connection.close()


def test_a_failure_after_a_stream_began_to_wait_is_an_event(monkeypatch) -> None:
    def answer(request, context):
        yield part(place=3)
        yield failure("late", "waited for a slot")

    with fake_server(answer) as url, door_before(url) as port:
        ask = (f"http://127.0.0.1:{port}", {"input_ids": [7]}, "generate_stream")
        assert post(*ask)[0] == 504, "nothing is sent so soon"
        monkeypatch.setattr(http_door, "PATIENCE_SECONDS", 0.0)
        status, body = post(*ask)
    assert (status, body.splitlines()[0]) == (200, ": queued 3")
    [event] = events_of(body)
    assert event["status"] == 504
    assert "waited for a slot" in event["error"]


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_a_caller_who_leaves_while_it_waits_is_noticed(impatient, path) -> None:
    asked, left = threading.Event(), threading.Event()

    def answer(request, context):
        context.add_callback(left.set)
        asked.set()
        while not left.wait(0.1):
            yield part(place=1)

    body = b'{"input_ids": [7]}'
    head = f"POST /v2/models/twotower/{path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    with fake_server(answer) as url, door_before(url) as port:
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.sendall(head.encode() + body)
            assert asked.wait(20)
        assert left.wait(20)


def test_health_is_the_engines_own(http) -> None:
    for path in ("live", "ready"):
        with urllib.request.urlopen(f"{http}/v2/health/{path}", timeout=30) as response:
            assert json.load(response)["draining"] is False


def test_a_key_and_encryption(server, tmp_path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=certificate)
    with (
        TwoTowerClient(server.grpc_address) as asking,
        Door(("127.0.0.1", 0), asking, "secret", tls) as door,
    ):
        threading.Thread(target=door.serve_forever, args=(0.02,), daemon=True).start()
        url = f"https://localhost:{door.server_address[1]}/v2/models/twotower/generate"
        body = json.dumps({"input_ids": [5], "max_new_tokens": 4}).encode()
        for sent in ({}, {"Authorization": "Bearer other"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(
                    urllib.request.Request(url, body, sent), timeout=30, context=trusting
                )
        request = urllib.request.Request(url, body, {"Authorization": "Bearer secret"})
        with urllib.request.urlopen(request, timeout=30, context=trusting) as response:
            assert len(json.load(response)["output_ids"]) == 4
        door.shutdown()
