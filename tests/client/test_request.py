"""What the client refuses by itself, and what it sends. No server is needed."""

from __future__ import annotations

import asyncio
import gc
import struct

import numpy as np
import pytest
from click.testing import CliRunner

import twotower_client as tt
from twotower_client.generate_cli import generate
from twotower_client.request import cancel_request, infer_request
from twotower_contract.command_line import read_prompt
from twotower_contract.options import OPTIONS


@pytest.fixture(scope="module")
def client():
    # nobody listens there: a request that were sent would give ServerUnavailableError
    with tt.TwoTowerClient("127.0.0.1:9") as made:
        yield made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "there is no prompt; give a prompt or prompt_ids"),
        ({"prompt": "a", "prompt_ids": [1]}, "both given; leave one of them out"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt": b"a"}, "prompt is bytes; it must be text"),
        ({"prompt": "a\ud800"}, "not valid Unicode at character 1"),
        ({"prompt_ids": [1, -2]}, "-2 at place 1 is no token id"),
        ({"prompt_ids": [1, 2**31]}, "2147483648 at place 1"),
        ({"prompt_ids": [1, "x"]}, "'x' at place 1"),
        ({"prompt_ids": [1, 1.5]}, "1.5 at place 1"),
        ({"prompt_ids": [True]}, "True at place 0"),
        ({"prompt_ids": 5}, "prompt_ids is 5; it must be a list of token ids"),
        ({"prompt_ids": "567"}, "prompt_ids is '567'; it must be a list of token ids"),
        ({"prompt_ids": np.array(5)}, "prompt_ids is array(5); it must be a list of token ids"),
        ({"prompt_ids": np.array([[5, 6]])}, "array([5, 6]) at place 0"),
        ({"prompt_ids": np.array([5.0])}, "at place 0 is no token id"),
        (
            {"max_new_tokens": 0},
            "max_new_tokens is 0; it must be at least 1 and at most 2147483647",
        ),
        ({"max_new_tokens": 2**31}, "max_new_tokens is 2147483648"),
        ({"max_new_tokens": 1.0}, "max_new_tokens is 1.0; it must be a whole number"),
        ({"block_size": 2**31}, "block_size is 2147483648"),
        ({"block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"mode": 5}, "mode is 5; it must be one of mask_diffusion, mock_ar, ar"),
        ({"mode": "\udcff"}, "it must be one of mask_diffusion"),
        ({"policy": "hope"}, "policy is 'hope'; it must be one of threshold, quota"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"threshold": 0}, "threshold is 0; it must be more than 0 and at most 1"),
        (
            {"threshold": 1.01},
            "threshold is 1.01; it must be more than 0 and at most 1 with policy",
        ),
        ({"threshold": 1e-50}, "threshold is 1e-50; it must be more than 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.9"}, "threshold is '0.9'; it must be a number"),
        ({"threshold": float("inf"), "policy": "factor"}, "threshold is inf"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 (greedy), or at least 1e-06"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1e300}, "at least 1e-06 and at most 3.4e+38"),
        ({"temperature": 10**400}, "at least 1e-06 and at most 3.4e+38"),
        ({"temperature": 1e-7}, "temperature is 1e-07; it must be 0 (greedy)"),
        ({"threshold": 1e300, "policy": "factor"}, "threshold is 1e+300"),
        ({"top_k": -1}, "top_k is -1; it must be 0 (keeps all), or at least 1"),
        ({"top_k": 5}, "mask_diffusion draws from all tokens; leave them out, or use mode ar"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"eos_ids": [-1]}, "eos_ids: -1 at place 0"),
        ({"eos_ids": 5}, "eos_ids is 5; it must be a list of token ids"),
        ({"canvas": {}}, "canvas is {}; it must be a list of token ids"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": "5"}, "timeout is '5'; it must be a number of seconds"),
        (
            {"timeout": 1e30},
            "timeout is 1e+30; it must be a number of seconds, more than 0 and below 1e+09",
        ),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": float("inf")}, "timeout is inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_anything_is_sent(client, arguments, said) -> None:
    if (
        not {"prompt", "prompt_ids"} & set(arguments)
        and said != "there is no prompt; give a prompt or prompt_ids"
    ):
        arguments = {"prompt": "a", **arguments}
    with pytest.raises(tt.RequestRefusedError) as refusal:
        client.stream(**arguments)
    assert said in str(refusal.value)


def test_an_unknown_option_is_a_mistake_of_the_caller(client) -> None:
    with pytest.raises(
        TypeError,
        match=r"no option 'treshold' \(the nearest is threshold\); the options are mode, max_new",
    ):
        client.stream("a", treshold=0.9)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("beam_width", "beam_width cannot be had: there is no beam search; draw several"),
        ("repetition_penalty", "repetition_penalty cannot be had: .* max_repetition_run ends"),
        ("logit_bias", "logit_bias cannot be had: .* canvas fixes tokens"),
        ("n", "n cannot be had: a request has one answer"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(client, name, said) -> None:
    with pytest.raises(TypeError, match=said):
        client.stream("a", **{name: 2})


@pytest.mark.parametrize(
    "url",
    [
        "localhost",
        "http://localhost:8000",
        "grpc://a:1",
        "a:",
        "",
        ":8001",
        "localhost:99999",
        "localhost:0",
        "localhost:²",
        "a:" + "9" * 5000,
        None,
        8001,
    ],
)
def test_a_url_that_is_no_address(url) -> None:
    with pytest.raises(tt.RequestRefusedError, match="give host:port"):
        tt.TwoTowerClient(url)


@pytest.mark.parametrize("url", ["localhost:1", "127.0.0.1:65535", "[::1]:8001"])
def test_a_url_that_is_an_address(url) -> None:
    assert tt.TwoTowerClient(url).url == url


@pytest.mark.parametrize("ids", [np.array([5, 6, 7]), (5, 6, 7), range(5, 8), iter([5, 6, 7])])
def test_ids_come_as_any_sequence(ids) -> None:
    message = infer_request(None, ids, {}, 1.5)
    assert message.raw_input_contents[0] == struct.pack("<3i", 5, 6, 7)
    assert list(message.inputs[0].shape) == [3]


def test_an_option_that_is_none_is_left_out() -> None:
    message = infer_request("a", None, dict.fromkeys(OPTIONS), 1.5)
    assert [tensor.name for tensor in message.inputs] == ["text_input", "timeout_seconds"]


@pytest.mark.parametrize(("patience", "notice"), [(4.0, 4 / 3), (15.0, 5.0), (60.0, 5.0)])
def test_the_server_is_asked_for_notices_before_the_patience_ends(patience, notice) -> None:
    """With time for two that come late."""
    with tt.TwoTowerClient("127.0.0.1:9", inactivity_timeout=patience) as client:
        message, _ = client._request("a", None, None, {})
    place = [tensor.name for tensor in message.inputs].index("queue_notice_seconds")
    assert struct.unpack("<f", message.raw_input_contents[place]) == pytest.approx((notice,))


def test_a_closed_client_says_so() -> None:
    client = tt.TwoTowerClient("127.0.0.1:9")
    client.close()
    for call in (client.check_ready, client.wait_until_ready, lambda: client.generate("a")):
        with pytest.raises(tt.ClientError, match="the client was closed; make a new one"):
            call()
    assert client.stop("name") is False


def test_an_async_client_that_was_closed_says_so() -> None:
    async def calls() -> None:
        client = tt.AsyncTwoTowerClient("127.0.0.1:9")
        await client.close()
        for call in (client.check_ready, client.wait_until_ready, lambda: client.generate("a")):
            with pytest.raises(tt.ClientError, match="the client was closed; make a new one"):
                await call()
        assert await client.stop("name") is False

    asyncio.run(calls())


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_stream_that_was_never_begun_is_dropped_quietly() -> None:
    client = tt.TwoTowerClient("127.0.0.1:9")
    client.close()
    with pytest.raises(tt.ClientError):
        client.stream("a")
    gc.collect()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no prompt; give PROMPT or --prompt-ids 5,6,7"),
        (["a", "--prompt-ids", "5"], "PROMPT and --prompt-ids are both given"),
        (["--prompt-ids", "5,x"], "--prompt-ids is '5,x'; give whole numbers"),
        (["a\udcff"], "PROMPT is not valid UTF-8"),
        (["a", "--timeout", "1e30"], "below 1e+09"),
        (["a", "--url", ":8001"], "url is ':8001'; give host:port"),
    ],
)
def test_the_command_refuses_in_its_own_words(arguments, said) -> None:
    problem = CliRunner().invoke(generate, arguments).exception
    assert isinstance(problem, tt.RequestRefusedError)
    assert said in str(problem)


def test_the_command_reads_a_prompt_as_utf8_whatever_the_locale() -> None:
    for given in ("Łódź", "Łódź".encode().decode("ascii", "surrogateescape")):
        assert read_prompt(given, None, "PROMPT", tt.RequestRefusedError) == ("Łódź", None)


def test_what_is_sent() -> None:
    options = {"max_new_tokens": np.int64(5), "threshold": 1, "mode": "ar", "seed": 2**64 - 1}
    message = infer_request("é", None, {**options, "eos_ids": (2, 3)}, 1.5)
    assert (message.model_name, message.id) == ("twotower", "")
    sent = {
        tensor.name: (tensor.datatype, list(tensor.shape), content)
        for tensor, content in zip(message.inputs, message.raw_input_contents, strict=True)
    }
    assert sent == {
        "text_input": ("BYTES", [1], struct.pack("<I", 2) + b"\xc3\xa9"),
        "max_new_tokens": ("INT32", [1], struct.pack("<i", 5)),
        "threshold": ("FP32", [1], struct.pack("<f", 1)),
        "mode": ("BYTES", [1], struct.pack("<I", 2) + b"ar"),
        "seed": ("UINT64", [1], struct.pack("<Q", 2**64 - 1)),
        "eos_ids": ("INT32", [2], struct.pack("<2i", 2, 3)),
        "timeout_seconds": ("FP32", [1], struct.pack("<f", 1.5)),
    }


def test_a_cancel_names_the_request() -> None:
    message = cancel_request("name")
    assert [tensor.name for tensor in message.inputs] == ["cancel_request_id"]
    assert message.raw_input_contents[0] == struct.pack("<I", 4) + b"name"


def test_errors_say_how_the_command_ends() -> None:
    codes = {name: getattr(tt, name).exit_code for name in tt.__all__ if name.endswith("Error")}
    assert codes.pop("ClientError") == 2
    assert codes.pop("RequestRefusedError") == 2
    assert set(codes.values()) == {1}
    assert len(codes) == 7
    assert all(issubclass(getattr(tt, name), tt.ClientError) for name in codes)


def test_the_public_names_are_those_that_are_listed() -> None:
    for name in tt.__all__:
        assert getattr(tt, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = tt.NoSuchThing
