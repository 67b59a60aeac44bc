"""`twotower serve --openai`: OpenAI's interface beside the server."""

from __future__ import annotations

import json
import signal
import subprocess

import openai
import pytest
from click.testing import CliRunner

from tests.support import TWOTOWER
from tests.support.served import processes_of
from twotower_engines.cli.serve import serve


@pytest.mark.slow  # a server of its own; test_access.py has the front end before another
@pytest.mark.server
def test_serve_speaks_openais_interface_too(packaged, tmp_path) -> None:
    key = tmp_path / "key"
    key.write_text("a-key\n")
    command = [*TWOTOWER, "serve", str(packaged.repository), "--grpc-port", "0", "--no-metrics"]
    command += ["--openai-port", "0", "--key-file", str(key), "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        ready = json.loads(running.stdout.readline())
        url = f"http://{ready['openai']}/v1"
        with openai.OpenAI(base_url=url, api_key="a-key", max_retries=0) as caller:
            got = caller.completions.create(model="twotower", prompt="Mia", max_tokens=20)
            assert got.usage.completion_tokens == 20
        stranger = openai.OpenAI(base_url=url, api_key="b", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    finally:
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
    assert running.returncode == 0
    assert processes_of(running.pid) == []


@pytest.mark.parametrize(
    ("words", "port"),
    [
        ([], None),
        (["--openai"], 9000),
        (["--openai-port", "9100"], 9100),
        (["--openai", "--openai-port", "0"], 0),
    ],
)
def test_the_port_has_a_default(monkeypatch, tmp_path, words, port) -> None:
    asked = []

    def supervise(repo, options, *_):
        asked.append(options.openai_port)
        raise SystemExit

    monkeypatch.setattr("twotower_engines.serving.supervisor.Supervisor", supervise)
    CliRunner().invoke(serve, [str(tmp_path), *words], catch_exceptions=False)
    assert asked == [port]
