"""Progress of long work, on standard error."""

from __future__ import annotations

import sys
import time


class StepMeter:
    """Progress on standard error: nothing for work that ends within two seconds.

    On a terminal one line is redrawn; elsewhere a line appears every five seconds.
    """

    def __init__(self) -> None:
        self._start = self._drawn = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Draw, if it is time."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self._start < 2 or now - self._drawn < (0.1 if terminal else 5):
            return
        self._drawn = now
        line = f"{what}: {done} of {total}, {now - self._start:.0f} s"
        print(
            f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr
        )
        sys.stderr.flush()

    def finish(self) -> None:
        """Clear the line."""
        if sys.stderr.isatty() and self._drawn != self._start:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class LineMeter:
    """Prints a line every few seconds on how far training is; for logs.

    Args:
        steps: Steps in all.
        seconds: Between two lines.
    """

    def __init__(self, steps: int, seconds: float = 5.0) -> None:
        self._steps, self._seconds = steps, seconds
        self._done, self._said = 0, time.monotonic()

    def __call__(self, tower: str, loss: float) -> None:
        """Count a step of a tower, whose loss is in nats per token."""
        self._done += 1
        if time.monotonic() - self._said >= self._seconds or self._done == self._steps:
            self._said = time.monotonic()
            print(
                f"training: step {self._done} of {self._steps}, {tower}, loss {loss:.2f}",
                file=sys.stderr,
            )
