"""The block on a terminal as it resolves: masked positions, and colours by confidence.

A block is drawn at the end of the text, and drawn over at each denoiser call, until it is
committed and becomes text. Where there is no terminal, only committed text is written.
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Sequence
from typing import TextIO

MASKS = ("░", "_")  # the second where the terminal lacks the first
SURE, LIKELY = 0.95, 0.75
SURE_COLOUR, LIKELY_COLOUR, UNSURE_COLOUR, MASK_COLOUR = "32", "36", "33", "2"


class LiveView:
    """Text that grows on a stream, and the block behind it while it is denoised.

    Args:
        out: Stream to write to, standard output as a rule.
        is_live: Whether to draw blocks that are not committed, where `out` is a terminal.
    """

    def __init__(self, out: TextIO, is_live: bool = True) -> None:
        self._out = out
        self._is_drawn = is_live and out.isatty() and os.environ.get("TERM") != "dumb"
        self._has_colour = not os.environ.get("NO_COLOR")
        self._row = ""  # text in the last row: the block stands behind it
        self._rows_up = 0  # rows between the start of that row and the cursor
        encoding = out.encoding or "ascii"
        self._mask = next(mask for mask in MASKS if mask.encode(encoding, "ignore"))

    def canvas(self, tokens: Sequence[tuple[str, float | None] | None]) -> None:
        """Draw the block as it is now.

        Args:
            tokens: Text and confidence of each position; None where it is masked.
        """
        if not self._is_drawn:
            return
        size = shutil.get_terminal_size()
        self._erase()
        pieces = [(self._row, "")]
        for token in tokens:
            if token is None:
                pieces.append((self._mask, MASK_COLOUR))
            else:
                pieces.append((_plain(token[0]), _colour(token[1])))
        # A block that is higher than the terminal is shown from its beginning on.
        while _wrapped(pieces, size.columns)[0] >= size.lines and len(pieces) > 1:
            pieces.pop()
        self._out.write("".join(self._painted(*piece) for piece in pieces))
        self._out.flush()
        self._rows_up = _wrapped(pieces, size.columns)[0] - 1

    def commit(self, text: str) -> None:
        """Write the text that a finished block adds, in the place of its drawing."""
        if not self._is_drawn:
            self._out.write(text)
            self._out.flush()
            return
        self._erase()
        text = self._row + _plain(text)
        self._out.write(text)
        self._out.flush()
        self._row = text[_wrapped([(text, "")], shutil.get_terminal_size().columns)[1] :]

    def finish(self) -> None:
        """Remove a drawing that nothing follows, and end the line."""
        if self._is_drawn:
            self._erase()
            self._out.write(self._row)
        self._out.write("\n")
        self._out.flush()

    def _erase(self) -> None:
        """Go to the start of the row and clear all behind it."""
        up = f"\x1b[{self._rows_up}A" if self._rows_up else ""
        self._out.write(f"{up}\r\x1b[J")
        self._rows_up = 0

    def _painted(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colour and self._has_colour else text


def _colour(confidence: float | None) -> str:
    if confidence is None:
        return ""
    if confidence >= SURE:
        return SURE_COLOUR
    return LIKELY_COLOUR if confidence >= LIKELY else UNSURE_COLOUR


def _plain(text: str) -> str:
    """Return a text without what a terminal would obey, but for line breaks."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(
        letter if letter == "\n" or unicodedata.category(letter) != "Cc" else "\ufffd"
        for letter in text
    )


def _wrapped(pieces: Sequence[tuple[str, str]], columns: int) -> tuple[int, int]:
    """Return the rows of a terminal that a text takes, and the index at which the last begins.

    Args:
        pieces: The text in pieces with their colours; it begins at the left.
        columns: Width of the terminal in cells.
    """
    rows, start, column = 1, 0, 0
    for place, letter in enumerate("".join(text for text, _ in pieces)):
        width = _width(letter)
        if letter == "\n" or column + width > columns:
            rows, start, column = rows + 1, place + (letter == "\n"), 0
        column += 0 if letter == "\n" else width
    return rows, start


def _width(letter: str) -> int:
    """Return how many cells a terminal gives a character."""
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
