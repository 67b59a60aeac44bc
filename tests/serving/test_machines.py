"""`twotower serve` on machines as people have them: odd paths, proxies, limits, rivals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import twotower_client as tt
from twotower_contract.engine_set import open_engine_set
from twotower_engines.errors import ServingError
from twotower_engines.serving import installation, place
from twotower_engines.serving.package import package
from twotower_engines.serving.ports import choose_ports, hold_ports
from twotower_engines.serving.server import ServerOptions, TritonServer
from twotower_engines.serving.settings import Settings

COMMAND = [sys.executable, "-m", "twotower_client.cli", "serve"]
QUIET = ["--grpc-port", "0", "--no-metrics"]
ODD = "o d&\"$x;\\'"  # what the shell between Triton and a model's process would take apart
OPTIONS = ServerOptions("127.0.0.1", 0, None, None)


def serve_once(repository: Path, command: list[str] = COMMAND, **variables: str) -> str:
    """Serve until ready, ask once, end; return the answer's text."""
    environment = {**os.environ, **variables}
    running = subprocess.Popen(
        [*command, str(repository), *QUIET, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    line = running.stdout.readline()
    assert line, running.communicate(timeout=30)[1]
    with tt.TwoTowerClient(json.loads(line)["grpc"], timeout=60) as client:
        answer = client.generate("Mia", max_new_tokens=4)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)
    return answer.text


def refused(*arguments: object, limit: str = "", **variables: str) -> str:
    """Serve what cannot be served; return the message, which must come at once."""
    words = [*COMMAND, *map(str, arguments), *QUIET]
    script = f'{limit}\nexec "$@"'
    ran = subprocess.run(
        ["bash", "-c", script, "serve", *words],
        capture_output=True, text=True, timeout=60, env={**os.environ, **variables},
    )  # fmt: skip
    assert ran.returncode == 2, ran.stderr
    assert "Traceback (most recent" not in ran.stderr.partition("log says")[0]
    return ran.stderr


@pytest.mark.server
def test_odd_names_everywhere_and_a_proxy(tmp_path, packaged) -> None:
    """Repository, engines, checkpoint, temporary folder and interpreter, in one go."""
    odd = tmp_path / f"{ODD} é"
    odd.mkdir()
    for source in (packaged.checkpoint, packaged.engines):
        shutil.copytree(source, odd / source.name)
    engines = odd / packaged.engines.name
    settings = Settings(engines, odd / packaged.checkpoint.name, slots=2, threads=1)
    package(open_engine_set(engines), odd / "repository", settings)
    (odd / "repository" / "lost+found").mkdir()  # as at the root of an ext4 volume
    temporary = odd / "temporary"
    temporary.mkdir()
    venv = odd / "venv"
    venv.symlink_to(sys.prefix)
    command = [str(venv / "bin" / "python"), *COMMAND[1:]]
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
    text = serve_once(
        odd / "repository", command, TMPDIR=str(temporary), no_proxy="", LC_ALL="C", **proxies
    )
    assert text
    assert list(temporary.glob("twotower*")) == []


@pytest.mark.server
def test_a_model_whose_process_dies_at_its_start_ends_the_wait(packaged, monkeypatch) -> None:
    """As where the loader does not find libpython: the server itself would wait for ever."""

    def with_broken_stub(found: installation.ServerInstallation, folder: Path) -> Path | None:
        backends = make_backends(found, folder)
        stub = backends / "python" / installation.STUB
        stub.write_text("#!/bin/sh\necho libpython3.12.so.1.0: cannot open shared object file\n")
        return backends

    make_backends = installation.make_backends
    monkeypatch.setattr("twotower_engines.serving.server.make_backends", with_broken_stub)
    with TritonServer(packaged.repository, OPTIONS) as server:
        with pytest.raises(ServingError, match="ended before it was ready") as raised:
            server.wait_until_ready(300)
        assert "libpython3.12.so.1.0: cannot open" in str(raised.value)


def test_a_missing_model_file_is_named(tmp_path, packaged) -> None:
    broken = tmp_path / "repository"
    shutil.copytree(packaged.repository, broken)
    (broken / "twotower" / "1" / "model.py").unlink()
    assert f"{broken}/twotower/1/model.py: is missing" in refused(broken)


def test_too_few_files_are_refused_by_name(packaged) -> None:
    said = refused(packaged.repository, limit="ulimit -n 64")
    assert "may open 64 files" in said
    assert "ulimit -n 65536" in said


def test_a_soft_limit_on_files_is_raised() -> None:
    code = (
        "import resource as r; from twotower_engines.serving.place import refusal;"
        "print(refusal(), r.getrlimit(r.RLIMIT_NOFILE)[0] > 64)"
    )
    words = ["bash", "-c", 'ulimit -Sn 64; exec "$@"', "x", sys.executable, "-c", code]
    assert subprocess.check_output(words, text=True) == "None True\n"


def test_too_little_shared_memory_is_refused(packaged, monkeypatch) -> None:
    monkeypatch.setattr(place, "_free_shared_memory", lambda: 2**20)
    with pytest.raises(ServingError, match=r"/dev/shm has 1 MB free.*--shm-size"):
        TritonServer(packaged.repository, OPTIONS)


def test_two_servers_that_look_at_a_port_at_once() -> None:
    """Both saw it free; the one that comes second is told, until the first is gone."""
    ports = choose_ports("127.0.0.1", {"--grpc-port": 0, "--http-port": 0})
    port = ports["--http-port"]
    first = hold_ports("127.0.0.1", ports)
    with pytest.raises(ServingError, match=f"port {port} is taken by another `twotower serve`"):
        hold_ports("127.0.0.1", {"--http-port": port})
    for one in first:
        one.close()
    for one in hold_ports("127.0.0.1", {"--http-port": port}):
        one.close()


def test_a_server_holds_its_ports_until_it_ends(packaged) -> None:
    with TritonServer(packaged.repository, OPTIONS) as server:
        ports = {"--grpc-port": int(server.grpc_address.rpartition(":")[2])}
        with pytest.raises(ServingError, match="is taken by another `twotower serve`"):
            hold_ports("127.0.0.1", ports)
    for one in hold_ports("127.0.0.1", ports):
        one.close()


def test_the_wheels_stub_is_copied(tmp_path) -> None:
    """Triton changes the mode of the file that it starts, through a link too."""
    found = installation.find_server()
    if found.wheel is None:
        pytest.skip("the server here is not the wheel's")
    stub = installation.make_backends(found, tmp_path) / "python" / installation.STUB
    assert not stub.is_symlink()
    assert os.access(stub, os.X_OK)


def test_a_temporary_folder_that_will_not_do(tmp_path, monkeypatch) -> None:
    odd = tmp_path / ODD
    odd.mkdir()
    monkeypatch.setattr(place.tempfile, "gettempdir", lambda: str(odd))
    monkeypatch.setattr(place, "PLACES", (str(tmp_path / "none"), str(tmp_path)))
    made = place.make_folder()
    assert made.parent == tmp_path
    monkeypatch.setattr(place, "PLACES", ("/proc/none",))
    with pytest.raises(ServingError, match=r"/proc/none \(No such file.*set TMPDIR"):
        place.make_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting in a namespace needs root here")
@pytest.mark.parametrize("options", ["noexec", "ro"])
def test_a_temporary_folder_without_exec_or_writing(tmp_path, options) -> None:
    code = (
        "import sys; from twotower_engines.serving import place; from pathlib import Path;"
        "place.PLACES = (sys.argv[1],); made = place.make_folder(); print(made.parent);"
        "made.rmdir()"
    )
    bad, good = tmp_path / "bad", tmp_path / "good"
    for folder in (bad, good):
        folder.mkdir()
    script = f'mount -t tmpfs -o {options} none {bad} && exec "$@"'
    words = ["unshare", "-m", "bash", "-c", script, "x", sys.executable, "-c", code]
    environment = {**os.environ, "TMPDIR": str(bad)}
    where = subprocess.check_output([*words, str(good)], text=True, env=environment).strip()
    # Python itself looks elsewhere where a temporary folder cannot be written
    assert where == (str(good) if options == "noexec" else "/tmp")
    if options == "ro":
        return
    ran = subprocess.run([*words, str(bad)], capture_output=True, text=True, env=environment)
    assert "a server needs a temporary folder, and none will do" in ran.stderr
