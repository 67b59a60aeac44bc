"""The examples of docs/call.md work as they stand, but for the port."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import urllib.request

import pytest

from tests.support import ROOT, TWOTOWER

pytestmark = pytest.mark.server
TEXT = (ROOT / "docs" / "call.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python(server, number) -> None:
    code = blocks("python")[number].replace("localhost:8001", server.grpc_address)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_shell(server) -> None:
    lines = [line for line in blocks("sh")[0].splitlines() if line.startswith("twotower ")]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.replace("localhost:8001", server.grpc_address))[1:]
        if "--url" not in words:
            words += ["--url", server.grpc_address]
        ran = subprocess.run(
            [*TWOTOWER, *words],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip()


def test_http(http) -> None:
    """What the line with curl sends, sent without curl, which not every machine has."""
    [command] = re.findall(r"curl -N .*?}'", "".join(blocks("sh")), flags=re.DOTALL)
    _, _, address, _, data = shlex.split(command.replace("\\\n", ""))
    url = address.replace("localhost:8000", http)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data.encode()), timeout=60) as response:
        lines = response.read().decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert len(events) == 3
    assert events[-1]["finish_reason"] == "length"


def test_each_option_over_http(http) -> None:
    from twotower_contract.options import OPTIONS

    lines = [line for block in blocks("sh") for line in block.splitlines() if "generate" in line]
    told = set()
    for line in (one for one in lines if one.startswith("curl localhost")):
        _, address, _, data = shlex.split(line)
        told |= set(json.loads(data))
        url = address.replace("localhost:8000", http)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, data.encode()), timeout=60) as response:
            assert b"text_output" in response.read(), line
    assert told == {"text_input", *OPTIONS}


def test_the_options_are_all_there() -> None:
    from twotower_contract.options import OPTIONS

    table = TEXT.partition("| option |")[2].partition("###")[0]
    listed = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows(table))))
    assert listed == set(OPTIONS)


def test_the_exceptions_are_all_there() -> None:
    import twotower_client

    table = TEXT.partition("| exception |")[2].partition("There is always")[0]
    listed = {row.split("`")[1] for row in rows(table)}
    ours = {name for name in twotower_client.__all__ if name.endswith("Error")}
    assert listed == ours - {"ClientError"}


def rows(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("| `")]
