"""The door that TensorRT-LLM's users know: the ensemble, and what its steps say to each other."""

from __future__ import annotations

import json
import struct

import grpc
import pytest
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from tests.support.served import LONG, freed_early
from twotower_client.request import Message

pytestmark = pytest.mark.server


@pytest.fixture
def infer(server):
    """A function that sends a message and returns the gRPC call."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        yield lambda message: stub.ModelStreamInfer(iter([message]), timeout=30)


@pytest.fixture
def call(infer):
    """A function that sends inputs to a model and returns the gRPC call."""

    def send(model: str = "ensemble", **inputs):
        message = Message()
        message.message.model_name = model
        for name, value in inputs.items():
            message.add(name, value)
        return infer(message.message)

    return send


def outputs(part) -> dict:
    assert part.error_message == ""
    result = InferResult(part.infer_response)
    return {one.name: result.as_numpy(one.name).tolist() for one in part.infer_response.outputs}


def test_both_doors_give_the_same_answer(call, client) -> None:
    parts = [outputs(one) for one in call(text_input="Mia the café".encode(), max_new_tokens=40)]
    answer = client.generate("Mia the café", max_new_tokens=40)
    assert b"".join(one["text_output"][0] for one in parts).decode() == answer.text
    assert tuple(token for one in parts for token in one["output_ids"]) == answer.ids
    assert tuple(parts[0]["prompt_ids"]) == answer.prompt_ids
    assert [one["finish_reason"] for one in parts] == [[b""], [b""], [b"length"]]
    assert [tuple(one["masked_counts"]) for one in parts] == [
        b.masked_counts for b in answer.blocks
    ]


def test_a_refusal_is_an_error_of_the_first_step(call) -> None:
    [part] = call(input_ids=[5], max_new_tokens=0)
    words = "in ensemble 'ensemble', INVALID_ARGUMENT: max_new_tokens is 0"
    assert part.error_message.startswith(words)


@pytest.mark.parametrize(
    ("asked", "beside", "nothing"),
    [
        ({"logprobs": True}, {}, {"logprobs": False}),
        ({"top_logprobs": 2}, {"mode": "ar"}, {"top_logprobs": 0}),
        ({"stream_mode": "denoise"}, {}, {"stream_mode": "block"}),
    ],
    ids=str,
)
def test_what_it_could_not_tell_is_refused_by_name(call, asked, beside, nothing) -> None:
    [(name, value)] = asked.items()
    [part] = call(input_ids=[5], max_new_tokens=4, **asked, **beside)
    words = f"INVALID_ARGUMENT: {name} is {value}, but the model `ensemble` has no output for it"
    assert words in part.error_message
    assert "ask the model `twotower`" in part.error_message
    [part] = call(input_ids=[5], max_new_tokens=4, **nothing, **beside)
    assert len(outputs(part)["output_ids"]) == 4


def test_a_later_failure_is_told_in_an_output(call) -> None:
    *_, last = call(input_ids=[5], timeout_seconds=0.3, **LONG)
    values = outputs(last)
    assert values["finish_reason"] == [b"late"]
    assert b"timeout_seconds, 0.3" in values["error"][0]


def test_a_request_is_cancelled_by_the_servers_name_of_it(call) -> None:
    """The ensemble does not pass on that its caller left."""
    running = call(input_ids=[5], **LONG)
    [name] = outputs(next(running))["request_id"]
    [told] = call(cancel_request_id=name)
    assert outputs(told)["finish_reason"] == [b"cancelled"]
    *_, last = running
    assert outputs(last)["finish_reason"] == [b"cancelled"]


def test_a_probe_passes_all_steps(call) -> None:
    for model in ("ensemble", "twotower"):
        [part] = call(model, probe=1)
        assert outputs(part)["finish_reason"] == [b"length"]
    assert json.loads(outputs(part)["text_output"][0]).keys() == {
        "running", "waiting", "turns", "draining"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        ({"request_id": "a", "prompt_ids": []}, "prompt is empty"),
        ({"request_id": "a", "prompt_ids": [1], "steps": 0}, "steps is 0"),
    ],
    ids=["no JSON", "deep", "no prompt", "no steps"],
)
def test_what_the_first_step_would_refuse_is_refused_by_the_second(infer, content, said) -> None:
    message = service_pb2.ModelInferRequest(model_name="twotower")
    tensor = message.inputs.add()
    tensor.name, tensor.datatype = "request", "BYTES"
    tensor.shape.append(1)
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    message.raw_input_contents.append(struct.pack("<I", len(content)) + content)
    [part] = infer(message)
    values = outputs(part)
    assert values["finish_reason"] == [b"refused"]
    assert said in values["error"][0].decode()


def test_a_caller_of_the_model_who_leaves_frees_the_slot(call, client) -> None:
    with freed_early(client):
        for number in (5, 6):
            running = call("twotower", input_ids=[number], **LONG)
            next(running)
            running.cancel()
