"""What `twotower doctor` says is so, and its remedies exist."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tomllib

import pytest

from tests.support import ROOT
from twotower_client import cli as root
from twotower_engines.cli import doctor
from twotower_engines.errors import ServingError
from twotower_engines.serving import installation

bundled = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="Python 3.13 has no numpy for the bundled server"
)


def run(capsys, *options: str) -> str:
    root.cli.main(["doctor", *options], standalone_mode=False)
    return capsys.readouterr().out


def extras() -> dict[str, set[str]]:
    """Extra to the distributions that it brings, other extras of ours followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    raw = project["optional-dependencies"]

    def names(extra: str) -> set[str]:
        found = set()
        for line in raw[extra]:
            own = re.match(r"twotower\[(.*)\]", line)
            if own:
                found |= set().union(*(names(one) for one in own[1].split(",")))
            else:
                found.add(re.match(r"[\w.-]+", line)[0])
        return found

    return {extra: names(extra) for extra in raw}


@bundled
def test_the_facts_are_this_machines(capsys) -> None:
    found = json.loads(run(capsys, "--json"))
    assert found["python"] == platform.python_version()
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert 2**28 < found["memory_bytes"] < 2**50
    assert found["packages"]["onnxruntime"]
    assert found["server"] == installation.find_server().source
    missing = {one["name"]: one["missing"] for one in found["abilities"]}
    # this test runs on an installation with everything that the path on a CPU needs
    assert missing["serve (package, serve)"] == []
    assert missing["build and run engines for the CPU (build --sku cpu, run)"] == []


@bundled
def test_people_see_the_same(capsys) -> None:
    text = run(capsys)
    assert re.search(r"yes +serve \(package, serve\)", text)
    assert platform.python_version() in text


def test_every_remedy_brings_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    brought, checked = extras(), 0
    for ability in doctor.examine().abilities:
        for text in ability.missing:
            match = re.fullmatch(r"([\w, -]+): pip install 'twotower\[([\w-]+)\]'", text)
            if match:
                checked += 1
                assert set(match[1].split(", ")) <= brought[match[2]], text
    assert checked >= 8


def test_every_extra_of_the_command_line_exists() -> None:
    brought = extras()
    for verb in root.VERBS.values():
        assert verb.extra is None or verb.extra in brought
    for module, names in root.EXTRAS_OF_MODULE.items():
        for extra in names:
            assert extra in brought, module


@bundled
def test_without_a_server_it_says_how_to_get_one(monkeypatch, tmp_path) -> None:
    # the wheel is installed wherever the tests run, so its absence can only be played
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pytriton" else find(name)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor.examine()
    assert found.server is None
    assert found.gpus == ()
    assert any("twotower[serve]" in text for text in found.abilities[-1].missing)


@bundled
def test_a_numpy_that_empties_answers_is_named(monkeypatch) -> None:
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: "2.1.0" if name == "numpy" else version(name)
    )
    assert any("numpy<2" in text for text in doctor.examine().abilities[-1].missing)


@bundled
def test_a_system_that_the_bundled_server_cannot_run_on_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation.platform, "libc_ver", lambda: ("glibc", "2.34"))
    (missing,) = doctor.examine().abilities[-1].missing
    assert "needs glibc 2.35, where this system has glibc 2.34; serve in NVIDIA's" in missing
    monkeypatch.setattr(installation.platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(ServingError, match="where this system has another C library"):
        installation.find_server()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation.sys, "version_info", (3, 13, 0))
    with pytest.raises(ServingError, match=r"numpy below 2.*use Python 3\.11 or 3\.12, or"):
        installation.find_server()


@bundled
def test_a_stub_that_cannot_start_is_named(monkeypatch, tmp_path) -> None:
    """A real program that asks the dynamic linker for a library which is nowhere."""
    compile_one = ["cc", "-x", "c", "-", "-o"]
    library, stub = tmp_path / "libgone.so", tmp_path / "stub"
    subprocess.run(
        [*compile_one, str(library), "-shared", "-fPIC"], input="int one;", text=True, check=True
    )
    subprocess.run(
        [*compile_one, str(stub), f"-L{tmp_path}", "-Wl,--no-as-needed", "-lgone"],
        input="int main(void) { return 1; }", text=True, check=True,
    )  # fmt: skip
    library.unlink()
    monkeypatch.setattr(installation, "_stub", lambda wheel: stub)
    (missing,) = doctor.examine().abilities[-1].missing
    assert "libgone.so: cannot open shared object file" in missing
    assert "that has its shared library" in missing


@pytest.mark.gpu
def test_a_gpu_is_seen() -> None:
    gpus = doctor.examine().gpus
    assert gpus
    assert re.fullmatch(r"\d+\.\d+", gpus[0]["compute_cap"])
