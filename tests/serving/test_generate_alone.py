"""The model `generate` called by itself, as a BLS model or an own pipeline would."""

from __future__ import annotations

import json
import struct
import time
import uuid

import grpc
import pytest
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

pytestmark = pytest.mark.server


@pytest.fixture
def call(server):
    """A function that sends a JSON object to `generate` and returns the gRPC call."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def send(values: object):
            message = service_pb2.ModelInferRequest(model_name="generate", id=uuid.uuid4().hex)
            tensor = message.inputs.add()
            tensor.name, tensor.datatype = "request", "BYTES"
            tensor.shape.append(1)
            content = values if isinstance(values, bytes) else json.dumps(values).encode()
            message.raw_input_contents.append(struct.pack("<I", len(content)) + content)
            return stub.ModelStreamInfer(iter([message]), timeout=30)

        yield send


def texts(response, name: str) -> str:
    return InferResult(response.infer_response).as_numpy(name)[0].decode()


def test_ids_come_block_by_block(call, client) -> None:
    job = {"request_id": "a", "prompt_ids": [9], "max_new_tokens": 40}
    parts = [InferResult(part.infer_response) for part in call(job)]
    ids = [token for part in parts for token in part.as_numpy("output_ids").tolist()]
    assert tuple(ids) == client.generate(prompt_ids=[9], max_new_tokens=40).ids
    assert len(parts) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        ({"request_id": "a", "prompt_ids": []}, "prompt is empty"),
        ({"request_id": "a", "prompt_ids": [1], "steps": 0}, "steps is 0"),
    ],
    ids=["no JSON", "no prompt", "no steps"],
)
def test_what_preprocess_would_refuse_is_refused_here_too(call, content, said) -> None:
    [part] = call(content)
    assert part.error_message == ""
    assert texts(part, "finish_reason") == "refused"
    assert said in texts(part, "error")


def test_cancelling_the_call_is_noticed(call, client) -> None:
    """Without an ensemble in between, Triton tells the model; no stop request is needed."""
    for number in (5, 6):
        job = {"request_id": "a", "prompt_ids": [number], "max_new_tokens": 4000, "threshold": 1.0}
        running = call(job)
        next(running)
        running.cancel()
    start = time.monotonic()
    client.generate(prompt_ids=[7], max_new_tokens=4)
    assert time.monotonic() - start < 3
