"""A JSON file read with types: every field is asked for by name and kind.

Knows nothing about what the fields mean. A missing field, or one of another kind, is reported with
the file, the path to the field inside it, and what was found.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from twotower_engines.errors import EnginesError

__all__ = ["Document", "read_json", "write_json"]

T = TypeVar("T")


class Document:
    """A JSON object with typed access.

    Args:
        values: The parsed object.
        where: What to call it in messages: the file, then the path inside it.
        error: The error class to raise.
    """

    def __init__(self, values: dict[str, Any], where: str, error: type[EnginesError]) -> None:
        self.values = values
        self.where = where
        self.error = error

    def _get(self, key: str, kind: type[T], name: str) -> T:
        if key not in self.values:
            raise self.error(f"{self.where}: the field `{key}` is missing; write it again")
        value = self.values[key]
        # bool is an int in Python, and would pass for a number here
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{self.where}: `{key}` should be {name}, found {value!r:.80}")
        return value

    def text(self, key: str) -> str:
        """Return a string."""
        return self._get(key, str, "a string")

    def optional_text(self, key: str) -> str | None:
        """Return a string, or None where it is null or absent."""
        return None if self.values.get(key) is None else self.text(key)

    def integer(self, key: str) -> int:
        """Return an integer."""
        return self._get(key, int, "an integer")

    def number(self, key: str) -> float:
        """Return a number as a float."""
        value = self.values.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return self._get(key, float, "a number")

    def boolean(self, key: str) -> bool:
        """Return a boolean."""
        return self._get(key, bool, "true or false")

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of integers."""
        values = self._get(key, list, "a list of integers")
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise self.error(
                f"{self.where}: `{key}` should be a list of integers, found {values!r:.80}"
            )
        return tuple(values)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        values = self._get(key, list, "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise self.error(
                f"{self.where}: `{key}` should be a list of strings, found {values!r:.80}"
            )
        return tuple(values)

    def section(self, key: str) -> Document:
        """Return an object inside this one."""
        return Document(self._get(key, dict, "an object"), f"{self.where}: {key}", self.error)

    def sections(self, key: str) -> dict[str, Document]:
        """Return the objects of an object whose values are all objects."""
        return self.section(key).children()

    def children(self) -> dict[str, Document]:
        """Return every value of this object, all of which are objects."""
        return {name: self.section(name) for name in self.values}

    def items(self, key: str) -> list[Document]:
        """Return a list whose items are all objects."""
        values = self._get(key, list, "a list of objects")
        for index, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.error(
                    f"{self.where}: `{key}`[{index}] should be an object, found {value!r:.80}"
                )
        return [
            Document(value, f"{self.where}: {key}[{index}]", self.error)
            for index, value in enumerate(values)
        ]

    def check_format(self, name: str, version: int) -> None:
        """Refuse another format or an unknown version of this one.

        Raises:
            EnginesError: The class given at construction, naming what was found.
        """
        if self.values.get("format") != name:
            found = self.values.get("format")
            raise self.error(f"{self.where}: its format should be `{name}`, found {found!r:.80}")
        found_version = self.integer("format_version")
        if found_version != version:
            raise self.error(
                f"{self.where}: format version {found_version}, but this twotower reads version "
                f"{version}; write it again with the installed version"
            )


def read_json(path: Path, error: type[EnginesError]) -> Document:
    """Read a JSON object.

    Args:
        path: The file.
        error: The error class to raise.

    Raises:
        EnginesError: The file cannot be read, is no JSON, or holds no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not valid JSON ({problem})") from problem
    if not isinstance(values, dict):
        raise error(f"{path}: should hold a JSON object, found {type(values).__name__}")
    return Document(values, str(path), error)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object beside its place and rename it, so that no reader sees half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
