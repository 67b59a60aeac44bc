"""The processes of the models: what they need to start, what their death says, whom they ask."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import twotower_client as tt
from twotower_engines.errors import ServingError
from twotower_engines.serving import installation, stubs
from twotower_engines.serving.server import ServerOptions, TritonServer

OPTIONS = ServerOptions("127.0.0.1", 0, None, None)

# Writes down the names that a process asks for, in place of asking; addresses are no names.
RESOLVER = r"""
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    typedef int (*Real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    if (!node || !isalpha(*node))
        return ((Real) dlsym(RTLD_NEXT, "getaddrinfo"))(node, service, hints, found);
    FILE *log = fopen(getenv("ASKED"), "a");
    if (log) { fprintf(log, "%s\n", node); fclose(log); }
    return EAI_FAIL;
}
"""


def test_the_interpreters_own_library_is_put_on_the_linkers_path(tmp_path, monkeypatch) -> None:
    name = f"libpython{stubs.python_version()}.so.1.0"
    home = tmp_path / "home"
    home.mkdir()
    (home / name).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    monkeypatch.setattr(stubs.sysconfig, "get_config_var", lambda key: str(home))
    variables = stubs.library_path(tmp_path)
    folder, before = variables["LD_LIBRARY_PATH"].split(":")
    assert before == "/before"
    assert [one.name for one in Path(folder).iterdir()] == [name]
    assert (Path(folder) / name).resolve() == home / name


def test_an_interpreter_without_a_library_changes_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stubs.sysconfig, "get_config_var", lambda key: None)
    monkeypatch.setattr(stubs.sys, "base_prefix", str(tmp_path))
    assert stubs.library_path(tmp_path) == {}


def test_a_stub_finds_a_library_that_is_not_on_the_linkers_path(tmp_path, monkeypatch) -> None:
    """A program that needs what no linker knows, in the folder that the interpreter names."""
    name = f"libpython{stubs.python_version()}.so.1.0"
    compile_one = ["cc", "-x", "c", "-", "-o"]
    library, stub = tmp_path / "home" / name, tmp_path / "stub"
    library.parent.mkdir()
    soname = f"-Wl,-soname,only-here-{name}"
    shared = [*compile_one, str(library), "-shared", "-fPIC", soname]
    subprocess.run(shared, input="int one;", text=True, check=True)
    monkeypatch.setattr(stubs, "_library_name", lambda: f"only-here-{name}")
    program = [*compile_one, str(stub), "-Wl,--no-as-needed", "-x", "none", str(library)]
    subprocess.run(program, input="int main(void) { return 1; }", text=True, check=True)
    library.rename(library.with_name(f"only-here-{name}"))
    assert "cannot open shared object file" in stubs.stub_problem(stub)
    monkeypatch.setattr(stubs.sysconfig, "get_config_var", lambda key: str(library.parent))
    assert stubs.stub_problem(stub) is None


@pytest.mark.server
def test_what_a_stub_prints_when_it_dies_ends_the_wait(packaged, tmp_path, monkeypatch) -> None:
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\n[ $# = 0 ] && exit 1\necho 'a stub fell over' >&2\nexit 3\n")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(installation, "_stub", lambda wheel: stub)
    with (
        TritonServer(packaged.repository, OPTIONS) as server,
        pytest.raises(ServingError, match=r"process of a model ended(.|\n)*a stub fell over"),
    ):
        server.wait_until_ready(300)
    assert stubs.dead_stubs(os.getpid()) == []


def device_ids(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if "deviceid" in path.name.lower()]


# ONNX Runtime reports nothing where one of these says that a build machine runs it.
BUILD_MACHINES = (
    "CI TF_BUILD GITHUB_ACTIONS GITLAB_CI CIRCLECI TRAVIS JENKINS_URL CODEBUILD_BUILD_ID"
    " TEAMCITY_VERSION BUILDKITE APPVEYOR BITBUCKET_BUILD_NUMBER"
)


def device_ids_left_by(code: str, cache: Path) -> list[Path]:
    """Return the device ids that a process which runs `code` leaves in the folder `cache`."""
    cache.mkdir()
    hidden = {"ORT_DISABLE_TELEMETRY", *BUILD_MACHINES.split()}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    variables = {**kept, "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
    subprocess.run([sys.executable, "-c", code], env=variables, check=True)
    return device_ids(cache)


def test_onnx_runtime_is_loaded_without_telemetry(tmp_path) -> None:
    """And the control: loaded by itself it leaves a device's id, except on a build machine."""
    ours = "from twotower_contract.onnxruntime import import_onnxruntime as f; f()"
    assert device_ids_left_by(ours, tmp_path / "ours") == []
    if not device_ids_left_by("import onnxruntime", tmp_path / "control"):
        pytest.skip("ONNX Runtime by itself leaves no device id on this machine either")


@pytest.mark.server
def test_serving_asks_no_name_server_and_leaves_no_device_id(
    packaged, tmp_path, monkeypatch
) -> None:
    library, asked, cache = tmp_path / "resolver.so", tmp_path / "asked", tmp_path / "cache"
    command = ["cc", "-x", "c", "-", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run(command, input=RESOLVER, text=True, check=True)
    cache.mkdir()
    with monkeypatch.context() as patch:
        patch.delenv("ORT_DISABLE_TELEMETRY")
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("ASKED", str(asked))
        for name in ("XDG_CACHE_HOME", "HOME"):
            patch.setenv(name, str(cache))
        server = TritonServer(packaged.repository, OPTIONS)
        question = [sys.executable, "-c", "import socket; socket.getaddrinfo('a.name', 1)"]
        assert subprocess.run(question, capture_output=True).returncode == 1
    with server:
        server.wait_until_ready(120)
        with tt.TwoTowerClient(server.grpc_address) as client:
            assert client.generate("Mia", max_new_tokens=20).ids
    assert asked.read_text().split() == ["a.name"], "the first is our own question"
    assert device_ids(cache) == []


def test_this_interpreters_stub_starts() -> None:
    found = installation.find_server()
    assert found.wheel is None or stubs.stub_problem(installation._stub(found.wheel)) is None
    assert sysconfig.get_config_var("LIBDIR")
