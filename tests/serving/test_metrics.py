"""What an operator sees: lines of the log, metrics, and the files that are made of their names."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

import twotower_client as tt
from tests.support import ROOT, TWOTOWER
from tests.support.collector import collector
from tests.support.waiting import wait_until
from twotower_client.request import Message
from twotower_engines.serving import restarts
from twotower_engines.serving.front import MODULES
from twotower_engines.serving.journal import METRICS, OUTCOMES, Ended, Journal, line_of
from twotower_engines.serving.repository import MODELS
from twotower_engines.serving.stubs import model_processes

DEPLOY = ROOT / "docs" / "deploy"
OURS = re.compile(r"\btwotower_(\w+)")
SUFFIXES = re.compile(r"_(bucket|sum|count)$")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


class Sums:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.counters, self.gauges, self.values = {}, {}, []

    def add(self, name, label, amount) -> None:
        self.counters[name, label] = self.counters.get((name, label), 0) + amount

    def set(self, name, value) -> None:
        self.gauges[name] = value

    def observe(self, name, value) -> None:
        self.values.append((name, value))


def test_notes_become_lines_and_sums(capfd) -> None:
    sums = Sums()
    journal = Journal(sums, True, lambda: {"num_requests_running": 2})
    journal.ended(Ended("key", "mine", "length", "", 3, 32, 8, 2, 0.5, 0.75, 1.5))
    journal.ended(Ended("", "", "busy", "come again"))
    journal.note("prompt_tokens_total", 3)
    journal.note("prompt_tokens_total", 4)
    journal.note("part_restarts_total", 2, "llm")
    journal.note("time_per_block_seconds", 0.25)
    journal.close()
    assert sums.counters == {
        ("requests_total", "length"): 1,
        ("requests_total", "busy"): 1,
        ("prompt_tokens_total", ""): 7,
        ("part_restarts_total", "llm"): 2,
    }
    assert sorted(sums.values) == [
        ("e2e_request_latency_seconds", 1.5),
        ("request_queue_time_seconds", 0.5),
        ("time_per_block_seconds", 0.25),
        ("time_to_first_block_seconds", 0.75),
        ("tokens_per_denoiser_call", 4.0),
    ]
    assert sums.gauges == {"num_requests_running": 2}
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert (first["name"], first["tokens"], first["event"]) == ("mine", 32, "request")
    assert second == {
        "event": "request", "outcome": "busy", "reason": "come again", "prompt_tokens": 0,
        "tokens": 0, "denoiser_calls": 0, "context_calls": 0, "seconds": 0.0,
    }  # fmt: skip


def test_a_callers_words_stay_on_their_line() -> None:
    line = line_of(Ended("key", "a\noutcome=eos \x1b[2J", "length"), as_json=False)
    assert line.startswith('twotower: request request_id=key name="a\\noutcome=eos \\u001b[2J" out')
    assert "\n" not in line


def test_restarts_reach_the_model_by_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(restarts.FILE, raising=False)
    assert restarts.read() == {}
    monkeypatch.setenv(restarts.FILE, restarts.write(tmp_path, {}))
    assert restarts.read() == {}
    restarts.write(tmp_path, {"server": 1, "llm": 2})
    counts = {("server_restarts_total", ""): 1, ("part_restarts_total", "llm"): 2}
    assert restarts.read() == counts
    for name, label in counts:
        assert label in (METRICS[name].labels or ("",))


def test_outcomes_are_those_that_an_answer_can_have() -> None:
    from typing import get_args

    from twotower_contract.statuses import STATUSES
    from twotower_engines.generation.request import FinishReason

    assert {*get_args(FinishReason), *STATUSES} <= set(OUTCOMES)


def test_parts_are_the_models_and_the_processes_beside_the_server() -> None:
    assert {*MODELS, *MODULES} - {"twotower", "ensemble"} == set(restarts.PARTS)


def test_the_table_lists_every_metric_with_its_type() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    listed = {
        name: row[2].split(",")[0].strip() for row in rows for name in re.findall(r"\w+", row[1])
    }
    assert listed == {name: one.kind for name, one in METRICS.items()}
    for outcome in OUTCOMES:
        assert f"`{outcome}`" in text


@pytest.mark.parametrize("file", ["grafana.json", "alerts.yml", "keda.yaml", "../metrics.md"])
def test_files_name_metrics_that_there_are(file) -> None:
    names = {SUFFIXES.sub("", one) for one in OURS.findall((DEPLOY / file).read_text())}
    assert names
    assert names <= set(METRICS)


def test_the_dashboard_is_whole() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) >= 8
    for panel in board["panels"]:
        assert panel["targets"]
        assert all(target["expr"] for target in panel["targets"])


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    for verb, file in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        ran = subprocess.run(
            ["promtool", "check", verb, file], cwd=DEPLOY, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def queries() -> list[str]:
    """Return the queries of the dashboard and of KEDA, as Prometheus gets them."""
    board = json.loads((DEPLOY / "grafana.json").read_text())
    [scaled] = yaml.safe_load_all((DEPLOY / "keda.yaml").read_text())
    return [
        *(target["expr"].replace("$__rate_interval", "1m")
          for panel in board["panels"] for target in panel["targets"]),
        *(one["metadata"]["query"] for one in scaled["spec"]["triggers"]),
    ]  # fmt: skip


@needs_promtool
def test_promtool_takes_the_queries(tmp_path) -> None:
    rules = [{"record": f"query:{place}", "expr": one} for place, one in enumerate(queries())]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    ran = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(rules)} rules found" in ran.stdout
    assert len(rules) > 20


def page(server) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=20) as response:
        return response.read().decode()


def value(text: str, name: str) -> float:
    [line] = [line for line in text.splitlines() if line.startswith(f"twotower_{name} ")]
    return float(line.rpartition(" ")[2])


@pytest.mark.server
def test_the_servers_page_counts_what_was_done(server, client) -> None:
    before = page(server)
    answer = client.generate(prompt_ids=[5, 6], max_new_tokens=40)
    with pytest.raises(tt.RequestRefusedError):
        client.generate(prompt_ids=[99999])
    with pytest.raises(tt.DeadlineError):
        client.generate(prompt_ids=[5], max_new_tokens=4000, threshold=1.0, timeout=0.3)
    expected = {
        'requests_total{outcome="length"}': 1,
        'requests_total{outcome="refused"}': 1,
        "e2e_request_latency_seconds_count": 2,
        "generation_tokens_total": 40,
        "turns_total": answer.denoiser_calls,
    }
    for name, count in expected.items():
        least = value(before, name) + count
        wait_until(lambda name=name, least=least: value(page(server), name) >= least)
    after = page(server)
    for name, one in METRICS.items():
        assert f"# TYPE twotower_{name} {one.kind}" in after
    log = server._log.read_text()
    assert f"request_id={answer.request_id}" in log


# So slow that long requests outlast the test, and so idle that it does not wait for the processor.
SLOW_MODEL = """
import time

from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.serving.twotower import TritonPythonModel

turn = Scheduler.turn


def slow_turn(self):
    time.sleep(0.01)
    return turn(self)


Scheduler.turn = slow_turn
"""


@pytest.mark.server
def test_every_end_of_a_request_is_counted_and_has_its_line(packaged, tmp_path) -> None:
    """One slot, three places in the queue, and room for few beginnings of prompts."""
    from twotower_contract.engine_set import open_engine_set
    from twotower_engines.serving.package import package
    from twotower_engines.serving.server import ServerOptions, TritonServer
    from twotower_engines.serving.settings import Settings

    settings = Settings(packaged.engines, slots=1, max_waiting=3, threads=1, prefix_mib=1)
    package(open_engine_set(packaged.engines), tmp_path / "repository", settings)
    (tmp_path / "repository/twotower/1/model.py").write_text(SLOW_MODEL)
    options = ServerOptions(grpc_port=0, metrics_port=0, log=tmp_path / "log", log_json=True)
    ends = {"cancelled": 4, "busy": 1, "late": 1, "refused": 1, "length": 20}
    with TritonServer(tmp_path / "repository", options) as server:
        server.wait_until_ready(120)

        def shows(holds: Callable[[Callable[[str], float]], bool]) -> None:
            wait_until(lambda: holds(partial(value, page(server))))

        with tt.TwoTowerClient(server.grpc_address, timeout=120) as client:
            streams = []

            def occupy() -> None:
                """Take the slot, or a place in the queue."""
                streams.append(client.stream(prompt_ids=[5], max_new_tokens=4000, threshold=1.0))
                streams[-1]._take(streams[-1]._wait())  # its first block, or its place

            occupy()
            occupy()
            late = Message()  # with a limit of the server's, which our client would keep itself
            late.add("input_ids", [8])
            late.add("timeout_seconds", 0.3)
            with pytest.raises(tt.DeadlineError):
                tt.AnswerStream(client, late.message, 60).answer()
            occupy()
            occupy()
            with pytest.raises(tt.ServerBusyError):
                client.generate(prompt_ids=[7], max_new_tokens=4)
            shows(lambda of: of("num_requests_running") == of("slot_usage_ratio") == 1)
            shows(lambda of: of("num_requests_waiting") > 0)
            for stream in streams:
                stream.cancel()
            shows(lambda of: of("num_requests_running") == of("num_requests_waiting") == 0)
            with pytest.raises(tt.RequestRefusedError):
                client.generate(prompt_ids=[99999])
            for token in range(5, 25):  # each beginning takes 70 KiB or more
                client.generate(prompt_ids=[token] * 520, max_new_tokens=1)
            for outcome, count in ends.items():
                name = f'requests_total{{outcome="{outcome}"}}'
                shows(lambda of, name=name, count=count: of(name) == count)
            shows(lambda of: of("prefix_evictions_total") > 0)
            assert value(page(server), "prefix_usage_ratio") == 1
    lines = (tmp_path / "log").read_text().splitlines()
    ended = [json.loads(line) for line in lines if line.startswith('{"event": "request"')]
    assert Counter(one["outcome"] for one in ended) == ends


@pytest.mark.slow  # a server of its own
@pytest.mark.server
def test_restarts_are_counted_by_part(packaged) -> None:
    """A part of the ensemble, the process of HTTP, then the server, which forgets nothing."""
    command = [*TWOTOWER, "serve", str(packaged.repository), "--grpc-port", "0", "--json"]
    command += ["--metrics-port", "0", "--http-port", "0"]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(serving.stdout.readline())
        address = f"http://{ready['metrics']}/metrics"
        expected = dict.fromkeys(restarts.PARTS, 0)
        children = Path(f"/proc/{serving.pid}/task/{serving.pid}/children").read_text().split()
        [door] = [
            int(child) for child in children
            if MODULES["http"].encode() in Path(f"/proc/{child}/cmdline").read_bytes()
        ]  # fmt: skip
        for part, process in (("llm", model_processes(ready["pid"])["llm"]), ("http", door)):
            os.kill(process, signal.SIGKILL)
            expected[part] += 1
            wait_until(lambda: restarts_of(address) == (0, expected))
        os.kill(ready["pid"], signal.SIGKILL)
        # never less than it is: Prometheus would count the difference as another start
        wait_until(lambda: restarts_of(address) is None)
        wait_until(lambda: restarts_of(address) is not None)
        assert restarts_of(address) == (1, expected)
    finally:
        serving.send_signal(signal.SIGINT)
        serving.communicate(timeout=60)


def restarts_of(address: str) -> tuple[float, dict[str, float]] | None:
    """Return the restarts of the server, and of each part; None where no server answers."""
    try:
        with urllib.request.urlopen(address, timeout=20) as response:
            text = response.read().decode()
        parts = {
            part: value(text, f'part_restarts_total{{part="{part}"}}') for part in restarts.PARTS
        }
        return value(text, "server_restarts_total"), parts
    except (OSError, ValueError):  # it starts, and has no metrics yet
        return None


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_a_real_prometheus_reads_them(server, client, tmp_path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    config = (DEPLOY / "prometheus.yml").read_text()
    config = config.replace("server:8002", server.metrics_address).replace("5s", "1s")
    (tmp_path / "prometheus.yml").write_text(config)
    running = subprocess.Popen(
        ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data",
         f"--web.listen-address=127.0.0.1:{port}"],
        cwd=tmp_path, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        client.generate(prompt_ids=[5], max_new_tokens=40)
        query = "/api/v1/query?query=twotower_generation_tokens_total"
        wait_until(lambda: any(float(one["value"][1]) >= 40 for one in ask(port, query)))
        rules = ask(port, "/api/v1/rules", "groups")[0]["rules"]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
        assert len(rules) == 7
        for one in queries():  # each has an answer; what Prometheus cannot parse has none
            path = f"/api/v1/query?query={urllib.parse.quote(one)}"
            wait_until(lambda path=path: ask(port, path))
    finally:
        running.terminate()
        running.wait()


def ask(port: int, path: str, key: str = "result") -> list:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as response:
            return json.load(response)["data"][key]
    except OSError:  # it does not listen yet
        return []


@pytest.mark.slow  # a server of its own
@pytest.mark.server
def test_a_request_is_a_trace_at_a_collector(packaged) -> None:
    from twotower_engines.serving.server import ServerOptions, TritonServer

    spans: dict[str, list[dict]] = {}
    with (
        collector() as (url, sent),
        TritonServer(packaged.repository, ServerOptions(grpc_port=0, traces=url)) as server,
    ):
        server.wait_until_ready(120)
        ours = {"traceparent": f"00-{'c' * 32}-{'d' * 16}-01"}
        with tt.TwoTowerClient(server.grpc_address, metadata=ours) as client:
            answer = client.generate(prompt_ids=[5], max_new_tokens=20, block_size=16)
        while not {"compute", "answer"} <= spans.keys():
            [resource] = sent.get(timeout=60)["resourceSpans"]
            assert {"key": "service.name", "value": {"stringValue": "twotower"}} in (
                resource["resource"]["attributes"]
            )
            for span in (one for scope in resource["scopeSpans"] for one in scope["spans"]):
                spans.setdefault(span["name"], []).append(span)
    [model], [compute], [whole] = (spans[name] for name in ("twotower", "compute", "answer"))
    assert compute["parentSpanId"] == model["spanId"]
    assert "QUEUE_START" in [event["name"] for event in model["events"]]
    assert {span["traceId"] for span in (model, compute, whole)} == {"c" * 32}
    assert whole["parentSpanId"] == model["spanId"]
    parts = [one for name in ("queue", "prefill", "block") for one in spans[name]]
    assert {one["parentSpanId"] for one in parts} == {whole["spanId"]}
    times = [int(one[key]) for one in parts for key in ("startTimeUnixNano", "endTimeUnixNano")]
    assert times == sorted(times), "one after the other"
    assert len(spans["block"]) == len(answer.blocks) == 2
