"""Text to ids and back, in pieces cut anywhere."""

from __future__ import annotations

import random

import pytest

from twotower_engines.artifacts.tokenizer import PREVIOUS_IDS, TextStream, Tokenizer, added_text
from twotower_engines.errors import TokenizerError

TEXTS = [
    "Nora had a small boat.",
    "żółw, 漢字 and 🙂🙃 side by side",
    "🇵🇱 e\u0301 \u200d zero width",
    "ends in a replacement \ufffd",
    "\ufffd\ufffd starts with two",
    "  spaces   and\n\nlines\t",
]


@pytest.fixture(scope="module")
def tokenizer(random_engines):
    return Tokenizer(
        random_engines("M*E", seed=5, dtype="bfloat16", float32_suffixes=("A_log",)).folder
    )


def pieces(tokenizer, ids, cuts):
    stream = TextStream(tokenizer)
    parts = [stream.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    return [*parts, stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_one_by_one_give_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids, range(1, len(ids)))
    assert "".join(parts) == text
    assert len([part for part in parts if part]) > 5  # it came bit by bit


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("a🙂b")
    held = TextStream(tokenizer)
    place = next(n for n in range(len(ids)) if tokenizer.decode(ids[: n + 1]).endswith("\ufffd"))
    assert held.push(ids[: place + 1]) == tokenizer.decode(ids[:place])
    assert held.push(ids[place + 1 :]).startswith("🙂")


@pytest.mark.parametrize("seed", range(40))
def test_any_ids_in_any_pieces_give_the_text_of_all(tokenizer, seed):
    """Random ids are mostly bytes that make no character, with special tokens between them."""
    draw = random.Random(seed)
    ids = [draw.randrange(300) for _ in range(draw.randint(0, 60))]
    if seed % 2:  # some real text in it
        ids[7:7] = tokenizer.encode(draw.choice(TEXTS))
    cuts = sorted(draw.choices(range(len(ids) + 1), k=draw.randint(0, 12)))
    parts = pieces(tokenizer, ids, cuts)
    assert "".join(parts) == tokenizer.decode(ids)
    # a server, which decodes each piece on its own, says the same piece by piece
    borders = zip([0, *cuts], [*cuts, len(ids)], strict=True)
    alone = [
        added_text(tokenizer, ids[max(0, a - PREVIOUS_IDS) : a], ids[a:b], False)
        for a, b in borders
    ]
    assert alone == parts[:-1]


def test_the_window_stays_short(tokenizer):
    """Decoding a long answer costs as much per block at its end as at its start."""
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("Nora had a small boat. ")
    for _ in range(50):
        stream.push(ids)
    assert len(stream._previous) <= PREVIOUS_IDS < 50 * len(ids)


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="not valid UTF-8 at character 1"):
        tokenizer.encode("a\udcff")


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    assert not Tokenizer.exists(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: is missing.*--prompt-ids"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path)
