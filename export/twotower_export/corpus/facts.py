"""Facts: two questions at a time, answered in the order in which they were asked.

Each single fact occurs in the training part; held out are pairs that were never asked together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from twotower_export.corpus.documents import Document, Part, part_of

SOUNDS = {
    "a cow": "moo", "a cat": "meow", "a dog": "woof", "a duck": "quack", "a bee": "buzz",
    "an owl": "hoo",
}  # fmt: skip
TINTS = {
    "a lemon": "yellow", "the grass": "green", "the sky": "blue", "snow": "white",
    "a tomato": "red", "coal": "black",
}  # fmt: skip
HOMES = {
    "a fish": "in the water", "a bird": "in a nest", "a bear": "in a cave", "a fox": "in a den",
    "a spider": "in a web", "a king": "in a castle",
}  # fmt: skip


def fact_pairs() -> tuple[tuple[str, str], ...]:
    """Lists every single fact as (question, statement)."""
    return (
        *((f"what does {who} say", f"{who} says {sound}") for who, sound in SOUNDS.items()),
        *((f"what colour is {what}", f"{what} is {tint}") for what, tint in TINTS.items()),
        *((f"where does {who} live", f"{who} lives {home}") for who, home in HOMES.items()),
    )


def fact_documents(part: Part, seed: int) -> Iterator[Document]:
    """Draws pairs of facts of one part without end."""
    draw = random.Random(f"facts {part} {seed}")
    pairs = fact_pairs()
    while True:
        (asked, told), (asked_next, told_next) = draw.sample(pairs, 2)
        if part_of(asked, asked_next) == part:
            yield Document(
                f"Please tell me, {asked}, and {asked_next}?",
                (f" Of course! As everybody knows, {told}, and {told_next}. Ask me again!",),
            )
