"""Everything that a client can do wrong, as the real server and the real client answer it."""

from __future__ import annotations

import gc
import signal
import statistics
import struct
import subprocess
import threading
import time

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

import twotower_client as tt
from tests.support import TWOTOWER
from tests.support.served import LONG, freed_early
from twotower_client import client as client_module
from twotower_client.request import Message

pytestmark = pytest.mark.server


def ask(client, **tensors) -> None:
    """Send tensors that the client's own checks would not let pass, and read the answer."""
    message = Message()
    for name, value in tensors.items():
        message.add(name, value)
    for _ in tt.AnswerStream(client, message.message, 20):
        pass


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"text_input": b""}, "prompt is empty"),
        ({"input_ids": []}, "prompt is empty"),
        ({"text_input": b"ab\xff"}, "text_input is not valid UTF-8 at byte 2"),
        ({"text_input": b"x" * 8_000_000}, "8000000 bytes"),
        ({"input_ids": [1] * 9000}, "prompt has 9000 tokens"),
        ({"text_input": b"x" * 20000}, "these engines hold 4096"),
        ({"input_ids": [1, 4096]}, "token 4096 at place 1 is outside the vocabulary"),
        ({"input_ids": [-1]}, "token -1 at place 0"),
        ({"input_ids": [1], "text_input": b"a"}, "either text_input or input_ids"),
        ({"max_new_tokens": 5}, "either text_input or input_ids"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 4096}, "4097 together"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"block_size": 65}, "these engines take 1 to 64"),
        ({"block_size": 0}, "block_size is 0; these engines take 1 to 64"),
        ({"mode": b"magic"}, "mode is 'magic'"),
        ({"policy": b"hope"}, "policy is 'hope'"),
        ({"policy": b"\xff"}, "policy is not valid UTF-8"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 5}, "leave them out, or use mode ar"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"eos_ids": [9999]}, "eos_ids: token 9999"),
        ({"timeout_seconds": -1.0}, "timeout_seconds is -1.0"),
        ({"queue_notice_seconds": -1.0}, "queue_notice_seconds is -1.0"),
        ({"cancel_request_id": b"."}, "cancel_request_id and input_ids are both given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_server_refuses(client, tensors, said) -> None:
    prompt = {} if {"text_input", "input_ids"} & set(tensors) or said.startswith("either") else None
    with pytest.raises(tt.RequestRefusedError) as refusal:
        ask(client, **(prompt if prompt is not None else {"input_ids": [1]}), **tensors)
    assert said in str(refusal.value)


def test_an_unknown_parameter_over_grpc_is_refused_by_name(client) -> None:
    message = Message()
    message.add("input_ids", [1])
    message.message.parameters["max_tokens"].int64_param = 5
    with pytest.raises(tt.RequestRefusedError, match="the nearest is max_new_tokens"):
        list(tt.AnswerStream(client, message.message, 20))


def test_what_triton_itself_takes_is_no_unknown_name(client) -> None:
    """The parameter with which tritonclient asks for the end."""
    message = Message()
    message.add("input_ids", [1])
    message.add("max_new_tokens", 4)
    message.message.parameters["triton_enable_empty_final_response"].bool_param = True
    assert len(tt.AnswerStream(client, message.message, 20).answer().ids) == 4


def test_a_refusal_over_grpc_is_told_as_documented(server) -> None:
    """A stream carries a message that begins with the code; unary calls have the code itself."""
    message = Message()
    message.add("input_ids", [1])
    message.add("max_new_tokens", 0)
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        [part] = stub.ModelStreamInfer(iter([message.message]), timeout=20)
        words = "INVALID_ARGUMENT: max_new_tokens is 0"
        assert part.error_message.startswith(words)
        assert part.infer_response.parameters["triton_final_response"].bool_param
        message.message.model_name = "preprocessing"
        with pytest.raises(grpc.RpcError) as refusal:
            stub.ModelInfer(message.message, timeout=20)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.value.details().startswith("INVALID_ARGUMENT: max_new_tokens is 0")


def test_a_prompt_of_one_token_works_in_every_mode(client) -> None:
    for mode in ("mask_diffusion", "mock_ar", "ar"):
        assert len(client.generate(prompt_ids=[9], mode=mode, max_new_tokens=3).ids) == 3


def test_triton_refuses_an_unknown_tensor_and_a_wrong_type(client) -> None:
    message = Message()
    message.add("input_ids", [1])
    message.add_tensor("colour", "INT32", 1, struct.pack("<i", 3))
    with pytest.raises(tt.RequestFailedError, match="unexpected inference input 'colour'"):
        list(tt.AnswerStream(client, message.message, 20))
    message = Message()
    message.add_tensor("input_ids", "INT64", 1, struct.pack("<q", 5))
    with pytest.raises(tt.RequestFailedError, match="data-type"):
        list(tt.AnswerStream(client, message.message, 20))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_closing_a_client_ends_its_streams(server, client, monkeypatch) -> None:
    monkeypatch.setattr(client_module, "STOP_SECONDS", 20.0)  # on a busy machine
    with freed_early(client):
        closing = tt.TwoTowerClient(server.grpc_address)
        read, dropped = (closing.stream(prompt_ids=[5], **LONG) for _ in range(2))
        next(read)
        next(dropped)
        names = [read.request_id, dropped.request_id]
        assert all(names)
        closing.close()
        with pytest.raises(tt.ClientError):
            list(read)
        del dropped
        gc.collect()
        for name in names:  # the closed client could not tell the server
            assert client.stop(name)


def test_deadline_frees_the_slot(client) -> None:
    """The client or the server is the first to say so; `slow` tests say how exactly."""
    with freed_early(client):
        for _ in range(2):
            with pytest.raises(tt.DeadlineError, match=r"0\.3"):
                client.generate(prompt_ids=[5], timeout=0.3, **LONG)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_deadlines_and_cancels_are_exact(client, how) -> None:
    """Within 0.1 s in the middle of nine: a busy machine delays some."""
    off, seconds = [], 0.3
    for _ in range(9):
        moments = [time.monotonic() + seconds]
        stream = client.stream(
            prompt_ids=[5], timeout=seconds if how == "deadline" else None, **LONG
        )

        def cancel(stream=stream, moments=moments) -> None:
            moments.append(time.monotonic())
            stream.cancel()

        if how == "cancel":
            threading.Timer(seconds, cancel).start()
        with pytest.raises(tt.DeadlineError if how == "deadline" else tt.RequestCancelledError):
            stream.answer()
        off.append(abs(time.monotonic() - moments[-1]))
    assert statistics.median(off) < 0.1, off


def test_the_server_gives_up_by_itself(client) -> None:
    """The client dies: neither cancellation nor a stop request reaches the model."""
    with pytest.raises(tt.DeadlineError, match=r"timeout_seconds, 0\.3"):
        ask(client, input_ids=[5], timeout_seconds=0.3, max_new_tokens=4000, threshold=1.0)


def test_inactivity(server) -> None:
    with (
        tt.TwoTowerClient(server.grpc_address, inactivity_timeout=0.001) as hasty,
        pytest.raises(tt.InactivityError, match=r"nothing came from the server for 0\.001 s"),
    ):
        hasty.generate(prompt_ids=[5], **LONG)


def test_cancel_from_another_thread(client) -> None:
    stream = client.stream(prompt_ids=[5], **LONG)
    threading.Timer(0.3, stream.cancel).start()
    with pytest.raises(tt.RequestCancelledError):
        stream.answer()
    assert not stream.is_done
    with pytest.raises(tt.RequestCancelledError):
        next(stream)


def test_dropping_a_stream_stops_the_request(client) -> None:
    with freed_early(client):
        for number in (5, 6):  # as many as there are slots
            for _ in client.stream(prompt_ids=[number], **LONG):
                break


def test_ctrl_c_stops_the_request(server, client) -> None:
    command = [*TWOTOWER, "generate", "--prompt-ids", "5"]
    command += ["--url", server.grpc_address, "--stream"]
    command += ["--max-new-tokens", "4000", "--threshold", "1"]
    pipe = subprocess.PIPE
    with freed_early(client):
        running = [subprocess.Popen(command, stdout=pipe, stderr=pipe) for _ in range(2)]
        for one in running:
            assert one.stdout.read(1)
            one.send_signal(signal.SIGINT)
        for one in running:
            _, said = one.communicate(timeout=60)
            assert one.returncode == 130
            assert b"Traceback" not in said


def test_nobody_listens() -> None:
    with tt.TwoTowerClient("127.0.0.1:9") as lonely:
        with pytest.raises(tt.ServerUnavailableError, match="no Triton server answers at 127"):
            lonely.generate("a")
        with pytest.raises(tt.ServerUnavailableError):
            lonely.check_ready()


def test_the_http_port_is_no_grpc_port(http) -> None:
    with (
        tt.TwoTowerClient(http.removeprefix("http://")) as lost,
        pytest.raises(tt.ServerUnavailableError, match="not the HTTP port"),
    ):
        lost.generate("a")
