"""`twotower serve`: what it prints, how it ends, and what it says when it cannot start."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import twotower_client as tt
from tests.support import TWOTOWER
from tests.support.command import twotower
from tests.support.waiting import wait_until
from twotower_engines.errors import ServingError
from twotower_engines.serving.log import end_of_log
from twotower_engines.serving.ports import choose_ports

COMMAND = [*TWOTOWER, "serve"]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch) -> None:
    """A command that is killed cannot remove its folder of links."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def start(repository: Path, *options: str) -> tuple[subprocess.Popen, dict]:
    """Start `twotower serve` and return it with its ready line."""
    command = [*COMMAND, str(repository), "--grpc-port", "0", "--no-metrics"]
    running = subprocess.Popen(
        [*command, "--json", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = running.stdout.readline()
    assert line, running.communicate(timeout=30)[1]
    return running, json.loads(line)


@pytest.mark.server
def test_ready_line_and_ctrl_c(packaged, alive) -> None:
    running, ready = start(packaged.repository)
    assert ready["event"] == "ready"
    assert ready["http"] is None
    with tt.TwoTowerClient(ready["grpc"]) as client:
        client.check_ready()
    running.send_signal(signal.SIGINT)
    rest, said = running.communicate(timeout=30)
    assert (running.returncode, rest) == (0, "")
    assert "loading" in said
    assert "ending the server" in said
    assert alive(ready["pid"]) == []


def open_stream(address: str) -> subprocess.Popen:
    """Start `twotower generate` on an answer of many minutes; return it when it has begun."""
    command = [*TWOTOWER, "generate", "--prompt-ids", "5"]
    command += ["--url", address, "--stream", "--max-new-tokens", "4000", "--threshold", "1"]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert asking.stdout.read(1)
    return asking


@pytest.mark.server
@pytest.mark.parametrize(
    ("how", "seconds"),
    [
        (signal.SIGINT, 60),
        pytest.param(signal.SIGINT, 14, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 14, marks=pytest.mark.slow),
    ],
)
def test_an_open_stream_is_told_and_does_not_hold_the_server(packaged, alive, how, seconds) -> None:
    running, ready = start(packaged.repository)
    asking = open_stream(ready["grpc"])
    assert len(alive(ready["pid"])) >= 4  # the server and three models
    assert all(remains(running.pid))
    running.send_signal(how)
    start_of_end = time.monotonic()
    _, said = asking.communicate(timeout=60)
    assert asking.returncode == 1
    assert b"the server is shutting down" in said
    running.communicate(timeout=60)
    assert running.returncode == (0 if how == signal.SIGINT else -signal.SIGKILL)
    wait_until(lambda: alive(ready["pid"]) == [] and remains(running.pid) == ([], []))
    assert time.monotonic() - start_of_end < seconds


@pytest.mark.server
@pytest.mark.parametrize("seconds", [60, pytest.param(5, marks=pytest.mark.slow)])
def test_a_server_that_hangs_is_killed(packaged, alive, seconds) -> None:
    """Stopped processes stand for anything that hangs."""
    from twotower_engines.serving.server import ServerOptions, TritonServer

    before = remains(os.getpid())
    with TritonServer(packaged.repository, ServerOptions("127.0.0.1", 0, None, None)) as server:
        server.wait_until_ready(60)
        os.killpg(server.pid, signal.SIGSTOP)
        server.request_stop()
        wait_until(lambda: server.exit_code is not None, seconds)
        assert server.wait() == -signal.SIGKILL
        wait_until(lambda: alive(server.pid) == [] and remains(os.getpid()) == before, seconds)


def remains(starter: int) -> tuple[list[Path], list[Path]]:
    """What servers of a process leave when nobody cleans up: shared memory and folders of links."""
    folders = Path(os.environ["TMPDIR"]).glob("twotower-serve-*")
    return sorted(Path("/dev/shm").glob(f"twotower_{starter}_*")), sorted(folders)


@pytest.mark.server
def test_a_model_that_cannot_load_says_why(tmp_path, packaged) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(packaged.repository, broken)
    config = broken / "twotower" / "config.pbtxt"
    config.write_text(config.read_text().replace(str(packaged.engines), "/no/engines"))
    ran = twotower("serve", broken, "--grpc-port", 0, "--no-metrics")
    assert ran.returncode == 2
    *_, last = ran.stderr.splitlines()
    assert last == (
        "twotower could not be loaded: EngineSetError: /no/engines: no such folder; build engines "
        "with `twotower build`"
    )
    assert "+--" not in ran.stderr, "Triton's tables"
    assert "Traceback (most recent call last)" not in ran.stderr.partition("log says")[0]


def test_the_end_of_a_log_has_each_models_reason_on_a_line() -> None:
    head = "1129 09:53:02.363709 7 model_lifecycle.cc:642]"
    log = [
        f'I{head} "CUDA driver version is insufficient"',
        f'E{head} "failed to load \'a\' version 1: Internal: OSError: \\"x\\"\\ny\\n\\nAt:\\n  b"',
        f"I{head} ",
        "+---+",
        "| a |",
        f"E{head} \"failed to load 'b' version 1: Unavailable: gone\"",
    ]
    shown = end_of_log("\n".join(log), 30).splitlines()
    assert shown == [
        "the server's log says:", f"  {log[1]}", f"  {log[5]}",
        'a could not be loaded: OSError: "x" y', "b could not be loaded: Unavailable: gone",
    ]  # fmt: skip


@pytest.mark.server
def test_a_server_without_our_model_is_not_ready(tmp_path) -> None:
    from twotower_engines.serving.server import ServerOptions, TritonServer

    model = tmp_path / "repository" / "other"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(
        'name: "other" backend: "python" max_batch_size: 0\n'
        'input [ { name: "a" data_type: TYPE_INT32 dims: [ 1 ] } ]\n'
        'output [ { name: "b" data_type: TYPE_INT32 dims: [ 1 ] } ]\n'
    )
    (model / "1" / "model.py").write_text(
        "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
    )
    options = ServerOptions("127.0.0.1", 0, None, None)
    with TritonServer(model.parent, options, models=("other",)) as server:
        server.wait_until_ready(60)
        with tt.TwoTowerClient(server.grpc_address) as client:
            for call in (client.check_ready, lambda: client.generate("a")):
                with pytest.raises(tt.ModelNotReadyError, match="`twotower` is not ready"):
                    call()
            with pytest.raises(tt.ModelNotReadyError):
                client.wait_until_ready(0.3)


def test_a_taken_port_is_named(packaged) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for option in ("--grpc-port", "--http-port", "--metrics-port"):
            ports = dict.fromkeys(("--grpc-port", "--http-port", "--metrics-port"), 0)
            with pytest.raises(ServingError, match=f"port {port} is taken.*{option}"):
                choose_ports("127.0.0.1", {**ports, option: port})
            given = {**ports, option: port}
            assert choose_ports("127.0.0.1", given, [option])[option] == port, "by our own door"
        ran = twotower("serve", packaged.repository, "--grpc-port", port)
    assert ran.returncode == 2
    assert f"error: port {port} is taken" in ran.stderr


def test_ports_are_free_and_different() -> None:
    wanted = {"--grpc-port": 0, "--http-port": 0, "--metrics-port": 0}
    ports = choose_ports("127.0.0.1", wanted)
    assert len(set(ports.values())) == 3
    assert all(port > 0 for port in ports.values())
    assert choose_ports("127.0.0.1", ports) == ports
    with pytest.raises(ServingError, match="are both 7777"):
        choose_ports("127.0.0.1", {"--grpc-port": 7777, "--http-port": 7777})
    with pytest.raises(ServingError, match="--grpc-port is 70000"):
        choose_ports("127.0.0.1", {"--grpc-port": 70000})
    with pytest.raises(ServingError, match=r"--host no\.such\.host\.invalid"):
        choose_ports("no.such.host.invalid", {"--grpc-port": 0})
    if os.geteuid() != 0:
        with pytest.raises(ServingError, match="port 80 "):
            choose_ports("127.0.0.1", {"--grpc-port": 80})


def test_no_repository_and_no_server(tmp_path, packaged, monkeypatch) -> None:
    from twotower_engines.serving.server import ServerOptions, TritonServer

    options = ServerOptions(grpc_port=0, http_port=None, metrics_port=None)
    with pytest.raises(ServingError, match="no such folder"):
        TritonServer(tmp_path / "none", options)
    with pytest.raises(ServingError, match="is no model repository of ours"):
        TritonServer(tmp_path, options)
    # the wheel is installed wherever the tests run, so its absence can only be played
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pytriton" else find(name)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServingError, match=r"twotower\[serve\]"):
        TritonServer(packaged.repository, options)


def test_a_numpy_that_empties_answers_is_refused(packaged, monkeypatch) -> None:
    from twotower_engines.serving.server import ServerOptions, TritonServer

    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.1.0" if name == "numpy" else version(name)
    )
    with pytest.raises(ServingError, match=r"numpy is 2\.1\.0.*numpy<2"):
        TritonServer(packaged.repository, ServerOptions("127.0.0.1", 0, None, None))


def test_a_log_that_cannot_be_written_is_named(tmp_path, packaged) -> None:
    (tmp_path / "file").touch()
    for log in ("/proc/x.log", str(tmp_path / "file" / "x.log")):
        ports = [word for kind in ("grpc", "http", "metrics") for word in (f"--{kind}-port", 0)]
        before = remains(os.getpid())
        ran = twotower("serve", packaged.repository, *ports, "--log", log)
        assert ran.returncode == 2
        assert ran.stderr.startswith(f"error: {log}: the log cannot be written (")
        assert ran.stderr.count("\n") == 1
        assert remains(os.getpid()) == before


def test_a_server_on_path_comes_first(tmp_path, monkeypatch) -> None:
    from twotower_engines.serving.installation import find_server, make_backends

    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_server()
    assert found.binary == binary
    assert make_backends(found, tmp_path) is None


def stand_in(folder: Path, monkeypatch, script: str) -> None:
    """Let the server be a shell's script."""
    binary = folder / "tritonserver"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_server_that_aborts_as_it_starts_is_started_once_more(
    tmp_path, packaged, monkeypatch
) -> None:
    """As server 2.51 does now and then; a server that says no is not asked again."""
    starts = tmp_path / "starts"
    stand_in(tmp_path, monkeypatch, f"[ -e {starts} ] && exit 3\ntouch {starts}\nkill -ABRT $$")
    ran = twotower("serve", packaged.repository, "--grpc-port", 0, "--no-metrics")
    assert ran.returncode == 2
    aborted, _, refused = ran.stderr.partition("is started again")
    assert "did not start" in aborted
    assert "ended by signal SIGABRT" in refused
    assert refused.count("ended with exit code 3 before it was ready") == 1


def test_a_log_keeps_what_was_said_before_a_new_start(tmp_path, packaged, monkeypatch) -> None:
    """Why a server ended stands there; an error quotes its own start alone."""
    starts, log = tmp_path / "starts", tmp_path / "log"
    again = f"[ -e {starts} ] && echo second && exit 3"
    stand_in(tmp_path, monkeypatch, f"{again}\ntouch {starts}\necho first\nkill -ABRT $$")
    log.write_text("of yesterday\n")
    ran = twotower("serve", packaged.repository, "--grpc-port", 0, "--no-metrics", "--log", log)
    assert ran.returncode == 2
    assert log.read_text() == "of yesterday\nfirst\nsecond\n"
    assert "yesterday" not in ran.stderr
    assert ran.stderr.count("first") == 1
    assert "second" in ran.stderr.partition("exit code 3")[2]


def test_a_log_that_is_a_pipe_is_not_read(tmp_path, packaged, monkeypatch) -> None:
    """As in the image, whose log is standard error: whoever reads it there waits for ever."""
    stand_in(tmp_path, monkeypatch, "echo why\nexit 3")
    command = [*COMMAND, packaged.repository, "--grpc-port", "0", "--no-metrics"]
    ran = subprocess.run(
        [*command, "--log", "/dev/stderr"], stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert ran.returncode == 2
    assert "why\n" in ran.stderr
    assert ran.stderr.endswith("/dev/stderr has its log\n")
