"""Text to ids and back, whole or as it comes.

A wrapper of the `tokenizers` library over the bundle's `tokenizer.json`. What it adds: errors that
help, and text that is put together piece by piece, where the border between two pieces may lie
inside a character of several bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import TokenizerError

__all__ = ["TextStream", "Tokenizer"]

TOKENIZER_FILE = "tokenizer.json"
INCOMPLETE = "\ufffd"  # what decoders put for bytes that are no character, or not yet


class Tokenizer:
    """The tokenizer of an engine set.

    Args:
        folder: An engine set or a bundle: the folder that holds `tokenizer.json`.

    Raises:
        TokenizerError: There is none, it cannot be read, or the library is missing.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise TokenizerError(
                f"{path}: is missing, the checkpoint had no tokenizer; give token ids instead "
                "of text (--prompt-ids 5,6,7)"
            )
        try:
            import tokenizers
        except ImportError as problem:
            raise TokenizerError(
                "tokenizers is not installed; install it with `pip install 'twotower[build]'`"
            ) from problem
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as problem:  # the library raises bare Exception
            raise TokenizerError(f"{path}: cannot be read as a tokenizer: {problem}") from problem

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder holds a tokenizer."""
        return (folder / TOKENIZER_FILE).is_file()

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text, with the special tokens that the tokenizer itself adds.

        Raises:
            TokenizerError: The text holds half of a surrogate pair, so it is no valid UTF-8.
        """
        try:
            text.encode("utf-8")  # the tokenizers library calls such a text "not a str"
        except UnicodeEncodeError as problem:
            raise TokenizerError(
                f"the text is not valid UTF-8 at character {problem.start}; give it as UTF-8"
            ) from problem
        return tuple(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class TextStream:
    """The text of an answer as its ids arrive.

    All pieces together are the text of all ids. Characters whose bytes are not complete are held
    back until they are, or until the end.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # from the last place where the text was complete before `_read`
        self._read = 0  # ids in front whose text was given in an earlier window
        self._given = 0  # characters given of the window's text

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids, and return the text that they complete."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        complete = text.rstrip(INCOMPLETE)
        piece = complete[self._given :]
        self._given = max(self._given, len(complete))
        if complete == text and len(self._ids) > self._read:
            self._forget()
        return piece

    def finish(self) -> str:
        """Return what was held back: its bytes will not become a character any more."""
        text = self._tokenizer.decode(self._ids)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _forget(self) -> None:
        """Drop the ids before the newest ones, whose text is kept as what joins the next.

        A decoder may treat the first token of a text in a way of its own (dropping a space, for
        instance), so the window always starts at tokens that were given before.
        """
        newest = self._ids[self._read :]
        text = self._tokenizer.decode(newest)
        if text:  # special tokens alone have no text to start a window with
            self._ids, self._read, self._given = newest, len(newest), len(text)
