"""Stories: somebody loses a thing, a friend who lives nearby finds it.

The opening chooses a name, an animal, a place, a colour and a thing. All that follows is a function
of these, except for one choice between two ways in which the thing is lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from twotower_export.corpus.documents import Document, Part, part_of

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
"""What each animal shares at the end."""

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "golden", "silver")


@dataclass(frozen=True)
class Place:
    """Where a story happens, and who lives nearby."""

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
    "kite": ("the wind carried the kite away", "the string of the kite broke"),
    "ball": ("the ball rolled out of sight", "a big wave took the ball"),
    "hat": ("a storm blew the hat away", "the hat fell from a cart"),
    "boat": ("the water carried the boat off", "a rope let the boat go"),
    "bell": ("the bell slipped from its ribbon", "a thief stole the bell"),
    "lamp": ("the lamp went out in the fog", "the lamp was left in the dark"),
    "drum": ("the drum rolled into a ditch", "the drum fell off a wagon"),
    "scarf": ("the scarf caught on a thorn", "a gust of wind took the scarf"),
    "basket": ("the basket floated away", "somebody took the wrong basket"),
    "key": ("the key dropped through a hole", "a magpie picked up the key"),
}
"""The two ways in which each thing is lost; nothing in a prompt tells which comes."""


def story(name: str, animal: str, place: Place, colour: str, thing: str) -> Document:
    """Writes the story of one choice of slots."""
    own = f"{colour} {thing}"
    prompt = (
        f"{name} the {animal} lived {place.home}."
        f" {name} had a {own} and loved it more than anything."
    )
    answers = tuple(
        f" Every morning {name} took the {own} and went {place.walk}."
        f" One day {loss}, and {name} could not find it."
        f' "Why are you so sad?" asked the {place.friend}.'
        f' "I have lost my {own}," said {name} the {animal}.'
        f" So the {place.friend} went {place.walk} and found the {own} {place.hidden}."
        f' "Thank you!" said {name}, and shared some {FOODS[animal]} with the {place.friend}.'
        f" From that day on {name} and the {place.friend} were the best of friends."
        for loss in LOSSES[thing]
    )
    return Document(prompt, answers)


def story_documents(part: Part, seed: int) -> Iterator[Document]:
    """Draws stories of one part without end."""
    draw = random.Random(f"stories {part} {seed}")
    while True:
        name, animal = draw.choice(NAMES), draw.choice(tuple(FOODS))
        place, colour = draw.choice(PLACES), draw.choice(COLOURS)
        thing = draw.choice(tuple(LOSSES))
        if part_of(name, animal, place.home, colour, thing) == part:
            yield story(name, animal, place, colour, thing)
