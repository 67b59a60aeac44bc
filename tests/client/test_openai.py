"""The OpenAI front end before a real server, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import openai
import pytest

from tests.support import ROOT, TWOTOWER
from tests.support.browser import chromium
from tests.support.fake_server import failure, fake_server
from tests.support.served import freed_early
from tests.support.waiting import wait_until
from twotower_client.openai.chat import ChatTemplate
from twotower_client.openai.fields import read_completion
from twotower_client.openai.problems import ApiError
from twotower_contract.statuses import try_again

pytestmark = pytest.mark.server
PROMPT = "Mia the fox"
LONG = 3900  # tokens; both slots are taken for a while
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@contextmanager
def front_end(server, *options, keys=""):
    """Run `twotower openai`, and give its address."""
    command = [*TWOTOWER, "openai", "--url", server.grpc_address, "--port", "0", *options]
    environment = {**os.environ, "TWOTOWER_API_KEYS": keys}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("ready http="), line
        yield f"http://{line.strip().removeprefix('ready http=')}"
    finally:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()


@pytest.fixture(scope="module")
def address(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    config = {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with front_end(server, "--chat-template", str(folder)) as address:
        yield address


@pytest.fixture(scope="module")
def caller(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as caller:
        yield caller


def complete(caller, **fields):
    fields = {"model": "twotower", "prompt": PROMPT, "max_tokens": 20, **fields}
    return caller.completions.create(**fields)


def get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        return answer.read().decode()


def test_an_answer_is_the_models(caller, client) -> None:
    expected = client.generate(PROMPT, max_new_tokens=20)
    got = complete(caller)
    assert (got.object, got.model, len(got.choices)) == ("text_completion", "twotower", 1)
    assert got.choices[0].text == expected.text
    assert got.choices[0].finish_reason == "length"
    usage = got.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(expected.prompt_ids), 20)
    assert usage.total_tokens == usage.prompt_tokens + 20
    as_ids = complete(caller, prompt=list(expected.prompt_ids))
    assert as_ids.choices[0].text == expected.text
    ours = complete(caller, extra_body={"threshold": 0.5, "mode": "mask_diffusion", "steps": 2})
    assert (
        ours.choices[0].text
        == client.generate(PROMPT, max_new_tokens=20, threshold=0.5, steps=2).text
    )


def test_a_stream_is_the_answer_in_pieces(caller) -> None:
    whole = complete(caller, max_tokens=40)
    chunks = list(
        complete(caller, max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in complete(caller, stream=True))

    async def pieces() -> list[str]:
        async with openai.AsyncOpenAI(base_url=caller.base_url, api_key="x") as there:
            stream = await complete(there, max_tokens=40, stream=True)
            return [chunk.choices[0].text async for chunk in stream]

    assert asyncio.run(pieces()) == [chunk.choices[0].text for chunk in chunks[:-1]]


def test_several_prompts_and_choices_have_their_indices(caller, client) -> None:
    prompts, seeds = [PROMPT, "Tom the bear"], (7, 8)
    got = complete(caller, prompt=prompts, n=2, temperature=1.0, seed=7, max_tokens=16)
    expected = [
        client.generate(prompt, max_new_tokens=16, temperature=1.0, seed=seed).text
        for prompt in prompts
        for seed in seeds
    ]
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in got.choices] == expected
    assert len(set(expected)) > 2, "seeds differ"
    assert got.usage.prompt_tokens == sum(
        len(client.generate(prompt, max_new_tokens=1).prompt_ids) for prompt in prompts
    )
    texts = [""] * 4
    for chunk in complete(
        caller, prompt=prompts, n=2, temperature=1.0, seed=7, max_tokens=16, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_without_a_seed_draws_differ_and_echo_gives_the_prompt_too(caller) -> None:
    texts = {complete(caller, temperature=1.0).choices[0].text for _ in range(3)}
    assert len(texts) > 1
    assert complete(caller, echo=True).choices[0].text == PROMPT + complete(caller).choices[0].text
    pieces = [chunk.choices[0].text for chunk in complete(caller, echo=True, stream=True)]
    assert pieces[0].startswith(PROMPT)
    assert not pieces[1].startswith(PROMPT)


def test_each_token_tells_its_log_probability(caller, client) -> None:
    details = [
        one
        for block in client.generate(PROMPT, max_new_tokens=40, logprobs=True).blocks
        for one in block.details
    ]
    whole = complete(caller, max_tokens=40, logprobs=1, echo=False).choices[0]
    assert whole.logprobs.tokens == [one.text for one in details]
    assert whole.logprobs.token_logprobs == pytest.approx([one.logprob for one in details])
    assert whole.logprobs.top_logprobs[0] == {details[0].text: pytest.approx(details[0].logprob)}
    offsets = whole.logprobs.text_offset
    ends = [*offsets[1:], len(whole.text)]
    cut = [whole.text[start:end] for start, end in zip(offsets, ends, strict=True)]
    assert cut == whole.logprobs.tokens
    parts = [
        one.choices[0].logprobs for one in complete(caller, max_tokens=40, logprobs=1, stream=True)
    ]
    assert [token for part in parts for token in part.tokens] == whole.logprobs.tokens
    assert [at for part in parts for at in part.text_offset] == offsets
    assert complete(caller).choices[0].logprobs is None


def test_stop_ends_an_answer_and_is_left_out(caller) -> None:
    text = complete(caller, max_tokens=40).choices[0].text
    stop = text[20:24]
    got = complete(caller, max_tokens=40, stop=stop)
    assert got.choices[0].text == text[: text.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    streamed = list(complete(caller, max_tokens=40, stop=[stop, "zzz"], stream=True))
    assert "".join(one.choices[0].text for one in streamed) == text[: text.index(stop)]


def test_a_suffix_is_what_the_answer_runs_into(caller, client) -> None:
    suffix = " the end."
    ids = list(client.generate(suffix, max_new_tokens=1).prompt_ids)
    canvas = [-1] * 6 + ids
    filled = client.generate(
        PROMPT, canvas=canvas, max_new_tokens=len(canvas), ignore_eos=True, logprobs=True
    )
    assert list(filled.ids[6:]) == ids
    expected = "".join(one.text for one in filled.blocks[0].details[:6])
    got = complete(caller, max_tokens=6, suffix=suffix)
    assert got.choices[0].text == expected
    assert got.usage.completion_tokens == 6
    chunks = list(complete(caller, max_tokens=6, suffix=suffix, stream=True))
    assert "".join(one.choices[0].text for one in chunks) == expected


def test_chat_goes_through_the_template(caller, server, client) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Once"}]},
    ]
    prompt = "<s>[system] Be kind.\n[user] Once\n[assistant]"
    expected = client.generate(prompt, max_new_tokens=20)
    fields = {"model": "twotower", "messages": messages, "max_completion_tokens": 20}
    got = caller.chat.completions.create(**fields)
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == expected.text
    assert got.usage.prompt_tokens == len(expected.prompt_ids)
    chunks = list(caller.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected.text
    for asked, count in (({}, 0), ({"top_logprobs": 2}, 1)):
        told = caller.chat.completions.create(**fields, logprobs=True, **asked).choices[0].logprobs
        assert "".join(one.token for one in told.content) == expected.text
        for one in told.content:  # the chosen token alone, as docs/openai.md says
            assert [(top.token, top.logprob) for top in one.top_logprobs] == [
                (one.token, one.logprob)
            ] * count
    for wrong in ([], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        with pytest.raises(openai.BadRequestError) as refusal:
            caller.chat.completions.create(**{**fields, "messages": wrong})
        assert refusal.value.body["param"].startswith("messages")


def test_a_caller_that_leaves_frees_its_slot(caller, address, client) -> None:
    def shows(line: str) -> bool:
        return f"{line}\n" in get(f"{address}/metrics")

    with freed_early(client, LONG):
        streams = [
            complete(caller, max_tokens=LONG, extra_body={"mode": "ar"}, stream=True)
            for _ in range(2)
        ]
        for stream in streams:
            next(iter(stream))
        assert shows("requests_running 2")
        for stream in streams:
            stream.close()

    async def leave() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="x", max_retries=0
        ) as there:
            whole = [
                asyncio.create_task(complete(there, max_tokens=LONG, extra_body={"mode": "ar"}))
                for _ in range(2)
            ]
            await asyncio.to_thread(wait_until, lambda: shows("requests_running 2"))
            for task in whole:
                task.cancel()
            await asyncio.gather(*whole, return_exceptions=True)

    wait_until(lambda: shows("requests_running 0"))
    with freed_early(client, LONG):
        asyncio.run(leave())
    wait_until(lambda: shows("requests_running 0"))
    assert 'path="/v1/completions",status="499"} 4' in get(f"{address}/metrics")


@pytest.mark.parametrize(
    ("fields", "kind", "said", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "this server has 'twotower'", "model"),
        ({"extra_body": {"treshold": 1}}, openai.BadRequestError, "nearest is thre", "treshold"),
        ({"extra_body": {"threshold": 7}}, openai.BadRequestError, "threshold is 7", "threshold"),
        ({"prompt": ""}, openai.BadRequestError, "prompt", "prompt"),
        ({"prompt": []}, openai.BadRequestError, "prompt", "prompt"),
        ({"n": 0}, openai.BadRequestError, "n is 0", "n"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "cannot be had", "frequency_penalty"),
        ({"max_tokens": 99999}, openai.BadRequestError, "these engines hold 4096", None),
        ({"prompt": [99999999]}, openai.BadRequestError, "outside the vocabulary", None),
        ({"prompt": "a" * (1 << 21)}, openai.APIStatusError, "larger than 1048576 bytes", None),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_wrong_is_said_in_openais_form(caller, fields, kind, said, param) -> None:
    for stream in (False, True):
        with pytest.raises(kind) as refusal:
            complete(caller, **fields, stream=stream)
        assert said in refusal.value.message
        assert refusal.value.body["param"] == param
    assert refusal.value.body["type"] == "invalid_request_error"


def test_nothing_asked_is_nothing_refused(caller) -> None:
    harmless = {
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "best_of": 1,
        "top_p": 1,
        "user": "me",
        "stop": None,
        "suffix": None,
    }
    assert complete(caller, **harmless).choices[0].text == complete(caller).choices[0].text


def test_models_and_health(caller, address) -> None:
    assert [one.id for one in caller.models.list()] == ["twotower"]
    assert caller.models.retrieve("twotower").owned_by == "twotower"
    with pytest.raises(openai.NotFoundError):
        caller.models.retrieve("gpt-4")
    assert json.loads(get(f"{address}/health")) == {"status": "ready"}
    with pytest.raises(openai.NotFoundError, match="there is no POST /v1/embeddings"):
        caller.embeddings.create(model="twotower", input="a")


def test_keys_limits_and_no_template(server) -> None:
    options = ("--max-concurrency", "1", "--model", "mine")
    with front_end(server, *options, keys="key-1,key-2") as address:
        for key, is_known in (("key-2", True), ("key-3", False), ("key", False)):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as there:
                if is_known:
                    assert complete(there, model="mine").choices[0].text
                    stream = complete(there, model="mine", max_tokens=LONG, stream=True)
                    with stream, pytest.raises(openai.RateLimitError, match="1 requests are under"):
                        complete(there, model="mine")
                    with pytest.raises(openai.BadRequestError, match="has no chat template"):
                        there.chat.completions.create(
                            model="mine", messages=[{"role": "user", "content": "a"}]
                        )
                else:
                    with pytest.raises(openai.AuthenticationError, match="API key is missing"):
                        complete(there, model="mine")
        assert json.loads(get(f"{address}/health")) == {"status": "ready"}


def test_a_server_that_is_away_is_told(tmp_path) -> None:
    class Away:
        grpc_address = "127.0.0.1:1"

    with front_end(Away) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as there:
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError, match="no Triton server") as problem:
                    complete(there, stream=stream)
                assert problem.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(f"{address}/health")


def test_a_busy_server_says_when_to_come_again() -> None:
    busy = failure("busy", f"9 requests wait already; {try_again(2.5)}")
    with fake_server(lambda request, context: iter([busy])) as url:
        served = SimpleNamespace(grpc_address=url)
        with (
            front_end(served) as address,
            openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as there,
        ):
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError, match="9 requests wait") as refusal:
                    complete(there, stream=stream)
                assert refusal.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": 3}, {"prompt": [[]]}, {"prompt": ["a", [1], {}]}, {"prompt": [True]},
        {"prompt": "a", "stream": "yes"}, {"prompt": "a", "n": 1.5}, {"prompt": "a", "stop": 3},
        {"prompt": "a", "logprobs": -1}, {"prompt": "a", "stream_options": 3},
        {"prompt": "a", "seed": "x"}, {"prompt": "a", "temperature": []},
        {"prompt": [1], "echo": True}, {"prompt": "a", "suffix": 3},
        {"prompt": "a", "max_tokens": 0}, {"prompt": "a", "stream_mode": "denoise"},
    ],
    ids=str,
)  # fmt: skip
def test_a_body_of_any_kind_is_refused_and_not_a_bug(body) -> None:
    with pytest.raises(ApiError) as refusal:
        read_completion(body)
    assert refusal.value.status == 400


def test_a_template_cannot_reach_python() -> None:
    template = ChatTemplate(
        "{{ messages.__class__.__mro__ }}{{ raise_exception('no ' ~ messages[0].role) }}"
    )
    with pytest.raises(ApiError):
        template.prompt([{"role": "user", "content": "a"}])


def test_the_examples_of_the_page_work(address) -> None:
    text = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = example.replace("http://localhost:9000", address)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "prompt_tokens" in ran.stdout

    [command] = re.findall(r"curl (.*?}')", text, flags=re.DOTALL)
    url, _, header, _, data = shlex.split(command.replace("\\\n", ""))
    url = url.replace("localhost:9000", address.removeprefix("http://"))
    name, _, value = header.partition(": ")
    request = urllib.request.Request(f"http://{url}", data.encode(), {name: value})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 48


def test_the_page_shows_an_answer(address, caller) -> None:
    with chromium() as browser:
        browser.open(address)
        browser.run(
            f"form.prompt.value = {json.dumps(PROMPT)}; form.max_tokens.value = 40;"
            "document.querySelector('form button').click()"
        )
        wait_until(lambda: browser.text(".figures").startswith("40 tokens"))
        browser.run("board.pause(); board.go(board.moments.length - 1)")
        shown = browser.run("return document.querySelector('.board').textContent")
        assert shown == PROMPT + complete(caller, max_tokens=40).choices[0].text
        browser.run("form.max_tokens.value = 99999; form.onsubmit(new Event('submit'))")
        wait_until(lambda: "these engines hold" in browser.text(".problem"))
        refusal = [one for one in browser.problems() if "400" not in one]
        assert refusal == [], "but for the refusal, which browsers tell by themselves"
