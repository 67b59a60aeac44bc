"""A line of progress on standard error, for every verb that takes its time."""

from __future__ import annotations

import sys
import time

REDRAW_SECONDS = 0.2


class StatusLine:
    """A line that is drawn over on a terminal; elsewhere, as in a log, each text has its own.

    Args:
        log_seconds: Least time between two lines of a log.
        quiet_seconds: Nothing is due for work that ends within this time.
    """

    def __init__(self, log_seconds: float, quiet_seconds: float = 2.0) -> None:
        self._log_seconds, self._quiet_seconds = log_seconds, quiet_seconds
        self._start = self._drawn = time.monotonic()
        self._is_open = False

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._start

    def is_due(self, *, is_last: bool = False) -> bool:
        """Return whether it is time to draw; for the last text it is, unless the work was short."""
        interval = REDRAW_SECONDS if sys.stderr.isatty() else self._log_seconds
        waited = time.monotonic() - self._drawn >= interval
        return self.seconds >= self._quiet_seconds and (is_last or waited)

    def draw(self, text: str, *, is_last: bool = False) -> None:
        """Write a text; the last one stays."""
        self._drawn = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._is_open = is_terminal and not is_last
        start, end = "\r\x1b[K" if is_terminal else "", "" if self._is_open else "\n"
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove what a terminal shows of it."""
        if self._is_open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._is_open = False
