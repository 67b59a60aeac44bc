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


class LineMeter:
    """A line every few seconds on how far training is; for logs.

    Args:
        steps: Steps in all.
        seconds: Between two lines.
    """

    def __init__(self, steps: int, seconds: float = 5.0) -> None:
        self._line = StatusLine(seconds, quiet_seconds=0.0)
        self._steps, self._done = steps, 0

    def __call__(self, tower: str, loss: float) -> None:
        """Count a step of a tower, whose loss is in nats per token."""
        self._done += 1
        is_last = self._done == self._steps
        if self._line.is_due(is_last=is_last):
            self._line.draw(
                f"training: step {self._done} of {self._steps}, {tower}, loss {loss:.2f}",
                is_last=is_last,
            )
