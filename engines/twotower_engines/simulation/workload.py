"""The requests of a simulation, and when they come."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twotower_contract.options import OPTIONS
from twotower_engines.errors import RequestError
from twotower_engines.generation.request import Request
from twotower_engines.simulation.engines import VOCABULARY

FIRST_ID = 16
SPREAD = 0.5
"""Lengths are drawn from so much below their mean to so much above."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and when it comes.

    Attributes:
        at: Seconds since the start; None where it comes as soon as another one ends.
    """

    request: Request
    at: float | None


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of requests that are drawn.

    Attributes:
        prompt: Tokens of a prompt, on average.
        shared: Tokens that all prompts begin with, beside those.
        new: Tokens of an answer, on average.
        threshold: Confidence threshold.
        seed: Seed of all draws.
    """

    prompt: int
    shared: int
    new: int
    threshold: float
    seed: int = 0

    def requests(self, count: int) -> Iterator[Request]:
        """Yield requests of this kind."""
        draw = random.Random(self.seed)
        stem = _ids(draw, self.shared)
        for number in range(count):
            yield Request(
                str(number),
                (*stem, *_ids(draw, _around(draw, self.prompt))),
                max_new_tokens=_around(draw, self.new),
                threshold=self.threshold,
                seed=draw.getrandbits(63),
            )


def at_rate(kind: Kind, count: int, rate: float) -> list[Arrival]:
    """Return requests that come at random, so many a second on average (Poisson)."""
    draw, now, arrivals = random.Random(f"{kind.seed} arrivals"), 0.0, []
    for request in kind.requests(count):
        now += draw.expovariate(rate)
        arrivals.append(Arrival(request, now))
    return arrivals


def at_concurrency(kind: Kind, count: int, callers: int) -> list[Arrival]:
    """Return requests of so many callers, each of whom sends the next when one is answered."""
    return [
        Arrival(request, 0.0 if number < callers else None)
        for number, request in enumerate(kind.requests(count))
    ]


def read_trace(path: Path, kind: Kind) -> list[Arrival]:
    """Read requests from a file of JSON lines; what a line leaves out is drawn.

    A line holds `at` (seconds), and may hold `prompt_tokens`, `shared_tokens` (that all prompts
    begin with) and any option of a request, as `max_new_tokens` or `priority`.

    Raises:
        RequestError: The file cannot be read, or a line is wrong.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise RequestError(f"{path}: cannot be read ({problem}); name a file of JSON lines") from (
            problem
        )
    given = [_values(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not given:
        raise RequestError(f"{path}: holds no request; write one JSON object a line")
    draw = random.Random(f"{kind.seed} trace")
    stem = _ids(draw, max(one.get("shared_tokens", kind.shared) for one in given))
    arrivals = []
    for values, drawn in zip(given, kind.requests(len(given)), strict=True):
        at = float(values.pop("at"))
        shared = values.pop("shared_tokens", kind.shared)
        own = values.pop("prompt_tokens", len(drawn.prompt_ids) - kind.shared)
        prompt = (*stem[:shared], *_ids(draw, own))
        arrivals.append(Arrival(replace(drawn, prompt_ids=prompt, **values), at))
    return sorted(arrivals, key=lambda one: one.at or 0.0)


def _values(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return the members of a line of a trace."""
    try:
        values = json.loads(line)
    except ValueError as problem:
        raise RequestError(f"{path}: line {number} is no JSON ({problem})") from problem
    lengths = ("at", "prompt_tokens", "shared_tokens")
    if not isinstance(values, dict) or "at" not in values:
        raise RequestError(
            f"{path}: line {number} has no `at`; write the seconds at which it comes"
        )
    unknown = sorted(set(values) - set(lengths) - set(OPTIONS))
    if unknown:
        known = ", ".join((*lengths, *OPTIONS))
        raise RequestError(f"{path}: line {number} has {unknown[0]!r}; known are {known}")
    for name in lengths:
        value = values.get(name, 0)
        is_number = isinstance(value, int | float if name == "at" else int)
        if isinstance(value, bool) or not is_number or not 0 <= value < 1e9:
            raise RequestError(f"{path}: line {number}: {name} is {value!r:.40}, no number from 0")
    return {key: tuple(one) if isinstance(one, list) else one for key, one in values.items()}


def _around(draw: random.Random, mean: int) -> int:
    return max(1, round(mean * draw.uniform(1 - SPREAD, 1 + SPREAD)))


def _ids(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(FIRST_ID, VOCABULARY), k=count))
