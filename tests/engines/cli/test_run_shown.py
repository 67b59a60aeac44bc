"""`twotower run --live` and `--html`: the answer as it comes about."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import subprocess

import pytest

from tests.support import TWOTOWER
from tests.support.browser import address_of, chromium
from tests.support.command import twotower
from twotower_engines.artifacts.tokenizer import PREVIOUS_IDS, Tokenizer, added_text, token_texts
from twotower_engines.generation.generator import Generator
from twotower_engines.generation.request import Request

TOKENS = 40
PROMPT = "Mia the fox lived by the river."


@pytest.fixture(scope="module")
def made(random_engines):
    return random_engines()


@pytest.fixture(scope="module")
def plain(made) -> str:
    return run(made).stdout


def run(made, *arguments) -> subprocess.CompletedProcess[str]:
    words = ["run", made.folder, "--prompt", PROMPT, "--max-new-tokens", TOKENS]
    return twotower(*words, *arguments)


def data_of(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_a_page_replays_what_the_engines_did(made, tmp_path, mode) -> None:
    path = tmp_path / "replay.html"
    ran = run(made, "--html", path, "--mode", mode, "--steps", 3)
    assert ran.returncode == 0, ran.stderr
    data = data_of(path.read_text(encoding="utf-8"))
    assert data["prompt"] == PROMPT
    assert data["figures"] == ran.stderr.splitlines()[-1]
    text = "".join(token[0] for block in data["blocks"] for token in block)
    assert text + "\n" == ran.stdout

    tokenizer = Tokenizer(made.folder)
    steps = {"steps": 3} if mode == "mask_diffusion" else {}
    request = Request(
        "x", tokenizer.encode(PROMPT), mode=mode, max_new_tokens=TOKENS, logprobs=True, **steps
    )
    with Generator(made.engines, threads=1) as generator:
        events = list(generator.stream(request))
    for block, event in zip(data["blocks"], events, strict=True):
        calls = [one.step + 1 if mode == "mask_diffusion" else 0 for one in event.details]
        assert [token[1] for token in block] == calls
        sure = [math.exp(one.logprob) for one in event.details]
        assert [token[2] for token in block] == pytest.approx(sure, abs=1e-4)
        assert max(calls) <= 3

    with chromium() as browser:
        browser.open(address_of(path))
        browser.press("\ue010")
        shown = browser.run("return document.querySelector('.board').textContent")
        assert shown == PROMPT + text
        assert browser.problems() == []


def test_json_tells_of_tokens_where_asked(made) -> None:
    asked = ("--mode", "ar", "--logprobs", "--top-logprobs", 2, "--json")
    told = json.loads(run(made, *asked).stdout)
    assert "".join(told["token_texts"]) == told["text"]
    assert len(told["logprobs"]) == len(told["commit_steps"]) == TOKENS
    likeliest = told["top_logprobs"][::2]
    assert len(likeliest) == TOKENS
    assert told["logprobs"] == pytest.approx(likeliest), "a greedy answer takes the likeliest"
    assert told["top_ids"][::2] == told["output_ids"][-TOKENS:]
    assert "logprobs" not in json.loads(run(made, "--json").stdout)


def test_the_terminal_shows_the_block_and_keeps_the_text(made, plain) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    environment = {**os.environ, "COLUMNS": "40", "LINES": "24", "TERM": "xterm"}
    command = [*TWOTOWER, "run", str(made.folder), "--prompt", PROMPT, "--live"]
    command += ["--max-new-tokens", str(TOKENS)]
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, env=environment
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except BlockingIOError:
                if process.poll() is not None:
                    break
                continue
            except OSError:  # the other end is closed, and all is read
                break
            written += part
        assert process.wait() == 0, process.stderr.read()
    os.close(ours)
    assert "░".encode() in written
    assert b"\x1b[3" in written
    assert written.count(b"\x1b[J") > TOKENS // 16
    rows = re.sub(rb"\x1b\[[^A-Za-z]*[A-Za-z]", b"", written).replace(b"\r", b"")
    assert plain.strip()[-5:].encode() in rows, "the end stays"


def test_without_a_terminal_live_is_the_plain_answer(made, plain) -> None:
    assert run(made, "--live").stdout == plain
    refused = run(made, "--live", "--json")
    assert refused.returncode == 2
    assert "--live and --json are both given" in refused.stderr


def test_ids_alone_are_shown_as_ids(made, tmp_path) -> None:
    path = tmp_path / "replay.html"
    ran = twotower("run", made.folder, "--prompt-ids", "5,6,7", "--html", path)
    assert ran.returncode == 0, ran.stderr
    assert data_of(path.read_text(encoding="utf-8"))["prompt"] == "5 6 7"


def test_the_texts_of_tokens_add_up_whatever_the_bytes(made) -> None:
    tokenizer = Tokenizer(made.folder)
    ids = list(tokenizer.encode("Zoë naïvely paid 5 € for a 🦊 and a 👩‍🚀, 日本語!"))
    for cut in range(len(ids) + 1):
        before, after = ids[:cut][-PREVIOUS_IDS:], ids[cut:]
        for is_last in (False, True):
            texts = token_texts(tokenizer, before, after, is_last)
            assert len(texts) == len(after)
            assert "".join(texts) == added_text(tokenizer, before, after, is_last)
