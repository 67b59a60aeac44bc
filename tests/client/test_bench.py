"""`twotower bench`: loads on a server, what is counted, and what is reported."""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

from tests.support.browser import address_of, chromium
from tests.support.clock import Clock
from tests.support.command import twotower
from tests.support.fake_server import failure, fake_server, part
from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.bench import load as load_module
from twotower_client.bench.load import Level, Record, Work, measure
from twotower_client.bench.report import comparison, page, table
from twotower_client.bench.summary import summarize


def record(sent, blocks, error=None, prompt_tokens=10, calls=4, delay=0.0) -> Record:
    ended = blocks[-1][0] if blocks else sent
    return Record(sent, delay, ended, tuple(blocks), prompt_tokens, calls, error)


def test_figures_are_those_of_the_records() -> None:
    records = (
        record(0.0, [(0.5, 16), (0.75, 16), (1.0, 8)]),
        record(1.0, [(1.25, 16), (1.75, 16)], calls=12),
        record(1.5, [(1.75, 16), (2.5, 16)]),  # its second block comes when nothing is begun
        record(1.0, [(1.5, 16)], error=("RequestFailedError", "it broke")),
        record(1.9, [], error=("ServerBusyError", "full"), prompt_tokens=0, calls=0),
    )
    got = summarize(Level(2), 2.0, records)
    assert (got["completed"], got["failed"], got["duration"]) == (3, 2, 2.0)
    assert got["request_throughput"] == 2 / 2.0
    assert got["output_throughput"] == (40 + 32 + 16 + 16) / 2.0
    assert got["total_token_throughput"] == (104 + 4 * 10) / 2.0
    assert got["total_output_tokens"] == 40 + 32 + 32
    assert got["tokens_per_denoiser_call"] == 104 / 20
    assert got["errors"] == {
        "RequestFailedError": {"count": 1, "first": "it broke"},
        "ServerBusyError": {"count": 1, "first": "full"},
    }
    assert got["mean_ttft_ms"] == round(1e3 * (0.5 + 0.25 + 0.25) / 3, 3)
    assert got["median_itl_ms"] == 375.0  # 250, 250, 500, 750
    assert got["median_tpot_ms"] == round(1e3 * 0.5 / 16, 3)  # 0.5/24, 0.5/16, 0.75/16
    assert got["p99_e2el_ms"] == round(np.percentile([1000, 750, 1000], 99), 3)
    assert got["e2el_curve_ms"][0] == 750
    assert got["e2el_curve_ms"][-1] == 1000


def test_nothing_complete_has_no_latency() -> None:
    got = summarize(Level(1), 1.0, (record(0.0, [], ("DeadlineError", "late")),))
    assert got["median_ttft_ms"] is None
    assert got["tokens_per_denoiser_call"] is None
    assert got["output_throughput"] == 0
    assert "1 x DeadlineError: late" in table({"levels": [got]})


def load(url, level, seconds=None, requests=None) -> tuple[float, list[Record]]:
    async def run() -> tuple[float, list[Record]]:
        async with AsyncTwoTowerClient(url) as client:
            work = Work([[5, 6], [7]], {}, seconds, requests)
            return await measure(client, work, level, lambda *_: None)

    return asyncio.run(run())


@pytest.mark.parametrize("count", [1, 3])
def test_a_closed_loop_keeps_so_many_under_way(count) -> None:
    under_way, most, lock = 0, 0, threading.Lock()
    all_here = threading.Event()

    def answer(request, context):
        nonlocal under_way, most
        with lock:
            under_way, most = under_way + 1, max(most, under_way + 1)
        if most == count:
            all_here.set()
        all_here.wait(20)
        with lock:  # before the caller hears that it has its answer
            under_way -= 1
        yield part("length", "a", (5, 6))

    with fake_server(answer) as url:
        _, records = load(url, Level(count), requests=9)
    assert len(records) == 9
    assert most == count
    assert all(one.error is None and one.tokens == 2 for one in records)


def test_an_open_loop_sends_however_busy_the_server_is() -> None:
    came, all_here = [], threading.Event()

    def answer(request, context):
        came.append(request.id)
        if len(came) == 8:
            all_here.set()
        assert all_here.wait(20), "the next one came although nobody was answered"
        yield part("length", "a", (5,))

    with fake_server(answer) as url:
        _, records = load(url, Level(None, rate=200.0), requests=8)
    assert len(records) == len(came) == 8
    sent = sorted(one.sent for one in records)
    assert sent[-1] > sent[0], "at different times"


@pytest.fixture
def begins_with_the_first(monkeypatch):
    """The clock of loads, which stands still until a request came; gives what lets it go."""

    def hold() -> Clock:
        clock = Clock(is_held=True)
        monkeypatch.setattr(load_module, "time", clock)
        return clock

    return hold


def test_a_limit_of_seconds_ends_a_load_and_its_answers_are_waited_for(
    begins_with_the_first,
) -> None:
    def answer(request, context):
        clock.let_go()
        yield part("length", "a", (5,))

    with fake_server(answer) as url:
        for level in (Level(2), Level(None, rate=50.0)):
            clock = begins_with_the_first()
            seconds, records = load(url, level, seconds=0.3)
            assert seconds == 0.3
            assert records
            assert all(one.error is None for one in records)


def test_errors_are_counted_by_kind_and_do_not_spin(begins_with_the_first) -> None:
    def answer(request, context):
        clock.let_go()
        yield failure("busy")

    clock = begins_with_the_first()
    with fake_server(answer) as url:
        _, records = load(url, Level(1), seconds=0.35)
    assert {one.error[0] for one in records} == {"ServerBusyError"}
    assert len(records) <= 4


@pytest.mark.server
def test_a_real_server_is_measured_and_two_results_compared(server, tmp_path) -> None:
    old, new, report = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "new.html"
    common = ("--url", server.grpc_address, "--concurrency", "1,2", "--num-prompts", 3)
    ran = twotower("bench", *common, "--random", 20, "--max-new-tokens", 24, "--save", old)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()] == ["load", "1", "2"]
    result = json.loads(old.read_text())
    for level in result["levels"]:
        assert (level["completed"], level["failed"]) == (3, 0)
        assert level["total_input_tokens"] == 3 * 20
        assert level["total_output_tokens"] == 3 * 24
        assert 0 < level["median_ttft_ms"] <= level["median_e2el_ms"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n{"prompt_ids": [5, 6, 7]}\n')
    ran = twotower(
        "bench", *common, "--prompts", prompts, "--save", new, "--html", report, "--json"
    )
    assert json.loads(ran.stdout) == json.loads(new.read_text())

    ran = twotower("bench", "--compare", old, new, "--html", report)
    assert ran.returncode == 0, ran.stderr
    assert "2 at a time" in ran.stdout
    before, after = (json.loads(path.read_text())["levels"][1] for path in (old, new))
    change = after["output_throughput"] / before["output_throughput"] - 1
    assert f"{change:+.1%}" in ran.stdout
    with chromium() as browser:
        browser.open(address_of(report))
        assert browser.text("h1") == "twotower bench"
        assert browser.run("return document.querySelectorAll('svg polyline').length") >= 12
        assert browser.problems() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is given; give one of ENGINES, --url, --compare"),
        (["engines", "--url", "localhost:1"], "ENGINES and --url is given; give one of"),
        (["--url", "localhost:1", "--concurrency", "1,x"], "'1,x'; give whole numbers above 0"),
        (["--url", "localhost:1", "--rate", "0"], "'0'; give numbers above 0"),
        (["--url", "localhost:1", "--threshold", "7"], "threshold is 7.0; it must be"),
        (["--url", "localhost:1", "--duration", "1", "--num-prompts", "2"], "are both given"),
        (["--url", "localhost:1", "--rate", "1", "--concurrency", "1,2"], "give one number"),
        (["--url", "localhost:1"], "no Triton server answers at localhost:1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(arguments, said) -> None:
    ran = twotower("bench", *arguments)
    assert ran.returncode in (1, 2)
    assert said in ran.stderr


def test_results_that_cannot_be_compared_are_named(tmp_path) -> None:
    path = tmp_path / "some.json"
    for content, said in (("[", "is no JSON"), ("{}", "is no result of `twotower bench`")):
        path.write_text(content)
        ran = twotower("bench", "--compare", path, path)
        assert ran.returncode == 2
        assert f"error: {path}: {said}" in ran.stderr


def test_a_page_may_hold_any_text() -> None:
    figures = summarize(
        Level(1), 1.0, [record(0.0, [], ("DeadlineError", "<script>alert(1)</script>"))]
    )
    result = {"about": {"url": "</pre><b>"}, "levels": [figures]}
    text = page([result, result])
    assert "<script>" not in text
    assert "</pre><b>" not in text
    assert comparison(result, result).splitlines()[0].split() == [
        "load", "figure", "before", "after", "change",
    ]  # fmt: skip
