"""The live view, read back from a small terminal."""

from __future__ import annotations

import io
import os
import random
import re

import pytest

from twotower_contract import live
from twotower_contract.live import MASKS, LiveView

STEP = re.compile(r"\x1b\[(\d*)([AJm])|\x1b\[[\d;]*m|[^\x1b]", re.DOTALL)


class Terminal(io.StringIO):
    """A stream that keeps what a terminal of this size would show, with the rows above it."""

    encoding = "utf-8"

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.row, self.column = columns, 0, 0
        self.rows: list[list[str]] = [[]]
        self.raw = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.raw += text
        assert STEP.sub("", text) == ""
        for step in STEP.finditer(text):
            self._obey(step)
        return len(text)

    def _obey(self, step: re.Match[str]) -> None:
        if step[2] == "A":
            self.row -= int(step[1])
            assert self.row >= 0
        elif step[2] == "J":
            del self.rows[self.row + 1 :]
            del self.rows[self.row][self.column :]
        elif step[0] == "\r":
            self.column = 0
        elif step[0] == "\n":
            self._next_row()
        elif step[2] != "m" and not step[0].startswith("\x1b"):
            cells = live._width(step[0])
            if self.column + cells > self.columns:
                self._next_row()
            self.rows[self.row] += [step[0], *[""] * (cells - 1)]
            self.column += cells

    def _next_row(self) -> None:
        self.row, self.column = self.row + 1, 0
        self.rows.insert(self.row, []) if self.row == len(self.rows) else None

    def shown(self) -> str:
        return "\n".join("".join(row) for row in self.rows)


def written_plainly(text: str, columns: int) -> str:
    terminal = Terminal(columns)
    terminal.write(text)
    return terminal.shown()


@pytest.fixture(params=[1, 2, 3, 7, 40, 200])
def columns(request, monkeypatch) -> int:
    size = os.terminal_size((request.param, 24))
    monkeypatch.setattr(live.shutil, "get_terminal_size", lambda *_, **__: size)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return size.columns


def test_what_stays_on_the_terminal_is_the_text(columns) -> None:
    draw = random.Random(columns)
    letters = ["a", "bc ", " d", "\n", "日" if columns > 1 else "x", "e\u0301", "wonderful "]
    for _ in range(50):
        terminal, text = Terminal(columns), ""
        view = LiveView(terminal)
        for _ in range(5):
            block = [draw.choice(letters) for _ in range(draw.randrange(1, 6))]
            for call in range(3):
                canvas = [(one, 0.5) if draw.random() < call / 2 else None for one in block]
                view.canvas(canvas)
                behind = "".join(MASKS[0] if one is None else one[0] for one in canvas)
                if len(written_plainly(text + behind, columns).splitlines()) < 20:
                    assert terminal.shown() == written_plainly(text + behind, columns)
            view.commit("".join(block))
            text += "".join(block)
            assert terminal.shown() == written_plainly(text, columns)
        view.finish()
        assert terminal.shown() == written_plainly(text + "\n", columns)


def test_a_block_higher_than_the_terminal_does_not_scroll(monkeypatch) -> None:
    monkeypatch.setattr(live.shutil, "get_terminal_size", lambda: os.terminal_size((4, 5)))
    terminal = Terminal(4)
    view = LiveView(terminal)
    view.canvas([("word", None)] * 9)
    assert terminal.shown() == "word\nword\nword\nword"
    view.commit("word" * 9)
    assert terminal.shown() == "\n".join(["word"] * 9)


def test_colours_tell_the_confidence(columns, monkeypatch) -> None:
    terminal = Terminal(columns)
    LiveView(terminal).canvas([("a", 0.99), ("b", 0.8), ("c", 0.3), ("d", None), None])
    for coloured in ("\x1b[32ma", "\x1b[36mb", "\x1b[33mc", "d\x1b[2m" + MASKS[0]):
        assert coloured in terminal.raw
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal(columns)
    LiveView(plain).canvas([("a", 0.99), None])
    assert "m" not in plain.raw


def test_no_text_can_command_the_terminal(columns) -> None:
    terminal = Terminal(columns)
    view = LiveView(terminal)
    view.canvas([("\x1b[2J\a", 0.5)])
    view.commit("\x1b[2J\x9b5A")
    assert re.findall(r"\x1b\[2J|\a|\x9b", terminal.raw) == []


def test_without_a_terminal_only_committed_text_is_written(monkeypatch) -> None:
    out = io.StringIO()
    view = LiveView(out)
    view.canvas([("a", 0.5), None])
    view.commit("ab")
    view.commit(" c\x1b")  # as it is: a file obeys nothing
    view.finish()
    assert out.getvalue() == "ab c\x1b\n"
