"""Progress of long work, on standard error."""

from __future__ import annotations

from collections.abc import Callable

from twotower_contract.progress import StatusLine

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


def silent(*_: object) -> None:
    """Tell nobody of the progress."""


class StepMeter:
    """A meter of the steps that are done; in a log a line appears every five seconds."""

    def __init__(self) -> None:
        self._line = StatusLine(log_seconds=5.0)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Draw, if it is time."""
        if self._line.is_due():
            self._line.draw(f"{what}: {done} of {total}, {self._line.seconds:.0f} s")

    def finish(self) -> None:
        """Clear the line."""
        self._line.clear()
