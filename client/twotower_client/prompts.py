"""Prompts from files: one a line, as text or as JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower_client.errors import RequestRefusedError

PROMPT_NAMES = ("prompt", "prompt_ids")
# Each is a byte's token in the usual vocabularies, whose special tokens come before.
RANDOM_IDS = (32, 224)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a file.

    Attributes:
        text: Text to continue; None where ids are given.
        ids: Token ids to continue; None where text is given.
        options: Options of the request that its line gives.
        rest: What else its line holds, which belongs to the caller.
        line: Number of its line, from 1.
    """

    text: str | None
    ids: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    line: int = 0


def read_prompts(path: Path, option_names: Sequence[str] = ()) -> list[Prompt]:
    """Read a file of prompts: JSON objects where its name ends in `.jsonl`, else lines of text.

    Args:
        path: The file.
        option_names: Names in an object that are options of its request.

    Raises:
        RequestRefusedError: A line is wrong; the message names it.
        OSError: The file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as problem:
        raise RequestRefusedError(f"{path}: is not UTF-8 at byte {problem.start}") from None
    is_json = path.suffix == ".jsonl"
    prompts = [
        _of_json(line, f"{path}, line {number}", number, option_names)
        if is_json
        else Prompt(line, line=number)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise RequestRefusedError(f"{path}: holds no prompt; give one a line")
    return prompts


def _of_json(line: str, where: str, number: int, option_names: Sequence[str]) -> Prompt:
    try:
        values = json.loads(line)
    except ValueError as problem:
        raise RequestRefusedError(f"{where}: is no JSON ({problem})") from None
    if not isinstance(values, dict):
        raise RequestRefusedError(f'{where}: give a JSON object, as {{"prompt": "Once"}}')
    text, ids = (values.pop(name, None) for name in PROMPT_NAMES)
    if (text is None) == (ids is None):
        raise RequestRefusedError(f"{where}: give one of {' and '.join(PROMPT_NAMES)}")
    if text is not None and not isinstance(text, str):
        raise RequestRefusedError(f"{where}: prompt is {text!r:.80}; it must be text")
    if ids is not None and not isinstance(ids, list):
        raise RequestRefusedError(f"{where}: prompt_ids is {ids!r:.80}; it must be a list")
    options = {name: values.pop(name) for name in option_names if name in values}
    return Prompt(text, None if ids is None else tuple(ids), options, values, number)


def random_prompts(tokens: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Yield prompts of so many random token ids, without end; no two begin alike."""
    draw = random.Random(seed)
    while True:
        yield tuple(draw.randrange(*RANDOM_IDS) for _ in range(tokens))
