"""Where answers end: the same token, whatever pieces they come in."""

from __future__ import annotations

import random

import pytest

from twotower_engines.generation.ending import Ending, StopMatcher
from twotower_engines.generation.request import Request


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; a character may need four."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def pieces(draw, whole):
    while whole:
        size = draw.randint(1, 5)
        yield whole[:size]
        whole = whole[size:]


def first_match(text, stops):
    """Where the text ends before the stop string that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return end - len(max(matches, key=len))
    return None


def test_a_stop_string_is_found_in_any_pieces():
    draw, found = random.Random(1), 0
    for _ in range(1500):
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(3)]
        text = "".join(draw.choices("abc", k=draw.randint(0, 20)))
        matcher = StopMatcher(stops)
        given = "".join(matcher.push(piece) for piece in pieces(draw, text)) + matcher.finish()
        expected = first_match(text, stops)
        assert matcher.matched is (expected is not None)
        assert given == text[:expected], (text, stops)
        found += matcher.matched
    assert 250 < found < 1450


def test_nothing_goes_out_that_may_become_a_match():
    matcher = StopMatcher(["</answer>"])
    assert matcher.push("yes </ans") == "yes "
    assert matcher.push("wer") == ""
    assert matcher.push(" no") == "</answer no"
    assert matcher.push("x</answer> more") == "x"
    assert matcher.matched


def drawn(draw):
    ids = "".join(draw.choices("aabbéé😀", k=draw.randint(1, 12))).encode()
    most = draw.choice([len(ids), len(ids), draw.randint(1, len(ids))])
    request = Request(
        "r",
        (5,),
        max_new_tokens=most,
        min_new_tokens=draw.choice([0, 0, draw.randint(0, most)]),
        eos_ids=draw.choice([(), (ord("a"),)]),
        ignore_eos=draw.choice([True, False]),
        max_repetition_run=draw.choice([0, 1]),
        stop=draw.choice([(), ("ab",), ("aé", "b"), ("😀a", "é😀")]),
        canvas=draw.choice([(), (), (-1,) * draw.randrange(most) + (98,)]),
    )
    return request, list(ids)


def ended(request, parts):
    ending, ids, text = Ending(request, (ord("b"),), Bytes()), [], ""
    for part in parts:
        piece = ending.take(part)
        ids += part[: piece.count]
        text += piece.text or ""
        if piece.reason is not None:
            return ids, text, piece.reason
    return ids, text + ending.rest(), None


def test_an_answer_ends_at_one_token_in_any_pieces():
    draw, reasons = random.Random(2), dict.fromkeys(["eos", "stop", "length", "repetition"], 0)
    for _ in range(2000):
        request, ids = drawn(draw)
        whole = ended(request, [[token] for token in ids])
        assert ended(request, list(pieces(draw, ids))) == whole, request
        assert ended(request, [ids]) == whole, request
        kept, text, reason = whole
        reasons[reason] += 1
        if request.stop and reason != "stop":
            assert text == Bytes().decode(kept)
        if reason != "length":
            assert len(kept) >= request.min_new_tokens
            assert len(kept) >= len(request.canvas) or reason == "stop"
    assert min(reasons.values()) > 50, reasons


def test_a_stop_string_ends_with_the_token_that_completes_it():
    request = Request("r", (5,), max_new_tokens=9, stop=("lo w",))
    assert ended(request, [list(b"hello"), list(b" world")]) == (list(b"hello w"), "hel", "stop")


def test_a_stop_string_counts_from_the_least_tokens_on():
    request = Request("r", (5,), max_new_tokens=6, min_new_tokens=2, stop=("ab",), ignore_eos=True)
    assert ended(request, [list(b"abcabc")]) == (list(b"abcab"), "abc", "stop")


@pytest.mark.parametrize(("ignore", "kept"), [(False, b"ab"), (True, b"abc")])
def test_the_models_own_end_token(ignore, kept):
    request = Request("r", (5,), max_new_tokens=3, ignore_eos=ignore)
    assert bytes(ended(request, [list(b"abc")])[0]) == kept
