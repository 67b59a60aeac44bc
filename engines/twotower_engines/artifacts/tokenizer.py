"""Text to ids and back, whole or as it comes.

A wrapper of the bundle's tokenizer. It adds text that is put together piece by piece, where
the border between two pieces may lie inside a character of several bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower_contract.tokenizer import TOKENIZER_FILE, open_tokenizer
from twotower_engines.errors import TokenizerError

INCOMPLETE = "\ufffd"  # what decoders put for bytes that are no character, or not yet
# Tokens before a piece that its decoder is given. A character has at most four bytes, so at most
# four tokens; the rest is for special tokens, which have no text, between them.
PREVIOUS_IDS = 32


class Tokenizer:
    """The tokenizer of an engine set.

    Args:
        folder: An engine set or a bundle: the folder that holds `tokenizer.json`.

    Raises:
        TokenizerError: There is none, it cannot be read, or the library is missing.
    """

    def __init__(self, folder: Path) -> None:
        if not self.exists(folder):
            raise TokenizerError(
                f"{folder / TOKENIZER_FILE}: is missing, the checkpoint had no tokenizer; give "
                "token ids instead of text (--prompt-ids 5,6,7)"
            )
        try:
            import tokenizers
        except ImportError as problem:
            raise TokenizerError(
                "tokenizers is not installed; install it with `pip install 'twotower[build]'`"
            ) from problem
        self._tokenizer: Any = open_tokenizer(tokenizers, folder, TokenizerError)

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
        return tuple(self._encoding(text).ids)

    def least_count(self, start: str) -> int:
        """Return how many ids every text has at least that begins so.

        The last word may go on differently, so it does not count.
        """
        words = self._encoding(start).word_ids
        return sum(word is not None and word != words[-1] for word in words)

    def _encoding(self, text: str) -> Any:
        # Unlike `encode`, it lets other threads run meanwhile.
        [encoding] = self._tokenizer.encode_batch([text])
        return encoding

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def added_text(
    tokenizer: Tokenizer, previous: Sequence[int], ids: Sequence[int], is_last: bool
) -> str:
    """Return the text that some ids add to an answer; the pieces together are the whole text.

    A character whose bytes have begun but not ended decodes to one replacement character at the
    very end. So one of those is held back there, and comes with the next piece, as itself or as
    part of what it became.

    Args:
        tokenizer: The model's tokenizer.
        previous: The end of the answer before: its last `PREVIOUS_IDS` tokens, or all.
        ids: The new ids.
        is_last: Whether no more ids come, so that nothing may be held back.
    """
    before = tokenizer.decode(previous).removesuffix(INCOMPLETE)
    text = tokenizer.decode([*previous, *ids])
    return (text if is_last else text.removesuffix(INCOMPLETE))[len(before) :]


def token_texts(
    tokenizer: Tokenizer, previous: Sequence[int], ids: Sequence[int], is_last: bool
) -> list[str]:
    """Return the text that each of some ids adds; together they are `added_text` of all.

    A character of several ids belongs to the last of them.
    """
    known = [*previous, *ids]
    ends = range(len(previous) + 1, len(known) + 1)
    return [
        added_text(
            tokenizer,
            known[max(0, end - 1 - PREVIOUS_IDS) : end - 1],
            known[end - 1 : end],
            is_last and end == len(known),
        )
        for end in ends
    ]


def canvas_texts(tokenizer: Tokenizer, ids: Sequence[int], mask_id: int) -> list[str | None]:
    """Return the text of each id of an unfinished block by itself; None where it is masked."""
    return [None if token == mask_id else tokenizer.decode([token]) for token in ids]


class TextStream:
    """The text of an answer as its ids arrive, where one process sees all of them.

    All pieces together are the text of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._previous: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids, and return the text that they complete."""
        piece = added_text(self._tokenizer, self._previous, ids, is_last=False)
        self._previous = [*self._previous, *ids][-PREVIOUS_IDS:]
        return piece

    def finish(self) -> str:
        """Return what was held back: its bytes will not become a character any more."""
        return added_text(self._tokenizer, self._previous, (), is_last=True)
