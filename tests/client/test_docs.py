"""The examples of docs/call.md and the notebook work as they stand, but for the port."""

from __future__ import annotations

import io
import json
import re
import shlex
import urllib.request
from contextlib import redirect_stdout

import grpc
import pytest

from tests.support import ROOT
from tests.support.command import twotower

pytestmark = pytest.mark.server
TEXT = (ROOT / "docs" / "call.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def run(code: str, server) -> str:
    with redirect_stdout(io.StringIO()) as out:
        exec(code.replace("localhost:8001", server.grpc_address), {})
    return out.getvalue()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python(server, number) -> None:
    assert run(blocks("python")[number], server).strip()


def test_notebook(server, client) -> None:
    """Its cells in their order, as a notebook without Jupyter; outputs are not kept in the file."""
    notebook = json.loads((ROOT / "docs" / "examples" / "first-steps.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    shown = run("\n".join("".join(cell["source"]) for cell in cells), server)
    answer = client.generate("Mia the fox lived by the river.", max_new_tokens=48)
    assert shown.startswith(answer.text + "\n48 tokens in ")
    assert "failed: " not in shown
    counts = [int(count) for count in re.findall(r"^ *(\d+) tokens: ", shown, flags=re.MULTILINE)]
    assert counts == [16, 16, 16]


@pytest.mark.parametrize("language", ["go", "ts"])
def test_other_languages(server, client, language) -> None:
    """What their code sends, with its names and types, gives the answer; no test runs it."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    [code] = blocks(language)
    pattern = r'[Nn]ame: "(\w+)", [Dd]atatype: "(\w+)",'
    inputs = re.findall(pattern, code)
    contents = {
        "BYTES": service_pb2.InferTensorContents(bytes_contents=[b"Mia the fox"]),
        "INT32": service_pb2.InferTensorContents(int_contents=[48]),
    }
    request = service_pb2.ModelInferRequest(model_name="twotower")
    for name, wire in inputs:
        request.inputs.add(name=name, datatype=wire, shape=[1], contents=contents[wire])
    text = b""
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for response in stub.ModelStreamInfer(iter([request]), timeout=60):
            assert not response.error_message
            outputs = response.infer_response.outputs
            for output, raw in zip(
                outputs, response.infer_response.raw_output_contents, strict=True
            ):
                text += raw[4:] if output.name == "text_output" else b""
    assert text.decode() == client.generate("Mia the fox", max_new_tokens=48).text


def test_shell(server) -> None:
    lines = [line for line in blocks("sh")[0].splitlines() if line.startswith("twotower ")]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.replace("localhost:8001", server.grpc_address))[1:]
        if "--url" not in words:
            words += ["--url", server.grpc_address]
        ran = twotower(*words)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip()


def test_http(http) -> None:
    """What the line with curl sends, sent without curl, which not every machine has."""
    [command] = re.findall(r"curl -N .*?}'", "".join(blocks("sh")), flags=re.DOTALL)
    _, _, address, _, data = shlex.split(command.replace("\\\n", ""))
    url = address.replace("localhost:8000", http)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data.encode()), timeout=60) as response:
        lines = response.read().decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert len(events) == 3
    assert events[-1]["finish_reason"] == "length"


def test_each_option_over_http(http, client) -> None:
    """Each line gives the answer of our client, and what it asks to be told beside."""
    from twotower_contract.options import OPTIONS

    lines = [line for block in blocks("sh") for line in block.splitlines() if "generate" in line]
    told = set()
    for line in (one for one in lines if one.startswith("curl localhost")):
        _, address, _, data = shlex.split(line)
        asked = json.loads(data)
        told |= set(asked)
        url = address.replace("localhost:8000", http)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, data.encode()), timeout=60) as response:
            content = response.read().decode()
        pieces = content.split("data: ")[1:] if address.endswith("_stream") else [content]
        events = [json.loads(piece) for piece in pieces]
        with client.stream(asked.pop("text_input"), **asked) as stream:
            canvases = []
            stream.on_canvas = canvases.append
            answer = stream.answer()
        assert "".join(event["text_output"] for event in events) == answer.text, line
        assert [event["canvas_ids"] for event in events if "canvas_ids" in event] == [
            list(canvas.ids) for canvas in canvases
        ]
        assert bool(canvases) is (asked.get("stream_mode") == "denoise"), line
        logprobs = [value for event in events for value in event.get("logprobs", ())]
        assert logprobs == [token.logprob for token in answer.details], line
        assert len(logprobs) == (len(answer.ids) if asked.get("logprobs") else 0), line
        tops = [value for event in events for value in event.get("top_ids", ())]
        assert len(tops) == asked.get("top_logprobs", 0) * len(answer.ids), line
    assert told == {"text_input", *OPTIONS}


def test_the_options_are_all_there() -> None:
    from twotower_contract.options import OPTIONS

    table = TEXT.partition("| option |")[2].partition("###")[0]
    listed = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows(table))))
    assert listed == set(OPTIONS)


def test_the_exceptions_are_all_there() -> None:
    import twotower_client

    table = TEXT.partition("| exception |")[2].partition("There is always")[0]
    listed = {row.split("`")[1] for row in rows(table)}
    ours = {name for name in twotower_client.__all__ if name.endswith("Error")}
    assert listed == ours - {"ClientError"}


def rows(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("| `")]
