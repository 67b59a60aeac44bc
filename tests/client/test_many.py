"""Many answers at a time: order, partial failure, retries, several servers, and files."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest

from tests.support import TWOTOWER
from tests.support.command import twotower
from tests.support.fake_server import failure, fake_server, part
from twotower_client import (
    Answer,
    AsyncClientPool,
    AsyncTwoTowerClient,
    ClientPool,
    RequestCancelledError,
    RequestRefusedError,
    Retry,
    ServerBusyError,
    ServerUnavailableError,
    TwoTowerClient,
)
from twotower_client.retry import Servers
from twotower_contract.statuses import try_again

AT_ONCE = Retry(attempts=4, first_seconds=0.0, most_seconds=0.0)


def prompt_of(request) -> list[int]:
    place = next(n for n, one in enumerate(request.inputs) if one.name == "input_ids")
    return np.frombuffer(request.raw_input_contents[place], "<i4").tolist()


def echo(request, context):
    """Answer with the prompt's first id as text; 13 is refused."""
    first = prompt_of(request)[0]
    yield failure("refused") if first == 13 else part("length", str(first), (first,))


def texts(outcomes) -> list[str]:
    return [one.text if isinstance(one, Answer) else type(one).__name__ for one in outcomes]


def collected(outcomes):
    async def run():
        return [one async for one in outcomes]

    return run()


def test_answers_come_in_the_order_of_their_prompts_whichever_ends_first() -> None:
    last_ended = threading.Event()

    def answer(request, context):
        first = prompt_of(request)[0]
        if first == 5:
            assert last_ended.wait(20)  # the first prompt is the last to be answered
        try:
            yield from echo(request, context)
        finally:  # a client that has its answer may leave before the last turn of this
            if first == 9:
                last_ended.set()

    prompts = [[5], [6], [13], [7], [8], [9]]
    wanted = ["5", "6", "RequestRefusedError", "7", "8", "9"]
    told = []
    with fake_server(answer) as url, TwoTowerClient(url) as client:
        many = client.generate_many(prompts, concurrency=2, progress=lambda *n: told.append(n))
        assert texts(many) == wanted
    assert [done for done, _ in told] == [1, 2, 3, 4, 5, 6]
    assert told[-1] == (6, 1)

    last_ended.clear()

    async def run(url):
        async with AsyncTwoTowerClient(url) as client:
            return await collected(client.generate_many(prompts, concurrency=2))

    with fake_server(answer) as url:
        assert texts(asyncio.run(run(url))) == wanted


def test_prompts_are_read_as_they_are_needed_and_leaving_stops_the_rest() -> None:
    read, asked, cancelled = [], threading.Event(), threading.Event()

    def answer(request, context):
        if prompt_of(request)[0] > 3:
            context.add_callback(cancelled.set)
            asked.set()
            assert cancelled.wait(20)
        yield from echo(request, context)

    def prompts():
        for first in itertools.count(1):
            read.append(first)
            yield [first]

    with fake_server(answer) as url, TwoTowerClient(url) as client:
        many = client.generate_many(prompts(), concurrency=2)
        assert texts(itertools.islice(many, 3)) == ["1", "2", "3"]
        assert len(read) <= 6
        assert asked.wait(20)  # a request that was not sent yet would have nothing to stop
        many.close()
        assert cancelled.wait(20)


def test_a_wrong_name_is_a_mistake_of_the_caller_and_not_an_answer() -> None:
    with fake_server(echo) as url, TwoTowerClient(url) as client:
        with pytest.raises(TypeError, match="there is no option 'max_tokens'"):
            list(client.generate_many([[5]], max_tokens=3))
        with pytest.raises(RequestRefusedError, match="concurrency is 0"):
            list(client.generate_many([[5]], concurrency=0))


@pytest.mark.parametrize("failures", [3, 4])
def test_what_may_pass_is_tried_again_so_often(failures) -> None:
    asked = []

    def answer(request, context):
        asked.append(request.id)
        if len(asked) <= failures:
            yield failure("busy")
        yield from echo(request, context)

    with fake_server(answer) as url, ClientPool([url], retry=AT_ONCE) as pool:
        if failures < AT_ONCE.attempts:
            assert pool.generate([7]).text == "7"
        else:
            with pytest.raises(ServerBusyError):
                pool.generate([7])
    assert len(asked) == AT_ONCE.attempts


def busy_first(asked: list[float], seconds: float):
    """Answer as a server that is full the first time, and says for how long."""

    def answer(request, context):
        asked.append(time.monotonic())
        if len(asked) == 1:
            yield failure("busy", f"9 requests wait already; {try_again(seconds)}")
        yield from echo(request, context)

    return answer


def test_nobody_comes_back_before_a_busy_server_wants_it() -> None:
    asked = []
    with fake_server(busy_first(asked, 0.5)) as url, ClientPool([url], retry=AT_ONCE) as pool:
        assert pool.generate([7]).text == "7"
    assert asked[1] - asked[0] >= 0.5

    async def run(url):
        async with AsyncClientPool([url], retry=AT_ONCE) as pool:
            return await pool.generate([7])

    asked.clear()
    with fake_server(busy_first(asked, 0.5)) as url:
        assert asyncio.run(run(url)).text == "7"
    assert asked[1] - asked[0] >= 0.5


def test_the_wait_for_a_busy_server_is_no_longer_than_the_request_may_take() -> None:
    problem = ServerBusyError("full", 600.0)
    with TwoTowerClient("localhost:1", timeout=40) as one, TwoTowerClient("localhost:2") as two:
        servers = Servers([one])
        servers.give_back(servers.take()[0], problem)
        assert servers.wait(problem, iter([1.0]), one, 7.0) == 7.0
        assert servers.wait(problem, iter([1.0]), one, None) == 40.0
        assert servers.wait(problem, iter([9.0]), one, 7.0) == 9.0
        assert servers.wait(ServerBusyError("full"), iter([1.0]), one, 7.0) == 1.0
        assert servers.wait(problem, iter([]), one, 7.0) is None
        assert servers.wait(RequestRefusedError("no"), iter([1.0]), one, 7.0) is None
        both = Servers([one, two])
        both.give_back(both.take()[0], problem)
        assert both.wait(problem, iter([1.0]), one, 7.0) == 1.0, "the other can be asked at once"
        assert both.take()[1] is two


def test_a_refusal_is_not_tried_again() -> None:
    asked = []

    def answer(request, context):
        asked.append(request.id)
        yield from echo(request, context)

    with (
        fake_server(answer) as url,
        ClientPool([url], retry=AT_ONCE) as pool,
        pytest.raises(RequestRefusedError),
    ):
        pool.generate([13])
    assert len(asked) == 1


def test_waits_grow_within_their_bounds() -> None:
    for _ in range(20):
        waits = list(Retry(attempts=5, first_seconds=1, most_seconds=3).waits())
        assert len(waits) == 4
        for wait, most in zip(waits, [1, 2, 3, 3], strict=True):
            assert most / 2 <= wait <= most
    with pytest.raises(RequestRefusedError, match="attempts must be at least 1"):
        Retry(attempts=0)


def test_a_server_that_is_gone_is_left_for_another() -> None:
    counts = [0, 0]

    def counting(number):
        def answer(request, context):
            counts[number] += 1
            yield from echo(request, context)

        return answer

    prompts = [[n] for n in range(20, 40)]
    wanted = [str(n) for n in range(20, 40)]
    with ExitStack() as stack:
        urls = [stack.enter_context(fake_server(counting(n))) for n in range(2)]
        with ClientPool(["127.0.0.1:1", *urls], retry=AT_ONCE) as pool:
            assert texts(pool.generate_many(prompts, concurrency=4)) == wanted
        assert sum(counts) == 20
        assert min(counts) > 0, "both that are there have work"

        async def run():
            async with AsyncClientPool(["127.0.0.1:1", *urls], retry=AT_ONCE) as pool:
                assert (await pool.generate([7])).text == "7"
                return await collected(pool.generate_many(prompts, concurrency=4))

        assert texts(asyncio.run(run())) == wanted

    once = Retry(attempts=1)
    with ClientPool(["127.0.0.1:1"], retry=once) as pool, pytest.raises(ServerUnavailableError):
        pool.generate([7])


def test_an_answer_that_breaks_off_is_asked_for_again_whole() -> None:
    """The same seed gives the same answer, so the second is the one that the first would be."""
    came = []

    def answer(request, context):
        came.append(request.id)
        yield part("", "a", (5,))
        if len(came) == 1:
            context.abort(14, "the server went away")
        yield part("length", "b", (6,))

    with fake_server(answer) as url, ClientPool([url], retry=AT_ONCE) as pool:
        assert pool.generate([7]).text == "ab"


@pytest.mark.server
def test_a_real_server_answers_many_as_it_answers_one(client) -> None:
    prompts = [[5 + n, 6] for n in range(9)]
    alone = [client.generate(prompt_ids=prompt, max_new_tokens=20).ids for prompt in prompts]
    many = client.generate_many(prompts, concurrency=4, max_new_tokens=20)
    assert [answer.ids for answer in many] == alone


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt_ids": [5, 6], "id": "a"}\n\n'
        '{"prompt_ids": [9999999], "id": "b"}\n'
        '{"prompt_ids": [7], "max_new_tokens": 3, "logprobs": true, "id": "c"}\n'
    )
    return path


@pytest.mark.server
def test_a_file_is_answered_line_by_line(server, client, prompts, tmp_path) -> None:
    target = tmp_path / "answers.jsonl"
    common = ("--url", server.grpc_address, "--max-new-tokens", 20, "--output", target)
    ran = twotower("generate", "--input", prompts, *common)
    assert ran.returncode == 1
    assert "2 answered" in ran.stderr
    assert "1 of 3 prompts have no answer" in ran.stderr
    first, wrong, third = lines_of(target)
    assert [one["id"] for one in (first, wrong, third)] == ["a", "b", "c"]
    assert [one["line"] for one in (first, wrong, third)] == [1, 3, 4]
    expected = client.generate(prompt_ids=[5, 6], max_new_tokens=20)
    assert (tuple(first["ids"]), first["text"]) == (expected.ids, expected.text)
    assert len(third["ids"]) == 3, "a line's own option goes before the command's"
    assert "logprobs" not in first
    expected = client.generate(prompt_ids=[7], max_new_tokens=3, logprobs=True)
    assert third["logprobs"] == [one.logprob for one in expected.details]
    assert wrong["error"]["kind"] == "RequestRefusedError"
    assert not target.with_name("answers.jsonl.partial").exists()

    # what is answered is not asked for again; a prompt that was mended is
    prompts.write_text(prompts.read_text().replace("9999999", "8"))
    ran = twotower("generate", "--input", prompts, *common)
    assert ran.returncode == 0, ran.stderr
    assert "3 answered, 2 of them before" in ran.stderr
    again = lines_of(target)
    assert [again[0], again[2]] == [first, third]
    assert tuple(again[1]["ids"]) == client.generate(prompt_ids=[8], max_new_tokens=20).ids


def test_a_file_that_was_interrupted_goes_on(tmp_path) -> None:
    asked, stuck = [], threading.Event()

    def answer(request, context):
        first = prompt_of(request)[0]
        asked.append(first)
        if first == 7 and asked.count(7) == 1:
            left = threading.Event()
            context.add_callback(left.set)
            stuck.set()
            assert left.wait(60)
            context.abort(1, "cancelled")
        yield from echo(request, context)

    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    partial = tmp_path / "answers.jsonl.partial"
    source.write_text("".join(json.dumps({"prompt_ids": [n]}) + "\n" for n in range(5, 10)))
    with fake_server(answer) as url:
        command = ["generate", "--input", source, "--output", target, "--url", url]
        command = [*TWOTOWER, *map(str, command), "--concurrency", "1"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert stuck.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert not target.exists()
        assert [line["text"] for line in lines_of(partial)] == ["5", "6"]
        with partial.open("a") as out:
            out.write('{"line": 3, "key": "cut')  # as a full disk leaves it
        asked.clear()
        asked.append(7)  # not stuck again
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert asked[1:] == [7, 8, 9]
    assert [line["text"] for line in lines_of(target)] == ["5", "6", "7", "8", "9"]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]\n", "line 1: give a JSON object"),
        ("\n{]\n", "line 2: is no JSON"),
        ('{"id": 3}\n', "line 1: give one of prompt and prompt_ids"),
        ('{"prompt": "a", "prompt_ids": [1]}\n', "line 1: give one of prompt and prompt_ids"),
        ('{"prompt": 3}\n', "line 1: prompt is 3; it must be text"),
        ('{"prompt": "a", "threshold": 7}\n', "line 1: threshold is 7; it must be"),
        ("\n", "holds no prompt"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_sent(tmp_path, content, said) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    target = tmp_path / "answers.jsonl"
    ran = twotower("generate", "--input", path, "--output", target, "--url", "localhost:1")
    assert ran.returncode == 2
    assert f"error: {path}" in ran.stderr
    assert said in ran.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["p.jsonl"]


def test_what_does_not_go_together_is_refused(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Once\n")
    for arguments in (
        ["--input", path],
        ["--output", path],
        ["a", "--input", path, "--output", path],
    ):
        ran = twotower("generate", *arguments)
        assert ran.returncode == 2
        assert "give --input and --output together, and no other prompt" in ran.stderr
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("It was a dark night.\n")
    ran = twotower("generate", "--input", path, "--output", thesis, "--url", "localhost:1")
    assert ran.returncode == 2
    assert f"{thesis}, line 1: was not written by `twotower generate --output`" in ran.stderr
    assert thesis.read_text() == "It was a dark night.\n"


def test_a_cancelled_error_is_no_reason_to_send_again() -> None:
    from twotower_client.retry import may_pass

    assert not may_pass(RequestCancelledError("x"))
