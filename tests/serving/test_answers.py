"""A real Triton server gives the answers of `twotower run`, block by block."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request

import pytest

from tests.support.command import twotower
from tests.support.served import LONG, freed_early
from twotower_client import AsyncTwoTowerClient

pytestmark = pytest.mark.server

CASES = {
    "greedy": {},
    "parallel": {"threshold": 0.02, "block_size": 8},
    "drawn": {"temperature": 0.8, "seed": 2**64 - 1, "steps": 4},
    "factor": {"policy": "factor", "threshold": 1.5},
    "ar": {"mode": "ar", "temperature": 0.7, "top_k": 50, "top_p": 0.9, "seed": 3},
    "mock_ar": {"mode": "mock_ar"},
    "trimmed": {"max_new_tokens": 5},
    "one block": {"max_new_tokens": 64, "block_size": 64},
}


@pytest.fixture(scope="module")
def local(packaged):
    """What `twotower run` does, in this process: options to (result, text)."""
    from twotower_contract.engine_set import open_engine_set
    from twotower_engines.artifacts.tokenizer import Tokenizer
    from twotower_engines.generation.generator import Generator
    from twotower_engines.generation.request import Request

    tokenizer = Tokenizer(packaged.engines)
    with Generator(open_engine_set(packaged.engines), threads=1) as generator:

        def answer(prompt_ids, **options):
            result = generator.generate(Request("local", tuple(prompt_ids), **options))
            return result, tokenizer.decode(result.output_ids[len(prompt_ids) :])

        yield answer


@pytest.mark.parametrize("name", list(CASES))
def test_server_answers_as_run_does(client, local, name) -> None:
    options = {"max_new_tokens": 40, **CASES[name]}
    answer = client.generate(prompt_ids=[50, 81, 70], **options)
    expected, text = local([50, 81, 70], **options)
    assert answer.output_ids == expected.output_ids
    assert answer.text == text
    assert answer.denoiser_calls == expected.denoiser_calls
    assert answer.context_calls == expected.context_calls
    assert answer.finish_reason == expected.finish_reason
    masked = tuple(block.masked_counts for block in answer.blocks if block.masked_counts)
    assert masked == expected.blocks


def test_each_door_tells_what_it_did_not_read_again(server, client, http) -> None:
    """Prompts of several calls, whose last one differs."""
    prompts = [[60 + one % 7 for one in range(512)] + [last] for last in range(5, 10)]
    fields, reused = {"max_new_tokens": 16}, 512
    first = client.generate(prompt_ids=prompts[0], prefix_cache=False, **fields)
    told = [client.generate(prompt_ids=prompts[0], **fields).reused_tokens]
    again = client.generate(prompt_ids=prompts[0], **fields)
    assert (first.reused_tokens, told, again.reused_tokens) == (0, [0], reused)
    assert again.ids == first.ids
    assert (first.context_calls > 2, again.context_calls) == (True, 1)

    async def other() -> int:
        async with AsyncTwoTowerClient(server.grpc_address) as there:
            stream = there.stream(prompt_ids=prompts[1], stream_mode="denoise", **fields)
            told = []
            stream.on_canvas = lambda canvas: told.append(stream.reused_tokens)
            answer = await stream.answer()
            return {*told, answer.reused_tokens}

    assert asyncio.run(other()) == {reused}
    events = {}
    for path, prompt in (("generate", prompts[2]), ("generate_stream", prompts[3])):
        body = json.dumps({"input_ids": prompt, **fields}).encode()
        url = f"{http}/v2/models/twotower/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
            events[path] = json.loads(response.read().decode().removeprefix("data: "))
    assert [one["reused_tokens"] for one in events.values()] == [reused, reused]
    ids = ",".join(map(str, prompts[4]))
    ran = twotower("generate", "--prompt-ids", ids, "--url", server.grpc_address, "--json")
    assert json.loads(ran.stdout)["reused_tokens"] == reused


def test_json_tells_what_was_asked_of_each_token(server, client) -> None:
    fields = {"mode": "ar", "logprobs": True, "top_logprobs": 2, "max_new_tokens": 4}
    answer = client.generate(prompt_ids=[5, 6], **fields)
    words = ["--mode", "ar", "--logprobs", "--top-logprobs", 2, "--max-new-tokens", 4, "--json"]
    ran = twotower("generate", "--prompt-ids", "5,6", "--url", server.grpc_address, *words)
    told = json.loads(ran.stdout)
    assert told["logprobs"] == [one.logprob for one in answer.details]
    assert told["top_ids"] == [token for one in answer.details for token, _ in one.top]


def test_an_end_token_ends_the_answer(client, local) -> None:
    whole, _ = local([50], max_new_tokens=64)
    eos = whole.output_ids[1 + 20]
    answer = client.generate(prompt_ids=[50], max_new_tokens=64, eos_ids=[eos])
    expected, _ = local([50], max_new_tokens=64, eos_ids=(eos,))
    assert answer.finish_reason == "eos"
    assert answer.output_ids == expected.output_ids
    assert len(answer.ids) < 64


def test_the_command_line_prints_what_run_prints(server, packaged) -> None:
    options = ["--max-new-tokens", "24", "--threshold", "0.3", "--json"]
    prompt = "Once upon a time"
    asked = run_cli("generate", prompt, "--url", server.grpc_address, *options)
    ran = run_cli("run", str(packaged.engines), "--prompt", prompt, *options)
    assert asked.pop("seconds") > 0
    assert asked.pop("reused_tokens") == 0  # `run` keeps no states
    assert ran.pop("seconds") > 0
    assert asked == ran


def run_cli(*arguments: str) -> dict:
    ran = twotower(*arguments)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_blocks_arrive_before_the_answer_is_complete(client) -> None:
    one_token_per_call = {"policy": "quota", "steps": 16, "block_size": 16}
    with client.stream(prompt_ids=[7], max_new_tokens=1024, **one_token_per_call) as stream:
        blocks = list(stream)
    assert [block.finish_reason for block in blocks] == [None] * 63 + ["length"]
    assert [block.denoiser_calls for block in blocks] == list(range(16, 1025, 16))
    with freed_early(client), client.stream(prompt_ids=[7], **LONG) as stream:
        for _ in range(32):
            next(stream)


def test_many_at_once_get_what_each_would_get_alone(client, local) -> None:
    """Twelve requests over two slots: they wait, join and leave in the middle of each other."""
    requests = [
        {
            "prompt_ids": [11 * number + 4, 9, 100 + number][: 1 + number % 3],
            "max_new_tokens": 10 + 7 * number,
            "threshold": 0.02 if number % 2 else 0.9,
            "temperature": 0.5 * (number % 3),
            "mode": ("mask_diffusion", "ar", "mask_diffusion", "mock_ar")[number % 4],
            "seed": number,
        }
        for number in range(12)
    ]
    answers: dict[int, object] = {}

    def ask(number: int) -> None:
        answers[number] = client.generate(**requests[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, request in enumerate(requests):
        expected, text = local(**request)
        assert answers[number].output_ids == expected.output_ids, number
        assert answers[number].text == text, number


def test_http_streams_the_same_blocks(http, client) -> None:
    answer = client.generate("Once upon", max_new_tokens=40)
    request = urllib.request.Request(
        f"{http}/v2/models/twotower/generate_stream",
        data=json.dumps({"text_input": "Once upon", "max_new_tokens": 40}).encode(),
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        lines = [line for line in response.read().decode().splitlines() if line]
    blocks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [block["text_output"] for block in blocks] == [block.text for block in answer.blocks]
    assert blocks[-1]["finish_reason"] == "length"


@pytest.mark.slow  # a time
def test_the_server_is_ready_in_time(server) -> None:
    assert server.seconds_to_ready < 15


def test_cancelling_frees_the_slot(client) -> None:
    """Both slots are taken by answers that would take many seconds, then given up."""
    with freed_early(client):
        streams = [client.stream(prompt_ids=[number], **LONG) for number in (5, 6)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.cancel()
