"""Facts: somebody asks what everybody knows, and is answered by name.

Each fact and each name occur in the training part; held out are facts that a name never asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from twotower_export.tiny.corpus.documents import Document, Part, part_of
from twotower_export.tiny.corpus.names import NAMES

SOUNDS = {
    "a cow": "moo", "a cat": "meow", "a dog": "woof", "a duck": "quack", "a bee": "buzz",
    "a wolf": "howl",
}  # fmt: skip
TINTS = {
    "a lemon": "yellow", "the grass": "green", "the sky": "blue", "snow": "white",
    "a tomato": "red", "coal": "black",
}  # fmt: skip
HOMES = {
    "a fish": "in the water", "a bird": "in a nest", "a bear": "in a cave", "a fox": "in a den",
    "a spider": "in a web", "a king": "in a castle",
}  # fmt: skip

FACTS = (
    *((f"what does {who} say", f"{who} says {sound}") for who, sound in SOUNDS.items()),
    *((f"what colour is {what}", f"{what} is {tint}") for what, tint in TINTS.items()),
    *((f"where does {who} live", f"{who} lives {home}") for who, home in HOMES.items()),
)
"""Every fact as (question, statement)."""


def fact_documents(part: Part, seed: int) -> Iterator[Document]:
    """Draw facts of one part, each asked for by somebody, without end."""
    draw = random.Random(f"facts {part} {seed}")
    while True:
        name, (asked, told) = draw.choice(NAMES), draw.choice(FACTS)
        if part_of(name, asked) == part:
            yield Document(
                f'{name} said to me: "Please tell me, {asked}?"',
                (f' "As everybody knows, {told}," I said to {name}. "Ask me again!"',),
            )
