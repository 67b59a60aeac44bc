"""Progress of a long load, on standard error.

On a terminal a line is drawn again and again; elsewhere (a log, a Triton server) one line at the
end says how long it took. Nothing appears for work that ends within two seconds.
"""

from __future__ import annotations

import sys
import time

QUIET_SECONDS = 2.0
REDRAW_SECONDS = 0.2


class ByteMeter:
    """Shows bytes done, bytes in all, and the rate; call it with both numbers.

    Args:
        what: The work, as in "binding weights".
    """

    def __init__(self, what: str) -> None:
        self._bytes = _Line(what)
        self._calls = _Line("preparing calls")

    def __call__(self, done: int, total: int) -> None:
        """Draw the line again, if it is time."""
        seconds = self._bytes.seconds(done, total)
        if seconds is None:
            return
        rate = (done - self._bytes.first) / seconds / 1e9
        share = done / total if total else 1.0
        self._bytes.draw(f"{share:4.0%} of {total / 1e9:.1f} GB, {rate:.1f} GB/s")

    def prepared(self, done: int, total: int) -> None:
        """Draw the line of prepared calls again, if it is time."""
        seconds = self._calls.seconds(done, total)
        if seconds is not None:
            self._calls.draw(f"{done} of {total}, {seconds:.0f} s")


class _Line:
    """One line, and when it is time to draw it.

    Attributes:
        first: Count at the first call, when the time begins.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start: float | None = None
        self._drawn = 0.0
        self._is_last = False
        self.first = 0

    def seconds(self, done: int, total: int) -> float | None:
        """Return the seconds since the first call, or None where nothing is to be drawn now."""
        now = time.monotonic()
        if self._start is None:
            self._start, self.first = now, done
        self._is_last = done >= total
        if now - self._start < QUIET_SECONDS:
            return None
        due = now - self._drawn >= REDRAW_SECONDS and sys.stderr.isatty()
        if not (due or self._is_last):
            return None
        self._drawn = now
        return now - self._start

    def draw(self, text: str) -> None:
        """Write the line; over the last one on a terminal."""
        is_terminal = sys.stderr.isatty()
        print(
            f"{chr(13) * is_terminal}{self._what}: {text}",
            end="\n" if self._is_last or not is_terminal else "",
            file=sys.stderr,
            flush=True,
        )
