"""JSON as checkpoints have it: `Infinity` is a number, no key comes twice, nothing nests forever.

Python's parser lets the last of two equal keys win, in silence; here such a file is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower_export.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with `Infinity` and `NaN` as NVIDIA's file has them.

    Raises:
        ConfigError: the file is missing, is not JSON, has a key twice, or holds no object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_object(content, f"{path}:")


def parse_object(content: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    transformers 5 writes infinities as `{"__float__": "Infinity"}`: read as the number, too.

    Args:
        content: UTF-8.
        source: begins every message, as `FILE:` or `FILE: its header`.

    Raises:
        ConfigError: it is not JSON, has a key twice, or is no object.
    """
    twice: list[str] = []

    def made_of(pairs: list[tuple[str, Any]]) -> Any:
        if len(pairs) == 1 and pairs[0][0] == "__float__":
            return _special_number(pairs[0][1])
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice.append(next(name for name in made if names.count(name) > 1))
        return made

    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=made_of)
    except RecursionError:
        raise ConfigError(
            f"{source} nests too deeply to be what it should be; copy or download it again"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{source} is not JSON: {error}; copy or download it again") from error
    if twice:
        raise ConfigError(
            f"{source} has the key {twice[0]!r} twice in one object, so which of them counts is "
            "not defined; remove one, or download it again"
        )
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds a {type(values).__name__}, not an object")
    return values


def _special_number(value: Any) -> float:
    """The number of `{"__float__": value}`; ValueError if it is none."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"__float__ is {value!r:.80}, not a number")
    return float(value)
