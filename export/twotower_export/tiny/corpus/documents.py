"""Documents of the corpus, split into a training part and a held-out part by their slots."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["train", "held_out"]


@dataclass(frozen=True)
class Document:
    """A prompt and every text by which the corpus continues it.

    Attributes:
        prompt: The opening; it fixes all slots (names, colours, places).
        answers: The possible continuations, each with its leading space and without the
            end-of-text token. A story has two of equal probability, a fact one.
    """

    prompt: str
    answers: tuple[str, ...]


def part_of(*slots: str) -> Part:
    """Say to which part the combination of slots belongs: one in ten is held out.

    A checksum decides, not a random draw, so that no held-out combination can ever be trained on,
    whatever the seed.
    """
    return "held_out" if zlib.crc32("|".join(slots).encode()) % 10 == 0 else "train"


def documents(part: Part, seed: int) -> Iterator[Document]:
    """Draw documents of one part without end: about three stories to two facts."""
    from twotower_export.tiny.corpus.facts import fact_documents
    from twotower_export.tiny.corpus.stories import story_documents

    order = random.Random(f"{part} {seed}")
    stories = story_documents(part, seed)
    facts = fact_documents(part, seed)
    while True:
        yield next(facts if order.random() < 0.4 else stories)


def words(text: str) -> list[str]:
    """Split a text into its words, without punctuation."""
    return re.findall(r"[A-Za-z]+", text)


def vocabulary(samples: int = 3000) -> frozenset[str]:
    """Collect the words of the training part."""
    found: set[str] = set()
    drawn = documents("train", seed=0)
    for _ in range(samples):
        document = next(drawn)
        for answer in document.answers:
            found.update(words(document.prompt + answer))
    return frozenset(found)
