"""JSON on disk: one strict reader with typed access, and one writer.

Python's parser lets the last of two equal keys win, in silence; here such a file is refused.
`Infinity` and `NaN` are numbers, as in NVIDIA's `config.json`. A field is asked for by name and
kind; where it is missing or of another kind, the message names the file, the path to the field
inside it, what was found, and what to do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from twotower_contract.atomic import write_text
from twotower_contract.errors import ConfigError, TwoTowerError
from twotower_contract.files import read_file

T = TypeVar("T")


class Document:
    """A JSON object with typed access.

    Args:
        values: The parsed object.
        source: Name of the whole document in messages, as a rule its file.
        error: The error class to raise.
        remedy: End of every message: what to do.
        path: Path to this object inside the document.
    """

    def __init__(
        self,
        values: dict[str, Any],
        source: str,
        error: type[TwoTowerError] = ConfigError,
        remedy: str = "write it again",
        path: str = "",
    ) -> None:
        self.values = values
        self.source = source
        self.error = error
        self.remedy = remedy
        self.path = path

    def refusal(self, problem: str) -> TwoTowerError:
        """Return the error that says what is wrong with the document."""
        return self.error(f"{self.source}: {problem}; {self.remedy}")

    def name_of(self, key: str) -> str:
        """Return the path to a field from the top of the document, as `model: head_dim`."""
        return f"{self.path}: {key}" if self.path else key

    def _wrong(self, key: str, kind: str, found: Any) -> TwoTowerError:
        return self.refusal(
            f"the field `{self.name_of(key)}` should be {kind}, found {found!r:.80}"
        )

    def _get(self, key: str, type_: type[T], kind: str) -> T:
        if key not in self.values:
            raise self.refusal(f"the field `{self.name_of(key)}` is missing")
        value = self.values[key]
        if not _is(value, type_):
            raise self._wrong(key, kind, value)
        return value  # type: ignore[no-any-return]  # `_is` compared its type

    def _list(self, key: str, type_: type[T], kind: str) -> list[T]:
        values = self._get(key, list, kind)
        if not all(_is(value, type_) for value in values):
            raise self._wrong(key, kind, values)
        return values

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
        if _is(self.values.get(key), int) and abs(self.values[key]) <= sys.float_info.max:
            return float(self.values[key])
        return self._get(key, float, "a number")

    def flag(self, key: str) -> bool:
        """Return true or false."""
        return self._get(key, bool, "true or false")

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of integers."""
        return tuple(self._list(key, int, "a list of integers"))

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        return tuple(self._list(key, str, "a list of strings"))

    def text_map(self, key: str) -> dict[str, str]:
        """Return an object whose values are all strings."""
        section = self.section(key)
        return {name: section.text(name) for name in section.values}

    def section(self, key: str) -> Document:
        """Return an object inside this one."""
        return self._inner(self._get(key, dict, "an object"), self.name_of(key))

    def values_of(self, key: str) -> dict[str, Any]:
        """Return an object inside this one as it is."""
        return self.section(key).values

    def optional_values(self, key: str) -> dict[str, Any] | None:
        """Return an object inside this one as it is, or None where it is null or absent."""
        return None if self.values.get(key) is None else self.values_of(key)

    def record(self, type_: Callable[..., T], **others: Any) -> T:
        """Return this object as a dataclass: each field is read by its annotation.

        Args:
            type_: The dataclass, of a module whose annotations are strings.
            others: Fields that were read before, by name.
        """
        for field in fields(type_):  # type: ignore[arg-type]  # a dataclass
            if field.name not in others:
                others[field.name] = self.typed(field.name, str(field.type))
        return type_(**others)

    def typed(self, key: str, annotation: str) -> Any:
        """Return a field as the annotation of a dataclass's field says."""
        return _READERS[annotation](self, key)

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
                raise self._wrong(f"{key}[{index}]", "an object", value)
        return [self._inner(v, self.name_of(f"{key}[{i}]")) for i, v in enumerate(values)]

    def check_format(self, name: str, version: int) -> None:
        """Refuse another format or an unknown version of this one.

        Raises:
            TwoTowerError: The class given at construction, naming what was found.
        """
        found = f"{self.values.get('format')!r:.80} version {self.values.get('format_version')!r}"
        if found != f"{name!r} version {version}":
            raise self.refusal(f"is {found}, not {name!r} version {version}")

    def _inner(self, values: dict[str, Any], path: str) -> Document:
        return Document(values, self.source, self.error, self.remedy, path)


_READERS: Mapping[str, Callable[[Document, str], Any]] = {
    "str": Document.text,
    "str | None": Document.optional_text,
    "int": Document.integer,
    "float": Document.number,
    "bool": Document.flag,
    "tuple[int, ...]": Document.integers,
    "tuple[str, ...]": Document.texts,
    "dict[str, str]": Document.text_map,
    "dict[str, Any]": Document.values_of,
    "dict[str, Any] | None": Document.optional_values,
    "Path": lambda document, key: Path(document.text(key)),
}
"""Annotation of a dataclass's field -> what reads it."""


def read_json(
    path: Path, error: type[TwoTowerError] = ConfigError, remedy: str = "copy or download it again"
) -> Document:
    """Read a JSON object; `Document` says what the arguments are.

    Raises:
        TwoTowerError: The file cannot be read, is not JSON, has a key twice, or holds no object.
    """
    content = read_file(path, error, remedy)
    return Document(parse_object(content, f"{path}:", error, remedy), str(path), error, remedy)


def parse_object(
    content: bytes,
    source: str,
    error: type[TwoTowerError] = ConfigError,
    remedy: str = "copy or download it again",
) -> dict[str, Any]:
    """Parse a JSON object.

    transformers 5 writes infinities as `{"__float__": "Infinity"}`: read as the number, too.

    Args:
        content: UTF-8.
        source: Beginning of every message, as `FILE:` or `FILE: its header`.

    Raises:
        TwoTowerError: It is not JSON, has a key twice, or is no object.
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
        raise error(f"{source} nests too deeply to be what it should be; {remedy}") from None
    except ValueError as problem:
        raise error(f"{source} is not JSON: {problem}; {remedy}") from problem
    if twice:
        raise error(
            f"{source} has the key {twice[0]!r} twice in one object, so which of them counts is "
            f"not defined; remove one, or {remedy}"
        )
    if not isinstance(values, dict):
        raise error(f"{source} holds a {type(values).__name__}, not an object; {remedy}")
    return values


def format_of(path: Path) -> Any:
    """Return the field `format` of a JSON file; None where there is none, or no such file."""
    try:
        return read_json(path).values.get("format")
    except ConfigError:
        return None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object beside its place and rename it, so that no reader sees half of it."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _is(value: Any, type_: type) -> bool:
    """Whether a value is of a type; a bool, which is an int in Python, is no number in JSON."""
    return isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))


def _special_number(value: Any) -> float:
    """Return the number of `{"__float__": value}`; ValueError if it is none."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"__float__ is {value!r:.80}, not a number")
    return float(value)
