"""Engines of a random checkpoint, and real servers on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from twotower_client import TwoTowerClient

LONG = {"max_new_tokens": 4000, "threshold": 1.0}  # many seconds: a token in each turn


@dataclass(frozen=True)
class Packaged:
    """A checkpoint with its engines and its model repository."""

    checkpoint: Path
    engines: Path
    repository: Path


@pytest.fixture(scope="session")
def packaged(tmp_path_factory) -> Packaged:
    """A random checkpoint with a real tokenizer, packaged with two slots."""
    from twotower_contract.engine_set import open_engine_set
    from twotower_engines.serving.package import package
    from twotower_engines.serving.settings import Settings

    folder = tmp_path_factory.mktemp("served")
    engines = build_random_engines(folder)
    settings = Settings(engines, slots=2, threads=1, prefix_mib=4)
    package(open_engine_set(engines), folder / "repository", settings)
    return Packaged(folder / "checkpoint", engines, folder / "repository")


def build_random_engines(folder: Path) -> Path:
    """Export and build a random checkpoint for the CPU; return the engine set."""
    from twotower_client.cli import cli
    from twotower_export.tiny.checkpoints import write_random_checkpoint

    checkpoint, bundle, engines = (folder / name for name in ("checkpoint", "bundle", "engines"))
    write_random_checkpoint(checkpoint, "ME*M", 32, 3)
    cli.main(["export", str(checkpoint), str(bundle)], standalone_mode=False)
    build = ["build", str(bundle), str(engines), "--sku", "cpu", "--slots", "4"]
    cli.main([*build, "--context", "4096"], standalone_mode=False)
    return engines / "cpu"


@pytest.fixture(scope="session")
def server(packaged):
    """The server that most tests share. At the end nothing of it may be left."""
    from twotower_engines.serving.server import ServerOptions, TritonServer

    with TritonServer(packaged.repository, ServerOptions("127.0.0.1", 0, 0)) as running:
        running.seconds_to_ready = running.wait_until_ready(120)
        group = running.pid
        yield running
        assert running.exit_code is None, running.log_tail(200)
    assert processes_of(group) == []
    assert not list(Path("/dev/shm").glob(f"{running._prefix}*"))


@pytest.fixture(scope="session")
def soaking(server, packaged, tmp_path_factory):
    """A soak of two minutes in processes of their own, which yield to others: `tests.support.soak`.

    Gives the function that waits for its outcome. It begins after the server that others share is
    ready, whose start is timed.
    """
    from tests.support.soak import Soaked

    arguments = ["tests.support.soak", str(packaged.repository), "64", "120"]
    log = tmp_path_factory.mktemp("soak") / "log"
    with log.open("w") as errors:
        command = ["nice", "-n", "5", sys.executable, "-m", *arguments]
        running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
    waiting = ThreadPoolExecutor(1)  # other tests find no zombie
    printed = waiting.submit(running.communicate)

    def outcome() -> Soaked:
        text, _ = printed.result(timeout=600)
        assert running.returncode == 0, log.read_text()
        return Soaked(**json.loads(text))

    yield outcome
    running.kill()  # its server notices
    waiting.shutdown()


@pytest.fixture
def client(server):
    from twotower_client import TwoTowerClient

    with TwoTowerClient(server.grpc_address, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="session")
def http(server):
    """The address of HTTP, `http://host:port`, before the server that most tests share."""
    from twotower_client import TwoTowerClient
    from twotower_client.http_door import Door

    with TwoTowerClient(server.grpc_address) as asking, Door(("127.0.0.1", 0), asking) as door:
        threading.Thread(target=door.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{door.server_address[1]}"
        door.shutdown()


@contextmanager
def freed_early(client: TwoTowerClient, tokens: int = 4000) -> Iterator[None]:
    """Check that answers of so many tokens, begun within, leave their slots before they are whole.

    Turns of the scheduler take the place of seconds: a whole answer takes as many as it has tokens,
    on a slow machine, too.
    """
    before = client.probe(60)["turns"]
    yield
    wait_until(lambda: not sum(client.probe(60)[name] for name in ("running", "waiting")))
    turns = client.probe(60)["turns"] - before
    assert turns < tokens, f"free after {turns} turns, in which {tokens} tokens are made"


def processes_of(group: int) -> list[int]:
    """Return the processes of a group that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        if after_name[0] != "Z" and int(after_name[2]) == group:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.fixture(scope="session")
def alive():
    """The function `processes_of`."""
    return processes_of


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """GRPC would ask a proxy for 127.0.0.1 too."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", os.environ.get("no_proxy", "") + ",127.0.0.1,localhost")
