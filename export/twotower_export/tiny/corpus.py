"""The small text that the trained tiny checkpoint speaks: stories and facts made from templates.

Everything here was written for this project, so it may be shipped with it. The text is highly
predictable but not trivial: what follows a prompt depends on names, colours and places that the
prompt chose, so a model must carry them along to continue sensibly.

*Stories*: somebody loses a thing, a friend who lives nearby finds it. The opening chooses a name,
an animal, a place, a colour and a thing. All that follows is a function of these, except for one
word: which of two culprits took the thing.

*Facts*: somebody asks what everybody knows, and is answered by name. Each fact and each name occur
in the training part; held out are facts that a name never asked for.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["train", "held_out"]

NAMES = (
    "Mia", "Tom", "Anna", "Ben", "Clara", "Otto", "Lena", "Paul", "Rosa", "Hugo", "Ida", "Max",
    "Nora", "Felix", "Emma", "Leo", "Vera", "Oscar", "Lucy", "Bruno", "Alma", "Theo", "Greta",
    "Kurt",
)  # fmt: skip
FOODS = {
    "rabbit": "carrots", "mouse": "cheese", "bear": "honey", "squirrel": "nuts", "cat": "milk",
    "dog": "sausages", "hen": "corn", "pig": "apples", "goat": "clover", "fox": "berries",
    "duck": "bread", "horse": "oats",
}  # fmt: skip
"""Food that each animal shares at the end of a story."""

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "golden", "silver")


@dataclass(frozen=True)
class Place:
    """A place where a story happens, and the friend who lives nearby."""

    home: str
    walk: str
    hidden: str
    friend: str


PLACES = (
    Place("by the river", "along the river", "under the old bridge", "otter"),
    Place("in the forest", "through the forest", "behind a tall tree", "owl"),
    Place("on a farm", "across the yard", "next to the barn", "donkey"),
    Place("near the sea", "over the beach", "between two big rocks", "crab"),
    Place("on a hill", "down the hill", "at the edge of the meadow", "sheep"),
    Place("in the village", "to the market", "on the steps of the mill", "stork"),
    Place("at the lake", "around the lake", "among the reeds", "frog"),
    Place("in the mountains", "up the mountain", "in front of a deep cave", "eagle"),
)

LOSSES = {
    "kite": (("wind", "storm"), "carried the kite away"),
    "ball": (("wave", "tide"), "took the ball out to sea"),
    "hat": (("wind", "storm"), "blew the hat off"),
    "boat": (("river", "tide"), "carried the boat along"),
    "bell": (("thief", "magpie"), "stole the bell at night"),
    "lamp": (("rain", "fog"), "put out the lamp"),
    "drum": (("wagon", "cart"), "threw the drum into a ditch"),
    "scarf": (("thorn", "branch"), "caught the scarf and kept it"),
    "basket": (("river", "rain"), "washed the basket away"),
    "key": (("magpie", "raven"), "picked up the key and flew off"),
}
"""The two culprits that may take each thing, and how; nothing in a prompt tells which it was."""

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


def story(name: str, animal: str, place: Place, colour: str, thing: str) -> Document:
    """Write the story of one choice of slots."""
    own = f"{colour} {thing}"
    culprits, deed = LOSSES[thing]
    prompt = (
        f"{name} the {animal} lived {place.home}."
        f" {name} had a {own} and loved it more than anything."
    )
    answers = tuple(
        f" Every morning the {animal} took the {own} and went {place.walk}."
        f" One day the {culprit} {deed}, and {name} could not find it."
        f' "Why are you so sad?" asked the {place.friend}.'
        f' "I have lost my {own}," said the {animal}.'
        f" So the {place.friend} went {place.walk} and found the {own} {place.hidden}."
        f' "Thank you!" said the {animal}, and shared some {FOODS[animal]} with the {place.friend}.'
        f" From that day on {name} and the {place.friend} were the best of friends."
        for culprit in culprits
    )
    return Document(prompt, answers)


def story_documents(part: Part, seed: int) -> Iterator[Document]:
    """Draw stories of one part without end."""
    draw = random.Random(f"stories {part} {seed}")
    while True:
        name, animal = draw.choice(NAMES), draw.choice(tuple(FOODS))
        place, colour = draw.choice(PLACES), draw.choice(COLOURS)
        thing = draw.choice(tuple(LOSSES))
        if part_of(name, animal, place.home, colour, thing) == part:
            yield story(name, animal, place, colour, thing)


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


def documents(part: Part, seed: int) -> Iterator[Document]:
    """Draw documents of one part without end: about three stories to two facts."""
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
