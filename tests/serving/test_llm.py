"""The model `llm`: what clients of other backends send, and what they get."""

from __future__ import annotations

import json
import struct

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from tests.support.served import freed_early
from twotower_engines.errors import RequestError
from twotower_engines.serving.llm import read_wish

PROMPT = "Mia the fox"
WIRE = {"i": "INT32", "u": "UINT64", "f": "FP32", "b": "BOOL", "O": "BYTES"}


def front_end_request(prompt, stream, max_tokens, stop=None, seed=None, temperature=1.0):
    """The arrays that Triton's OpenAI front end makes of a completion request.

    As `_create_trtllm_generate_request` of server/python/openai (e1db8a60) does, with the defaults
    of its schema: each is of two dimensions, penalties and `top_p` are always there.
    """
    inputs = {
        "text_input": np.array([[prompt.encode()]], object),
        "stream": np.bool_([[stream]]),
        "max_tokens": np.int32([[max_tokens]]),
    }
    if stop:
        inputs["stop_words"] = np.array([[one.encode() for one in stop]], object)
    inputs["top_p"] = np.float32([[1.0]])
    inputs["frequency_penalty"] = np.float32([[0.0]])
    inputs["presence_penalty"] = np.float32([[0.0]])
    if seed is not None:
        inputs["seed"] = np.uint64([[seed]])
    inputs["temperature"] = np.float32([[temperature]])
    inputs["exclude_input_in_output"] = np.bool_([[True]])
    inputs["return_num_input_tokens"] = np.bool_([[True]])
    inputs["return_num_output_tokens"] = np.bool_([[True]])
    return inputs


def message_of(inputs):
    message = service_pb2.ModelInferRequest(model_name="llm")
    for name, values in inputs.items():
        tensor = message.inputs.add()
        tensor.name, tensor.datatype = name, WIRE[values.dtype.kind]
        tensor.shape.extend(values.shape)
        if values.dtype.kind == "O":
            packed = [struct.pack("<I", len(one)) + one for one in values.reshape(-1)]
            message.raw_input_contents.append(b"".join(packed))
        else:
            message.raw_input_contents.append(values.tobytes())
    return message


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def ask(stub, inputs) -> list:
    responses = list(stub.ModelStreamInfer(iter([message_of(inputs)]), timeout=60))
    assert not any(one.error_message for one in responses), responses[0].error_message
    return [InferResult(one.infer_response) for one in responses if one.infer_response.outputs]


def text_of(response) -> str:
    """As the front end reads it: exactly one string in a response."""
    [text] = response.as_numpy("text_output").reshape(-1)
    return text.decode()


def number_of(response, name) -> int:
    values = response.as_numpy(name)
    assert values.dtype == np.int32
    return int(values.reshape(-1)[0])


@pytest.mark.server
def test_without_a_stream_there_is_one_response(stub, client) -> None:
    expected = client.generate(PROMPT, max_new_tokens=40, temperature=1.0, seed=7)
    [response] = ask(stub, front_end_request(PROMPT, False, 40, seed=7))
    assert text_of(response) == expected.text
    assert number_of(response, "num_input_tokens") == len(expected.prompt_ids)
    assert number_of(response, "num_output_tokens") == 40


@pytest.mark.server
def test_a_stream_has_a_response_for_each_block_and_counts_add_up(stub, client) -> None:
    expected = client.generate(PROMPT, max_new_tokens=40, temperature=1.0, seed=7)
    responses = ask(stub, front_end_request(PROMPT, True, 40, seed=7))
    assert [text_of(one) for one in responses] == [block.text for block in expected.blocks]
    counts = [number_of(one, "num_output_tokens") for one in responses]
    assert counts == [16, 16, 8]
    assert {number_of(one, "num_input_tokens") for one in responses} == {len(expected.prompt_ids)}


@pytest.mark.server
def test_stop_words_end_an_answer(stub, client) -> None:
    text = client.generate(PROMPT, max_new_tokens=40).text
    stops = [text[20:23], "never said"]
    [response] = ask(stub, front_end_request(PROMPT, False, 40, stops, temperature=0.0))
    assert text_of(response) == text[: text.index(stops[0])]
    assert response.as_numpy("finish_reason").reshape(-1)[0] == b"stop"


@pytest.mark.server
def test_without_a_seed_answers_differ(stub) -> None:
    texts = {text_of(ask(stub, front_end_request(PROMPT, False, 16))[0]) for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.server
def test_a_refusal_is_an_error(stub) -> None:
    inputs = front_end_request(PROMPT, False, 16)
    for name, value, said in (
        ("frequency_penalty", np.float32([[0.5]]), "frequency_penalty is 0.5, which cannot be had"),
        ("max_tokens", np.int32([[99999]]), "these engines hold 4096"),
        ("guided_decoding_guide", np.array([[b"{}"]], object), "guided_decoding_guide is"),
    ):
        message = message_of({**inputs, name: value})
        [response] = list(stub.ModelStreamInfer(iter([message]), timeout=60))
        assert response.error_message.startswith("INVALID_ARGUMENT: ")
        assert said in response.error_message


@pytest.mark.server
def test_a_caller_that_leaves_frees_its_slot(stub, client) -> None:
    message = message_of(front_end_request(PROMPT, True, 3900, seed=1))
    with freed_early(client, 3900):
        calls = [stub.ModelStreamInfer(iter([message])) for _ in range(2)]
        for call in calls:
            next(call)
        for call in calls:
            call.cancel()


@pytest.mark.server
def test_sampling_parameters_are_vllms(stub, client) -> None:
    sampling = {"max_tokens": 20, "temperature": 0, "threshold": 0.8, "top_k": -1, "n": 1}
    inputs = {
        "text_input": np.array([[PROMPT.encode()]], object),
        "sampling_parameters": np.array([[json.dumps(sampling).encode()]], object),
    }
    [response] = ask(stub, inputs)
    expected = client.generate(PROMPT, max_new_tokens=20, threshold=0.8)
    assert text_of(response) == expected.text


def wish(**inputs):
    tensors = {name: np.array([[value]]) for name, value in inputs.items()}
    tensors["text_input"] = np.array([[b"a"]], object)
    return read_wish(tensors)


def sampling(**values):
    return read_wish(
        {
            "text_input": np.array([b"a"], object),
            "sampling_parameters": np.array([json.dumps(values).encode()], object),
        }
    )


def test_values_that_ask_for_nothing_are_taken() -> None:
    neutral = {"presence_penalty": 0, "repetition_penalty": 1, "n": 1, "best_of": 1, "top_p": 1.0}
    assert sampling(**neutral, top_k=-1, min_p=0, logit_bias={}).options == {"stop": []}
    assert wish(beam_width=1, length_penalty=1.0, end_id=-1, top_p=0.0).options == {"stop": []}
    assert wish(top_k=1, temperature=0.7).options == {"temperature": 0.0, "stop": []}
    assert wish(stream=True, exclude_input_in_output=False).echo
    assert sampling(stop="x", stop_token_ids=[3]).options == {"stop": ["x"], "eos_ids": [3]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n": 2}, "n is 2, which cannot be had: a request has one answer"),
        ({"repetition_penalty": 1.2}, "there are no penalties"),
        ({"maxtokens": 2}, "there is no option 'maxtokens' (the nearest is max_tokens)"),
        ({"logit_bias": {"3": 1}}, "logits cannot be changed"),
        ({"logprobs": 5}, "logprobs is 5, which cannot be had: ask the model `twotower`"),
        ({"stream_mode": "denoise"}, "which cannot be had: ask the model `twotower`"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_said(values, said) -> None:
    with pytest.raises(RequestError) as refusal:
        sampling(**values)
    assert said in str(refusal.value)


def test_sampling_parameters_that_are_no_object_are_refused() -> None:
    for content in (b"[", b"[1]"):
        with pytest.raises(RequestError, match="sampling_parameters is no JSON"):
            read_wish(
                {
                    "text_input": np.array([b"a"], object),
                    "sampling_parameters": np.array([content], object),
                }
            )
