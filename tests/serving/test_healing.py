"""`twotower serve` brings back what dies or hangs, and ends in peace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import twotower_client as tt
from tests.support import TWOTOWER
from twotower_client.request import Message
from twotower_engines.serving.stubs import model_processes

pytestmark = [pytest.mark.server, pytest.mark.slow]  # servers of their own
LONG = {"max_new_tokens": 4000, "threshold": 1.0}  # many seconds


@dataclass
class Serving:
    """A `twotower serve` that runs."""

    process: subprocess.Popen
    ready: dict

    def ready_again(self) -> None:
        """Wait for the line that another start prints."""
        self.ready = json.loads(self.process.stdout.readline())

    def client(self, **settings) -> tt.TwoTowerClient:
        return tt.TwoTowerClient(self.ready["grpc"], **settings)

    def model(self, name: str) -> int | None:
        return model_processes(self.ready["pid"]).get(name)


def start(repository, *options: str) -> Serving:
    command = [*TWOTOWER, "serve", str(repository), "--grpc-port", "0", "--no-metrics", "--json"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line, process.communicate(timeout=30)[1]
    return Serving(process, json.loads(line))


@pytest.fixture(scope="module")
def serving(packaged):
    running = start(packaged.repository, "--stall-timeout", "3")
    yield running
    running.process.send_signal(signal.SIGINT)
    _, said = running.process.communicate(timeout=60)
    assert running.process.returncode == 0, said


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def ensemble_answers(client: tt.TwoTowerClient) -> bool:
    message = Message()
    message.message.model_name = "ensemble"
    message.add("input_ids", [5])
    message.add("max_new_tokens", 4)
    try:
        return len(tt.AnswerStream(client, message.message, 20).answer().ids) == 4
    except tt.ModelNotReadyError:  # its part is loaded, and it is not yet
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_engines_process_comes_back(serving, number) -> None:
    """Open requests end at once with an error after which one may try again."""
    with serving.client(inactivity_timeout=30) as client:
        before = serving.ready["pid"]
        with client.stream(prompt_ids=[5], **LONG) as stream:
            next(stream)
            os.kill(serving.model("twotower"), number)
            with pytest.raises((tt.RequestFailedError, tt.ServerUnavailableError)):
                stream.answer()
        serving.ready_again()
        assert serving.ready["pid"] != before
        assert len(client.generate(prompt_ids=[5], max_new_tokens=4).ids) == 4


def test_a_part_of_the_ensemble_comes_back_alone(serving) -> None:
    """The other door does not notice: its stream goes on, and so do the engines."""
    server, engine = serving.ready["pid"], serving.model("twotower")
    with serving.client() as client, client.stream(prompt_ids=[5], **LONG) as stream:
        next(stream)
        for part in ("postprocessing", "llm", "preprocessing"):
            killed = serving.model(part)
            os.kill(killed, signal.SIGKILL)
            until(lambda part=part, killed=killed: serving.model(part) not in (None, killed))
        next(stream)
        until(lambda: ensemble_answers(client))
    assert (serving.ready["pid"], serving.model("twotower")) == (server, engine)


def test_the_server_itself_comes_back(serving) -> None:
    os.kill(serving.ready["pid"], signal.SIGKILL)
    serving.ready_again()
    with serving.client() as client:
        client.generate(prompt_ids=[5], max_new_tokens=4)


def test_a_probe_passes_on_a_busy_server_and_says_what_it_sees(serving) -> None:
    url = serving.ready["grpc"]
    with serving.client() as client:
        streams = [client.stream(prompt_ids=[5], **LONG) for _ in range(40)]
        until(lambda: client.probe()["waiting"] == 38)
        for kind in ("live", "ready"):
            ran = probe(kind, "--url", url)
            assert (ran.returncode, ran.stdout) == (0, f"{kind}: 2 running, 38 waiting\n")
        for stream in streams:
            stream.cancel()
    ran = probe("live", "--url", "127.0.0.1:9", "--json")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "no Triton server answers" in ran.stderr


def probe(*arguments: str) -> subprocess.CompletedProcess:
    command = [*TWOTOWER, "probe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_sigterm_refuses_what_is_new_and_finishes_what_is_open(packaged, alive) -> None:
    serving = start(packaged.repository, "--grace", "60", "--http-port", "0")
    url = serving.ready["grpc"]
    with serving.client() as client:
        stream = client.stream(prompt_ids=[5], max_new_tokens=2000, threshold=1.0)
        next(stream)
        serving.process.send_signal(signal.SIGTERM)
        until(lambda: client.probe()["draining"])
        with pytest.raises(tt.ServerBusyError, match="send the request again"):
            client.generate(prompt_ids=[5], max_new_tokens=4)
        assert probe("live", "--url", url).returncode == 0
        assert probe("ready", "--url", url).returncode == 1
        assert len(stream.answer().ids) == 2000
    serving.process.communicate(timeout=30)
    assert serving.process.returncode == 0
    assert alive(serving.ready["pid"]) == []


def test_grace_has_an_end(packaged) -> None:
    serving = start(packaged.repository, "--grace", "1")
    with serving.client() as client, client.stream(prompt_ids=[5], **LONG) as stream:
        next(stream)
        serving.process.send_signal(signal.SIGTERM)
        with pytest.raises(tt.ServerBusyError, match="shutting down"):
            stream.answer()
    serving.process.communicate(timeout=30)
    assert serving.process.returncode == 0
