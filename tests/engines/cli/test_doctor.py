"""What `twotower doctor` says is so, and its remedies exist."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import tomllib

import pytest

from tests.support import ROOT
from twotower_client import cli as root
from twotower_engines.cli import diagnosis as doctor
from twotower_engines.serving import installation


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


def test_a_numpy_that_empties_answers_is_named(monkeypatch) -> None:
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: "2.1.0" if name == "numpy" else version(name)
    )
    assert any("numpy==1.26.4" in text for text in doctor.examine().abilities[-1].missing)


@pytest.mark.gpu
def test_a_gpu_is_seen() -> None:
    gpus = doctor.examine().gpus
    assert gpus
    assert re.fullmatch(r"\d+\.\d+", gpus[0]["compute_cap"])
