"""`twotower demo`: the whole path as a newcomer sees it, and what is refused before it begins."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TWOTOWER
from tests.support.browser import address_of, chromium
from tests.support.command import twotower
from twotower_client.demo_cli import BLOCK_END, NEEDED, PROMPT

TOKENS = 40  # three blocks


def demo(*options: str, command: list[str] = TWOTOWER) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, "demo", *options], capture_output=True, text=True, timeout=300)


@pytest.mark.server
def test_the_whole_path(tmp_path) -> None:
    folder = tmp_path / "demo"
    page = tmp_path / "replay.html"
    ran = demo("--folder", str(folder), "--max-new-tokens", str(TOKENS), "--html", str(page))
    assert ran.returncode == 0, ran.stderr
    steps = [
        shlex.split(line.partition("] twotower ")[2])
        for line in ran.stdout.splitlines()
        if line.startswith("[")
    ]
    verbs = ["tiny", "export", "build", "package", "serve", "generate"]
    assert [step[0] for step in steps] == verbs

    # the prompt, and the answer block by block
    shown = re.search(f"^{re.escape(PROMPT)}(.*?)\n\n", ran.stdout, re.MULTILINE | re.DOTALL)
    *blocks, after = shown.group(1).split(BLOCK_END)
    assert len(blocks) == 3
    assert all(blocks)
    assert after == ""
    figures = re.search(
        r"^40 tokens in [0-9.]+ s: [0-9]+ tokens/s, ([0-9.]+) tokens per denoiser call, "
        r"finished by length\ndenoiser calls per block: (\d+), (\d+), (\d+)$",
        ran.stdout,
        re.MULTILINE,
    )
    rate, *calls = (float(group) for group in figures.groups())
    assert rate == round(TOKENS / sum(calls), 1)
    for name in ("checkpoint", "bundle", "engines", "repository"):
        assert re.search(rf"^  {name} +[0-9.]+ MB  {folder / name}$", ran.stdout, re.MULTILINE)
        assert any((folder / name).iterdir())

    with chromium() as browser:
        browser.open(address_of(page))
        browser.press("\ue010")
        shown = browser.run("return document.querySelector('.board').textContent")
        assert shown == PROMPT + "".join(blocks)
        assert browser.text(".where").startswith("block 3 of 3, call ")
        assert browser.text(".where").endswith(": 0 of 8 masked")
        assert browser.problems() == []

    # the commands that were shown, given again as they are, give the same
    serving = subprocess.Popen([*TWOTOWER, *steps[4]], stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout.readline().startswith("ready grpc=")
        again = subprocess.run([*TWOTOWER, *steps[5]], capture_output=True, text=True, timeout=60)
    finally:
        serving.send_signal(signal.SIGINT)
        serving.terminate()  # the second signal ends the server at once
        serving.communicate(timeout=30)
    assert again.stdout == "".join(blocks) + "\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", ""], "--prompt is empty; give some text"),
        (["--prompt", "x" * 2049], "--prompt has 2049 bytes; the demo takes 2048"),
        (["--prompt", "a\udcff"], "--prompt is not valid UTF-8 at character 1"),
        (["--max-new-tokens", "0"], "0 is not in the range 1<=x<=2048"),
        (["--max-new-tokens", "2049"], "2049 is not in the range 1<=x<=2048"),
        (["--max-new-tokens", "many"], "'many' is not a valid integer range"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_last_step_would_refuse_is_refused_first(tmp_path, options, said) -> None:
    ran = twotower("demo", "--folder", tmp_path / "demo", *options)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert ran.stdout == ""
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path) -> None:
    (tmp_path / "thesis.tex").touch()
    for folder, said in (
        (tmp_path, "is not empty and no earlier demo's"),
        (tmp_path / "thesis.tex" / "demo", "cannot be written (Not a directory)"),
        (Path("/proc/demo"), "cannot be written ("),
    ):
        ran = twotower("demo", "--folder", folder)
        assert ran.returncode == 2
        assert ran.stderr.startswith(f"error: {folder}: {said}")
        assert ran.stderr.endswith("; choose another with --folder\n")
        assert ran.stderr.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.tex"]


def test_missing_packages_are_all_named_first(tmp_path) -> None:
    hidden = {*NEEDED, "pytriton"}
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        f"u.find_spec = lambda n, p=None: None if n in {hidden} else find(n, p)\n"
        "from twotower_client.cli import main; main()"
    )
    ran = demo("--folder", str(tmp_path / "demo"), command=[sys.executable, "-c", code])
    assert ran.returncode == 2
    assert ran.stderr == (
        "error: the demo needs packages that are not installed: ml_dtypes, onnx, onnx_ir, "
        "onnxruntime, tokenizers, pytriton; install them with: pip install "
        "'twotower[export,serve]'\n"
    )
    assert not (tmp_path / "demo").exists()
