"""The steps of the ensemble without a server: what each does, and what travels between."""

from __future__ import annotations

import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from twotower_contract.engine_set import open_engine_set
from twotower_contract.errors import TwoTowerError
from twotower_engines.artifacts.tokenizer import PREVIOUS_IDS, Tokenizer, added_text
from twotower_engines.errors import RequestError
from twotower_engines.generation.request import Request
from twotower_engines.serving.preprocessing import Preprocessor, content_of
from twotower_engines.serving.wire import Cancel, Job, Probe, decode, encode


@pytest.fixture(scope="module")
def tokenizer(packaged) -> Tokenizer:
    return Tokenizer(packaged.engines)


@pytest.fixture(scope="module")
def preprocessor(packaged) -> Preprocessor:
    return Preprocessor(open_engine_set(packaged.engines))


def pieces(tokenizer, ids, cuts) -> list[str]:
    """Decode as the server does: block by block, with the ids before each."""
    borders = list(itertools.pairwise([0, *sorted(cuts), len(ids)]))
    return [
        added_text(tokenizer, ids[max(0, a - PREVIOUS_IDS) : a], ids[a:b], number == len(borders))
        for number, (a, b) in enumerate(borders, 1)
    ]


def test_characters_cut_by_a_border_arrive_whole(tokenizer) -> None:
    text = "Zoë naïvely paid 5 € for a 🦊 and a 👩‍🚀, 日本語!"
    ids = list(tokenizer.encode(text))
    assert len(ids) > len(text.split()), "some characters take several tokens"
    for cut in range(len(ids) + 1):
        got = pieces(tokenizer, ids, [cut])
        assert "".join(got) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(got)
    assert "".join(pieces(tokenizer, ids, range(1, len(ids)))) == tokenizer.decode(ids)


def test_any_bytes_at_any_borders_add_up(tokenizer) -> None:
    """A model may say anything: broken bytes, special tokens, in any order."""
    draw = random.Random(5)
    for _ in range(300):
        ids = [draw.randrange(0, 260) for _ in range(draw.randrange(1, 60))]
        cuts = draw.sample(range(len(ids) + 1), draw.randrange(0, min(6, len(ids) + 1)))
        assert "".join(pieces(tokenizer, ids, cuts)) == tokenizer.decode(ids), (ids, cuts)


def test_text_and_ids_become_the_same_job(preprocessor, tokenizer) -> None:
    ids = tokenizer.encode("Once upon")
    as_text = {"text_input": np.array([b"Once upon"], object)}
    as_ids = {"input_ids": np.array(ids, np.int32)}
    jobs = [preprocessor.message(given, "x") for given in (as_text, as_ids)]
    assert jobs[0] == jobs[1] == Job(Request("x", ids))


def test_every_option_reaches_the_job(preprocessor) -> None:
    given = {
        "input_ids": np.array([5], np.int32),
        "mode": np.array([b"ar"], object),
        "policy": np.array([b"quota"], object),
        "max_new_tokens": np.array([7], np.int32),
        "block_size": np.array([9], np.int32),
        "steps": np.array([3], np.int32),
        "top_k": np.array([11], np.int32),
        "seed": np.array([2**63 + 5], np.uint64),
        "threshold": np.array([0.9], np.float32),
        "temperature": np.array([0.1], np.float32),
        "top_p": np.array([0.3], np.float32),
        "eos_ids": np.array([2, 4], np.int32),
        "timeout_seconds": np.array([1.5], np.float32),
        "queue_notice_seconds": np.array([2.5], np.float32),
    }
    assert preprocessor.message(given, "x") == Job(
        Request(
            "x", (5,), mode="ar", policy="quota", max_new_tokens=7, block_size=9, steps=3,
            top_k=11, seed=2**63 + 5, threshold=0.9, temperature=0.1, top_p=0.3, eos_ids=(2, 4),
        ),
        1.5,
        2.5,
    )  # fmt: skip


def test_engines_without_a_tokenizer_take_ids(packaged, tmp_path) -> None:
    import shutil

    bare = tmp_path / "cpu"
    shutil.copytree(packaged.engines, bare)
    (bare / "tokenizer.json").unlink()
    preprocessor = Preprocessor(open_engine_set(bare))
    assert preprocessor.message({"input_ids": np.array([5], np.int32)}, "x")
    with pytest.raises(RequestError, match="no tokenizer; give input_ids"):
        preprocessor.message({"text_input": np.array([b"a"], object)}, "x")


def test_messages_survive_the_way() -> None:
    job = Job(Request("é", (1, 2), eos_ids=(3,), temperature=0.5), 2.0, 5.0)
    assert decode(encode(job)) == job
    assert decode(encode(Cancel("é"))) == Cancel("é")
    assert decode(encode(Probe())) == Probe()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "not valid JSON"),
        (b"[]", "should be a JSON object"),
        (b"[" * 200_000, "not valid JSON"),
        (b"{}", "there is no 'prompt_ids'"),
        (
            b'{"request_id": "a", "prompt_ids": [1], "colour": 1}',
            "no option 'colour'; the options are request_id",
        ),
        (b'{"request_id": "a", "prompt_ids": "abc"}', "prompt_ids is 'abc'; it must be a list"),
        (b'{"request_id": "a", "prompt_ids": [true]}', "True at place 0 is no token id"),
        (
            b'{"request_id": "a", "prompt_ids": [1], "steps": 1.5}',
            "steps is 1.5; it must be a whole number",
        ),
        (b'{"request_id": "a", "prompt_ids": [1], "mode": 3}', "mode is 3; it must be one of"),
        (b'{"request_id": "a", "prompt_ids": [1], "steps": null}', "steps is None"),
        (b'{"request_id": 1, "prompt_ids": [1]}', "request_id is 1; it must be text"),
        (b'{"request_id": "a", "prompt_ids": [1], "timeout_seconds": "x"}', "timeout_seconds"),
    ],
)
def test_generate_refuses_what_is_no_message(content, said) -> None:
    with pytest.raises(TwoTowerError, match="request") as refusal:
        decode(content)
    assert said in str(refusal.value)


def test_a_number_for_a_float_may_be_whole() -> None:
    content = json.dumps({"request_id": "a", "prompt_ids": [1], "threshold": 1}).encode()
    assert decode(content) == Job(Request("a", (1,), threshold=1.0))


def test_a_prompt_that_holds_the_mask_is_told_to_the_log(preprocessor, capfd) -> None:
    """Its own text becomes the token: it stays in the context, and nothing is filled in there."""
    for text, is_told in (("Mia the <mask> fox", True), ("Mia the fox", False)):
        preprocessor.message({"text_input": np.array([text.encode()], object)}, "r\x1b[2J")
        said = capfd.readouterr().err
        assert (r"the prompt of request r\x1b[2J holds the mask token (id 3)" in said) == is_told


def test_long_text_is_refused_by_its_beginning(preprocessor, monkeypatch) -> None:
    """The tokenizer sees no more of it than could fit; text that fits is taken whole."""
    seen: list[int] = []
    encoding = Tokenizer._encoding
    monkeypatch.setattr(
        Tokenizer, "_encoding", lambda self, text: (seen.append(len(text)), encoding(self, text))[1]
    )
    long = np.array([b"one two " * 100_000], object)
    with pytest.raises(RequestError, match=r"more than \d+ tokens; these engines hold 4096"):
        preprocessor.message({"text_input": long}, "x")
    assert seen == [4096 * 16]


def test_the_beginning_never_counts_more_than_the_whole(tokenizer) -> None:
    text = "Zoë naïvely paid 5 € for a 🦊 and a 👩‍🚀,   日本語! " * 3
    for end in range(1, len(text)):
        assert tokenizer.least_count(text[:end]) <= len(tokenizer.encode(text))
    assert tokenizer.least_count("") == 0


def test_a_callers_name_of_any_length_costs_nobody_time() -> None:
    """It is for the log alone, which has a line for each request."""
    asked = SimpleNamespace(
        inputs=list, request_id=lambda: "a" * 10**7, parameters=lambda: '{"x": 1}'
    )
    tensors, name, parameters = content_of(asked)
    assert (tensors, name, parameters) == ({}, "a" * 256, ["x"])
