"""The wheel without any extra: it asks a real server, and other verbs name their extra."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile

import pytest

from tests.support import ROOT
from twotower_client.cli import EXTRAS_OF_MODULE


def modules_of_extras() -> set[str]:
    """Modules that only an extra brings: without those that tritonclient itself needs."""
    needs = importlib.metadata.requires("tritonclient") or []
    return set(EXTRAS_OF_MODULE) - {re.split(r"\W", need.replace("-", "_"))[0] for need in needs}


@pytest.fixture(scope="module")
def installed_alone(wheel, tmp_path_factory):
    """A function that runs `twotower` from the wheel where no extra's package can be imported."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    sources = [str(ROOT / folder) for folder in ("export", "engines", "client")]
    program = f"""
import importlib.abc, importlib.util, sys
absent = {modules_of_extras()!r}
sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p not in {sources!r}]
import twotower_client.cli as c
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in absent:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: (
    None if name.partition('.')[0] in absent else find(name, *more)
)
sys.meta_path.insert(0, Absent())
assert c.__file__.startswith({str(site)!r})
assert not absent & set(sys.modules)
sys.argv[0] = 'twotower'
c.main()
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True, text=True, cwd=site, env=environment, timeout=60,
        )  # fmt: skip

    return run


def test_a_client_alone_says_who_does_not_answer(installed_alone):
    asked = installed_alone("generate", "hello", "--url", "localhost:1")
    assert asked.returncode == 1
    assert "localhost:1" in asked.stderr
    assert "Traceback" not in asked.stderr


@pytest.mark.server
def test_a_client_alone_gets_what_a_whole_installation_gets(installed_alone, server, client):
    asked = installed_alone(
        "generate", "--prompt-ids", "5,3,7", "--max-new-tokens", "20", "--json",
        "--url", server.grpc_address,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout)
    expected = client.generate(prompt_ids=[5, 3, 7], max_new_tokens=20)
    assert tuple(found["output_ids"]) == expected.output_ids
    assert found["text"] == expected.text
    assert "warning: the prompt holds the mask token" in asked.stderr  # as `run` warns of it
    streamed = installed_alone(
        "generate", "Mia", "--stream", "--max-new-tokens", "1", "--url", server.grpc_address
    )
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stderr.startswith("1 token in ")


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        (["tiny", "out", "--random"], "reference"),
        (["export", "{checkpoint}", "bundle"], "export"),
        (["build", "{bundle}", "--sku", "cpu", "engines"], "build"),
        (["run", "{engines}", "--prompt-ids", "5"], "build"),
        (["kernels"], "kernels"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_verb_alone_names_its_extra(installed_alone, packaged, verb, extra):
    places = {
        "checkpoint": packaged.checkpoint,
        "bundle": packaged.checkpoint.parent / "bundle",
        "engines": packaged.engines,
    }
    ran = installed_alone(*(word.format(**places) for word in verb))
    assert ran.returncode == 2, ran.stderr
    assert f"pip install 'twotower[{extra}]'" in ran.stderr
    assert "Traceback" not in ran.stderr
