"""Quantized weights from the checkpoint to the server's answer, on the CPU flavour."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support import TWOTOWER
from tests.support.measured import run_measured
from twotower_contract.engine_set import open_engine_set

PROMPT = "Mia the fox lived by the river. Mia had a red kite and loved it more than anything."


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("format_", ["fp8", "nvfp4", "int4"])
def test_the_server_answers_as_twotower_run_does(tmp_path, format_):
    """The demo with a precision: quantize, export, build, package, serve, generate."""
    folder = tmp_path / "demo"
    options = ("--folder", str(folder), "--precision", format_, "--max-new-tokens", "40")
    command = [*TWOTOWER, "demo", *options, "--prompt", PROMPT]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "twotower quantize" in ran.stdout
    (said,) = [line for line in ran.stdout.splitlines() if line.startswith(PROMPT)]
    answer = ran.stdout[ran.stdout.index(said) + len(PROMPT) :].split("\n\n")[0].replace("|", "")
    done = run_measured(
        "run", folder / "engines", "--prompt", PROMPT, "--max-new-tokens", 40, "--json"
    )
    assert answer == json.loads(done.stdout)["text"]
    manifest = open_engine_set(folder / "engines").manifest
    formats = {one.format for some in manifest.weights.values() for one in some.values()}
    assert formats == {None, format_}
    assert manifest.golden is not None  # PyTorch's own answer, which the server's start has given
