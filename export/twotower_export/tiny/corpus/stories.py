"""Stories: somebody loses a thing, a friend who lives nearby finds it.

The opening chooses a name, an animal, a place, a colour and a thing. All that follows is a function
of these, except for one word: which of two culprits took the thing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from twotower_export.tiny.corpus.documents import Document, Part, part_of
from twotower_export.tiny.corpus.names import NAMES

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
